"""Routers, experts, MLP and attention of the exported DS-MoE model. It travels with the export: torch and transformers.

Source: arXiv 2404.05567. Every MLP and attention layer holds N experts; policy.py says which of them compute on which
token, and scores are never renormalised over the active ones (equation 1).
Shape suffixes: B batch, S sequence, T tokens (B x S flattened), N experts, K active experts of a token, P active
(token, expert) pairs, H hidden size, F units of one expert, G key/value heads, D head width.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .configuration_dsmoe import DSMoEConfig
from .expert_products import grouped_linear, linear, sum_of_all, sum_over_pairs, takes_pairs
from .policy import ExpertPolicy, RouterKind, active_experts, best_experts, fixed_top_k


class DSMoERouter(nn.Module):
    """Scores every expert for every token."""

    kind: RouterKind

    def __init__(self, config: DSMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.router_type = config.router_type
        if self.router_type == "linear":
            self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        else:
            self.fc1 = nn.Linear(config.hidden_size, config.router_hidden_size, bias=False)
            self.fc2 = nn.Linear(config.router_hidden_size, num_experts, bias=False)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities, [T, N], float32 or wider."""
        # bfloat16 logits tie experts and blur the small probabilities that thresholds read
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        hidden_TH = hidden_TH.to(wide)
        with _without_autocast(hidden_TH.device.type):
            if self.router_type == "linear":
                logits_TN = F.linear(hidden_TH, self.weight.to(wide))
            else:
                inner = F.gelu(F.linear(hidden_TH, self.fc1.weight.to(wide)))
                logits_TN = F.linear(inner, self.fc2.weight.to(wide))
            return logits_TN, logits_TN.softmax(dim=-1)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Entered only where it is on, which saves its time in decoding."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


class DSMoEAttentionRouter(DSMoERouter):
    kind = "attention"


class DSMoEMLPRouter(DSMoERouter):
    kind = "mlp"


class DSMoEExpertsBase(nn.Module):
    """N expert MLPs as 3D parameters, in the layout of transformers' experts interface."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def up_weight(self) -> Tensor:
        """First projections of all experts, [N, F or 2F, H]."""
        raise NotImplementedError

    def activate(self, projected: Tensor) -> Tensor:
        """Hidden units from the first projection, [..., F or 2F] -> [..., F]."""
        raise NotImplementedError

    def every_expert(self, hidden_TH: Tensor, scores_TN: Tensor | None) -> Tensor:
        """The sum over all experts of score x output (equation 3), as one MLP of N x F units; no scores are ones."""
        projected_TNF = linear(hidden_TH, self.up_weight().flatten(0, 1)).unflatten(-1, (self.num_experts, -1))
        units_TNF = self.activate(projected_TNF)
        if scores_TN is not None:
            units_TNF = (units_TNF * scores_TN.unsqueeze(-1)).to(hidden_TH.dtype)
        return sum_of_all(units_TNF, self.down_proj)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over each token's K experts of weight x output: the experts interface's eager implementation.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K].
            top_k_weights: [T, K].
        """
        output_TH = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token_P, slot_P = torch.where(top_k_index == expert)
            units_PF = self.activate(F.linear(hidden_states[token_P], self.up_weight()[expert]))
            output_PH = F.linear(units_PF, self.down_proj[expert]) * top_k_weights[token_P, slot_P, None]
            output_TH.index_add_(0, token_P, output_PH.to(output_TH.dtype))
        return output_TH


ExpertsClass = TypeVar("ExpertsClass", bound=type[DSMoEExpertsBase])


def with_every_choice(experts_class: ExpertsClass) -> ExpertsClass:
    """Let the module compute all experts, or any number per token, as well as K: by its own call, since that is where
    adapters (PEFT) and tensor parallelism take hold of a module."""
    chosen = experts_class.forward

    @functools.wraps(chosen)
    def forward(
        self: DSMoEExpertsBase,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        pair_token: Tensor | None = None,
    ) -> Tensor:
        """As the experts interface's. Without an index, every expert with the weights [T, N] (none are ones); with the
        tokens of pairs [P], the experts and weights of these pairs [P]."""
        if top_k_index is None or top_k_weights is None:
            return self.every_expert(hidden_states, top_k_weights)
        if pair_token is None:
            return chosen(self, hidden_states, top_k_index, top_k_weights)
        if takes_pairs(self, hidden_states):
            return sum_over_pairs(self, hidden_states, pair_token, top_k_index, top_k_weights)
        # each pair as a token of its own with one expert; summed in float32: a token may have many experts
        output_PH = chosen(self, hidden_states[pair_token], top_k_index[:, None], top_k_weights[:, None])
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        sum_TH = torch.zeros_like(hidden_states, dtype=wide).index_add(0, pair_token, output_PH.to(wide))
        return sum_TH.to(hidden_states.dtype)

    experts_class.forward = forward  # type: ignore[method-assign]
    return experts_class


@with_every_choice
@use_experts_implementation(has_gate=False)
class DSMoEExperts(DSMoEExpertsBase):
    """Plain experts: W2 act(W1 x)."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))

    def up_weight(self) -> Tensor:
        return self.up_proj

    def activate(self, projected: Tensor) -> Tensor:
        return cast(Tensor, self.act_fn(projected))


@with_every_choice
@use_experts_implementation
class DSMoEGatedExperts(DSMoEExpertsBase):
    """Gated experts: W2 (act(Wg x) * (W1 x)); each expert's gate rows stand before its up rows."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))

    def up_weight(self) -> Tensor:
        return self.gate_up_proj

    def activate(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return cast(Tensor, self.act_fn(gate) * up)


class DSMoEMLP(nn.Module):
    """Mixture of MLP experts; with one expert, a plain MLP without a router."""

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_experts = config.num_experts
        if self.num_experts > 1:
            self.gate = DSMoEMLPRouter(config, self.num_experts)
        self.experts = DSMoEGatedExperts(config) if config.gated_mlp else DSMoEExperts(config)
        self.set_policy(ExpertPolicy.from_config(config))

    def set_policy(self, policy: ExpertPolicy) -> None:
        self.policy = policy
        self.top_k = fixed_top_k(policy, self.layer_idx, "mlp", self.num_experts)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; the token mask [T] is what threshold_topk counts."""
        hidden_TH = hidden_states.flatten(0, -2)
        if self.num_experts == 1:
            return self.experts(hidden_TH).view_as(hidden_states)
        _, scores_TN = self.gate(hidden_TH)
        if self.top_k == self.num_experts:
            output_TH = self.experts(hidden_TH, None, scores_TN)
        elif self.top_k is not None:
            index_TK = best_experts(scores_TN, self.top_k)
            output_TH = self.experts(hidden_TH, index_TK, scores_TN.gather(-1, index_TK).to(hidden_TH.dtype))
        else:
            active_TN = active_experts(scores_TN, self.policy, self.layer_idx, "mlp", token_mask)
            token_P, expert_P = active_TN.nonzero(as_tuple=True)
            weights_P = scores_TN[token_P, expert_P].to(hidden_TH.dtype)
            output_TH = self.experts(hidden_TH, expert_P, weights_P, token_P)
        return output_TH.view_as(hidden_states)


class DSMoEAttention(nn.Module):
    """Mixture of attention heads (equations 7-8), or grouped-query attention.

    Expert i owns one query head per key/value head; keys and values are shared by all experts and always computed.
    Query heads stand in the order (key/value head, expert), so K active experts are grouped-query attention with K
    heads per group.
    """

    is_causal = True

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.num_attention_experts = config.num_attention_experts
        self.is_mixture = config.attention_type == "moa"
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        key_width = self.num_key_value_heads * self.head_dim
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        if self.is_mixture:
            experts = self.num_attention_experts
            self.router = DSMoEAttentionRouter(config, experts)
            self.q_experts = nn.Parameter(torch.empty(experts, key_width, config.hidden_size))
            self.o_experts = nn.Parameter(torch.empty(experts, config.hidden_size, key_width))
        else:
            query_width = config.num_attention_heads * self.head_dim
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
            self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.set_policy(ExpertPolicy.from_config(config))

    def set_policy(self, policy: ExpertPolicy) -> None:
        if not self.is_mixture:
            return
        self.policy = policy
        self.top_k = fixed_top_k(policy, self.layer_idx, "attention", self.num_attention_experts)
        # query heads per key/value head that are computed; attention implementations read this name
        self.num_key_value_groups = self.num_attention_experts if self.top_k is None else self.top_k

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, H] -> [B, S, H] and the attention weights, where the implementation gives them."""
        scores_BSN, index_BSK = self._route(hidden_states, token_mask)
        query = self._queries(hidden_states, index_BSK)
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        heads, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self._output(heads, scores_BSN, index_BSK), weights

    def _route(self, hidden_BSH: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gates of the computed experts, and their indices where not all are; none without a router."""
        if not self.is_mixture:
            return None, None
        _, scores_TN = self.router(hidden_BSH.flatten(0, 1))
        token_shape = hidden_BSH.shape[:-1]
        if self.top_k == self.num_attention_experts:
            return scores_TN.unflatten(0, token_shape), None
        if self.top_k is not None:
            index_TK = best_experts(scores_TN, self.top_k)
            return scores_TN.gather(-1, index_TK).unflatten(0, token_shape), index_TK.unflatten(0, token_shape)
        active_TN = active_experts(scores_TN, self.policy, self.layer_idx, "attention", token_mask_T)
        return (scores_TN * active_TN).unflatten(0, token_shape), None

    def _queries(self, hidden_BSH: Tensor, index_BSK: Tensor | None) -> Tensor:
        """Query heads, [B, heads, S, D]."""
        if not self.is_mixture:
            return cast(Tensor, self.q_proj(hidden_BSH)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if index_BSK is None:
            query = linear(hidden_BSH, self.q_experts.flatten(0, 1))
        else:
            hidden_BSKH = hidden_BSH.unsqueeze(2).expand(*index_BSK.shape, -1)
            query = grouped_linear(hidden_BSKH, self.q_experts, index_BSK).flatten(2)
        query_BSKGD = query.unflatten(-1, (self.num_key_value_groups, self.num_key_value_heads, self.head_dim))
        return query_BSKGD.permute(0, 3, 2, 1, 4).flatten(1, 2)

    def _output(self, heads: Tensor, scores_BSK: Tensor | None, index_BSK: Tensor | None) -> Tensor:
        """The sum over the computed experts of score x output projection of their heads, [B, S, H]."""
        if scores_BSK is None:
            return cast(Tensor, self.o_proj(heads.flatten(2)))
        heads_BSGKD = heads.reshape(*scores_BSK.shape[:2], self.num_key_value_heads, -1, self.head_dim)
        gated_BSGKD = (heads_BSGKD * scores_BSK[:, :, None, :, None]).to(heads.dtype)
        gated_BSKE = gated_BSGKD.transpose(2, 3).flatten(3)
        if index_BSK is None:
            return linear(gated_BSKE.flatten(2), self.o_experts.transpose(0, 1).flatten(1))
        return grouped_linear(gated_BSKE, self.o_experts, index_BSK).sum(dim=2)
