"""Mixture of attention heads on grouped-query attention.

Source: arXiv 2404.05567, equations 7 and 8. Expert i owns one query head, and its columns of the output projection,
per key/value head; keys and values are shared. So in the grouped layout [key/value head, head in group] the index in
the group is the expert, and the layer is ONE SelfAttention whose head outputs are scaled before the projection.
"""

import copy
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dsmoe_megatron.model.router import Router, RouterGroups, RouterOptions, scale_blocks


class MixtureOfAttentionHeads(SelfAttention):
    """Uses the hook of megatron-core's gated attention for the gate, without its extra query-key-value columns.

    Args:
        config: megatron-core's configuration; num_attention_heads is experts x num_query_groups.
        submodules: projections and core attention.
        layer_number: from 1.
        router_options: the router; its number of experts is num_attention_heads / num_query_groups.
        further: passed to SelfAttention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        router_options: RouterOptions,
        **further: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **further)
        # only from here on: the constructor would widen the projection for a gate of its own
        self.config = copy.copy(config)
        self.config.attention_output_gate = True
        groups = RouterGroups(
            tensor=self.tp_group,
            context=self.pg_collection.cp,
            data=parallel_state.get_data_parallel_group(),
            gate=self.tp_group,
        )
        self.router = Router(config, router_options, groups, layer_number)
        ranks, kv_heads = self.tp_group.size(), config.num_query_groups
        # above the number of key/value heads a rank holds some experts of one of them
        ranks_per_kv_head = max(ranks // kv_heads, 1)
        self.kv_heads_here = max(kv_heads // ranks, 1)
        self.experts_here = router_options.num_experts // ranks_per_kv_head
        self.first_expert = (self.tp_group.rank() % ranks_per_kv_head) * self.experts_here

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As SelfAttention's, and the logarithm of this rank's experts' scores, [S, B, experts here]."""
        log_scores_SBE = self.router(hidden_states)
        query, key, value = super().get_query_key_value_tensors(
            hidden_states, key_value_states, output_gate=False, split_qkv=True
        )
        return query, key, value, log_scores_SBE.narrow(-1, self.first_expert, self.experts_here)

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        # heads are in the order [key/value head, expert]
        return scale_blocks(x, gate, repeats=self.kv_heads_here)
