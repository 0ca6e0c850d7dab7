"""The densely trained MoE MLP: one wide MLP whose hidden units are scaled, expert by expert, before the second product.

Source: arXiv 2404.05567, equation 3: O = sum_i S_i e_i(x). Unit j of the N*f hidden units belongs to expert j // f.
Under expert parallelism the units, in expert order, are split over the (expert-tensor x expert) group: tensor and
sequence parallelism over that group, so that the communicated volume does not depend on the routing.
"""

import copy
import math
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from dsmoe_megatron.model.expert_activation import activate_and_scale
from dsmoe_megatron.model.router import Router, RouterGroups, RouterOptions


class DenseMoEMLP(MLP):
    """Every expert computes on every token; megatron-core's own linears do the work and the communication.

    Args:
        config: megatron-core's configuration; ffn_hidden_size is N*f.
        submodules: fc1 and fc2.
        router_options: the router; its number of experts is N.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, router_options: RouterOptions) -> None:
        tensor_group = parallel_state.get_tensor_model_parallel_group()
        expert_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        split_over_experts = expert_group.size() != tensor_group.size() or config.expert_model_parallel_size > 1
        linear_config, gate_group = config, tensor_group
        if split_over_experts:
            linear_config, gate_group = copy.copy(config), expert_group
            linear_config.sequence_parallel = True
        super().__init__(linear_config, submodules, ffn_hidden_size=linear_config.ffn_hidden_size, tp_group=gate_group)
        self.config = config
        # megatron-core then reduces these gradients over the expert-data-parallel group. Set in every layout, since
        # the optimizers that follow from it must be the same ones for a checkpoint to load under another layout
        for weight in (self.linear_fc1.weight, self.linear_fc2.weight):
            weight.allreduce = False

        groups = RouterGroups(
            tensor=tensor_group,
            context=parallel_state.get_context_parallel_group(),
            data=parallel_state.get_data_parallel_group(),
            gate=gate_group,
        )
        self.router = Router(config, router_options, groups)
        units_per_expert = config.ffn_hidden_size // router_options.num_experts
        units_here = config.ffn_hidden_size // gate_group.size()
        # a rank's units may begin or end inside an expert: gate blocks of a size that divides both
        block = math.gcd(units_per_expert, units_here)
        self.blocks_per_expert = units_per_expert // block
        self.first_block, self.blocks_here = gate_group.rank() * units_here // block, units_here // block

    def set_layer_number(self, layer_number: int) -> None:
        """Called by TransformerLayer, which gives the number (from 1) only after it has built the MLP."""
        self.router.layer_number = layer_number

    def forward(self, hidden_states: Tensor, *unused: Any, **unused_by_name: Any) -> tuple[Tensor, None]:
        """[S, B, H] -> [S, B, H] and no bias; megatron-core's further arguments have no meaning here."""
        log_scores_SBE = self.router(hidden_states)
        units_SBV, _ = self.linear_fc1(hidden_states)
        activated_SBU = activate_and_scale(
            units_SBV,
            self._block_log_scores(log_scores_SBE),
            self.config.activation_func,
            self.config.gated_linear_unit,
        )
        output_SBH, _ = self.linear_fc2(activated_SBU)
        return output_SBH, None

    def _block_log_scores(self, log_scores_SBE: Tensor) -> Tensor:
        if self.blocks_per_expert > 1:
            log_scores_SBE = log_scores_SBE.repeat_interleave(self.blocks_per_expert, dim=-1)
        return log_scores_SBE.narrow(-1, self.first_block, self.blocks_here)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron-core's MLP; the experts' weights are replicated over the expert-data-parallel group."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        expert_metadata = {**metadata, "dp_cp_group": parallel_state.get_expert_data_parallel_group()}
        weights = super().sharded_state_dict(prefix, sharded_offsets, expert_metadata)
        router_prefix = f"{prefix}router."
        state = {name: value for name, value in weights.items() if not name.startswith(router_prefix)}
        state.update(self.router.sharded_state_dict(router_prefix, sharded_offsets, metadata))
        return state
