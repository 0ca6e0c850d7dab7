"""The parts of an exported DS-MoE model that are its own, on vLLM's layers.

The routers and policy.py choose the experts here, not vLLM's mixture-of-experts layer, which knows neither thresholds
nor plain (not gated) experts on every device. Its gated experts would compute the activation that the layer was built
for, and its top-k may be renormalised: nothing of it is used.

Under tensor parallelism a rank holds whole experts of the MLP and whole key/value heads with all their experts' query
heads; routers are on every rank.
Shape suffixes: T tokens of the batch, N experts, H hidden size, F units of one expert, G key/value heads, D head width.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import _custom_ops as operators
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import CpuArchEnum, current_platform

from dsmoe_megatron.inference.active_experts import ACTIVATIONS, Linear, active_experts_mlp, sum_of_pairs
from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.policy import ExpertPolicy, RouterKind, active_experts, fixed_top_k
from dsmoe_megatron.inference.routed_layers import DSMoERouter

Loaders = dict[str, Callable[[Tensor], None]]
"""Names of a module's exported tensors, and what puts each in its place."""


class Gates(DSMoERouter):
    """A router and its policy: the scores of the active experts, zero for the others."""

    def __init__(self, config: DSMoEConfig, layer_index: int, kind: RouterKind, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.float()  # it computes in float32 whatever the model's dtype
        self.policy, self.layer_index, self.kind = ExpertPolicy.from_config(config), layer_index, kind

    def gates(self, hidden_TH: Tensor) -> Tensor:
        """[T, N], float32, not renormalised (equation 1)."""
        _, scores_TN = self(hidden_TH)
        return cast(Tensor, scores_TN) * active_experts(scores_TN, self.policy, self.layer_index, self.kind)


class EveryExpert(nn.Module):
    """All experts on every token, as one MLP of N x F units (equation 3); also the MLP without a router."""

    def __init__(self, config: DSMoEConfig, prefix: str) -> None:
        super().__init__()
        self.num_experts, self.gated = config.num_experts, config.gated_mlp
        self.activation = ACTIVATIONS[config.hidden_act]
        units = config.num_experts * config.moe_intermediate_size
        self.up = MergedColumnParallelLinear(
            config.hidden_size, [units] * (2 if self.gated else 1), bias=False, prefix=f"{prefix}.up"
        )
        self.down = RowParallelLinear(units, config.hidden_size, bias=False, prefix=f"{prefix}.down")

    def forward(self, hidden_TH: Tensor, gates_TN: Tensor | None) -> Tensor:
        projected, _ = self.up(hidden_TH)
        if self.gated:
            gate, up = projected.chunk(2, dim=-1)
            units = self.activation(gate) * up
        else:
            units = self.activation(projected)
        if gates_TN is not None:
            units_TNF = units.unflatten(-1, (gates_TN.shape[1], -1))
            units = (units_TNF * gates_TN.unsqueeze(-1)).to(hidden_TH.dtype).flatten(1)
        output_TH, _ = self.down(units)
        return cast(Tensor, output_TH)

    def loaders(self) -> Loaders:
        up, down = self.up.weight, self.down.weight

        def load_gated(gate_up_NUH: Tensor) -> None:
            for half, part_NFH in enumerate(gate_up_NUH.chunk(2, dim=1)):
                up.weight_loader(up, part_NFH.flatten(0, 1), half)

        def load_plain(up_NFH: Tensor) -> None:
            up.weight_loader(up, up_NFH.flatten(0, 1), 0)

        def load_down(down_NHF: Tensor) -> None:
            down.weight_loader(down, down_NHF.transpose(0, 1).flatten(1))

        first = {"gate_up_proj": load_gated} if self.gated else {"up_proj": load_plain}
        return {**first, "down_proj": load_down}


class ActiveExperts(nn.Module):
    """Only the experts whose gate is open.

    On a CPU vLLM's fused kernel computes gated experts and oneDNN plain ones, where the library and the widths allow
    it; elsewhere it is one product of torch's per expert. Packed weights replace the loaded ones.
    """

    def __init__(self, vllm_config: VllmConfig, config: DSMoEConfig, top_k: int | None, prefix: str) -> None:
        super().__init__()
        self.activation, self.gated, self.top_k, self.name = config.hidden_act, config.gated_mlp, top_k, prefix
        self.world_size = get_tensor_model_parallel_world_size()
        experts, units = config.num_experts // self.world_size, config.moe_intermediate_size
        rows = 2 * units if self.gated else units
        self.up = nn.Parameter(torch.empty(experts, rows, config.hidden_size), requires_grad=False)
        self.down = nn.Parameter(torch.empty(experts, config.hidden_size, units), requires_grad=False)
        on_cpu = current_platform.is_cpu() and current_platform.get_cpu_architecture() == CpuArchEnum.X86
        # the kernel's tiles: 32 outputs of each half of the first product, 32 of the second
        self.fused = on_cpu and self.gated and units % 32 == 0 and config.hidden_size % 32 == 0
        self.onednn = on_cpu and not self.fused and bool(operators._supports_onednn)
        # the operator finds its layer by name, as vLLM's attention does: packed weights are no tensors
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, hidden_TH: Tensor, gates_TN: Tensor) -> Tensor:
        output_TH = active_experts_of_layer(hidden_TH, gates_TN, self.name)
        return cast(Tensor, tensor_model_parallel_all_reduce(output_TH) if self.world_size > 1 else output_TH)

    def compute(self, hidden_TH: Tensor, gates_TN: Tensor) -> Tensor:
        """[T, H]: this rank's part of the sum."""
        if self.fused:
            return self._fused(hidden_TH.contiguous(), gates_TN)
        return active_experts_mlp(hidden_TH, gates_TN, self.up_linears, self.down_linears, self.activation, self.gated)

    def _fused(self, hidden_TH: Tensor, gates_TN: Tensor) -> Tensor:
        if self.top_k is not None and self.world_size == 1:
            gates_TK, expert_TK = gates_TN.topk(self.top_k)  # the others' gates are zero
            return self._fused_kernel(hidden_TH, gates_TK, expert_TK)
        # each pair as a token of its own with one expert
        token_P, expert_P = gates_TN.nonzero(as_tuple=True)
        if not len(token_P):
            return torch.zeros_like(hidden_TH)
        gates_P1 = gates_TN[token_P, expert_P].unsqueeze(1)
        output_PH = self._fused_kernel(hidden_TH.index_select(0, token_P), gates_P1, expert_P.unsqueeze(1))
        return sum_of_pairs(output_PH, token_P, hidden_TH)

    def _fused_kernel(self, hidden_TH: Tensor, gates_TK: Tensor, expert_TK: Tensor) -> Tensor:
        output_TH = torch.empty_like(hidden_TH)
        operators.cpu_fused_moe(
            output_TH, hidden_TH, self.up, self.down, None, None, gates_TK, expert_TK.int(), self.activation, "vec"
        )
        return output_TH

    def loaders(self) -> Loaders:
        def load_into(parameter: nn.Parameter) -> Callable[[Tensor], None]:
            mine = own_experts(parameter.shape[0])
            return lambda tensor: default_weight_loader(parameter, tensor[mine])

        return {"gate_up_proj" if self.gated else "up_proj": load_into(self.up), "down_proj": load_into(self.down)}

    def pack(self) -> None:
        """Bring the loaded weights into the form in which they are multiplied."""
        if self.fused:
            self.up.data = operators.cpu_prepack_moe_weight(self.up.data, "vec")
            self.down.data = operators.cpu_prepack_moe_weight(self.down.data, "vec")
            return
        self.up_linears, self.down_linears = self._linears(self.up), self._linears(self.down)

    def _linears(self, weight_NOI: nn.Parameter) -> list[Linear]:
        handlers = []
        if self.onednn:
            # it has no bfloat16 products for processors without such instructions, and does not say so before
            with contextlib.suppress(RuntimeError):
                # 32: how many shapes of products each keeps ready
                handlers = [operators.create_onednn_mm(weight_OI.t(), 32) for weight_OI in weight_NOI.data]
        if not handlers:
            return [partial(F.linear, weight=weight_OI) for weight_OI in weight_NOI.data]
        weight_NOI.data = weight_NOI.data.new_empty(0)
        return [partial(operators.onednn_mm, handler, bias=None) for handler in handlers]


@torch.library.custom_op("dsmoe::active_experts", mutates_args=())
def active_experts_of_layer(hidden_TH: Tensor, gates_TN: Tensor, layer_name: str) -> Tensor:
    """Opaque to torch.compile: how many rows an expert gets is known only from the gates."""
    layer: ActiveExperts = get_forward_context().no_compile_layers[layer_name]
    return layer.compute(hidden_TH, gates_TN)


@active_experts_of_layer.register_fake
def _(hidden_TH: Tensor, gates_TN: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(hidden_TH)


def own_experts(count: int) -> slice:
    """The MLP experts of this rank."""
    first = get_tensor_model_parallel_rank() * count
    return slice(first, first + count)


class DSMoEMLP(nn.Module):
    """Mixture of MLP experts, computed densely or sparsely as the policy says."""

    def __init__(self, vllm_config: VllmConfig, config: DSMoEConfig, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.experts_per_rank = config.num_experts // get_tensor_model_parallel_world_size()
        self.gate = Gates(config, layer_index, "mlp", config.num_experts) if config.num_experts > 1 else None
        top_k = fixed_top_k(ExpertPolicy.from_config(config), layer_index, "mlp", config.num_experts)
        all_active = config.num_experts in (1, top_k)
        name = f"{prefix}.experts"
        self.experts = EveryExpert(config, name) if all_active else ActiveExperts(vllm_config, config, top_k, name)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        gates_TN = None
        if self.gate is not None:
            gates_TN = self.gate.gates(hidden_TH)[:, own_experts(self.experts_per_rank)]
        return cast(Tensor, self.experts(hidden_TH, gates_TN))


class DSMoEAttention(nn.Module):
    """Mixture of attention heads (equations 7-8), or grouped-query attention.

    Query heads stand in the order (key/value head, expert), so the mixture is grouped-query attention whose heads are
    gated before the output projection.
    """

    def __init__(self, vllm_config: VllmConfig, config: DSMoEConfig, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.config, self.head_dim = config, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, self.head_dim, heads, groups, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            heads * self.head_dim, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        self.num_heads, self.num_groups = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.rotary = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attention = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_groups,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attention",
        )
        self.router = None
        if config.attention_type == "moa":
            self.router = Gates(config, layer_index, "attention", config.num_attention_experts)

    def forward(self, positions: Tensor, hidden_TH: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_TH)
        widths = [heads * self.head_dim for heads in (self.num_heads, self.num_groups, self.num_groups)]
        query, key, value = qkv.split(widths, dim=-1)
        query, key = self.rotary(positions, query, key)
        heads = self.attention(query, key, value)
        if self.router is not None:
            gates_TN = self.router.gates(hidden_TH)
            heads_TGND = heads.view(-1, self.num_groups, gates_TN.shape[1], self.head_dim)
            heads = (heads_TGND * gates_TN[:, None, :, None]).to(hidden_TH.dtype).flatten(1)
        output_TH, _ = self.o_proj(heads)
        return cast(Tensor, output_TH)

    def loaders(self) -> Loaders:
        qkv, output = self.qkv_proj.weight, self.o_proj.weight
        groups = self.config.num_key_value_heads

        def load_queries(query_NEH: Tensor) -> None:
            query_NGDH = query_NEH.unflatten(1, (groups, self.head_dim))
            qkv.weight_loader(qkv, query_NGDH.transpose(0, 1).flatten(0, 2), "q")

        def load_outputs(output_NHE: Tensor) -> None:
            output_NHGD = output_NHE.unflatten(2, (groups, self.head_dim))
            output.weight_loader(output, output_NHGD.permute(1, 2, 0, 3).flatten(1))

        loaders: Loaders = {
            "k_proj.weight": lambda tensor: qkv.weight_loader(qkv, tensor, "k"),
            "v_proj.weight": lambda tensor: qkv.weight_loader(qkv, tensor, "v"),
        }
        if self.router is not None:
            return {**loaders, "q_experts": load_queries, "o_experts": load_outputs}
        return {
            **loaders,
            "q_proj.weight": lambda tensor: qkv.weight_loader(qkv, tensor, "q"),
            "o_proj.weight": lambda tensor: output.weight_loader(output, tensor),
        }
