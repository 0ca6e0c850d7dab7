"""Which module each part of a transformer layer is built from, through megatron-core's backend providers."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.model.core_attention import ScaledDotProductCoreAttention
from dsmoe_megatron.model.dense_moe_mlp import DenseMoEMLP
from dsmoe_megatron.model.mixture_of_attention_heads import MixtureOfAttentionHeads
from dsmoe_megatron.model.router import RouterKind, RouterOptions


def block_spec(model: ModelConfig, num_layers: int, backend: BackendSpecProvider) -> TransformerBlockSubmodules:
    """Specification of one pipeline stage.

    Args:
        model: the recipe's model section.
        num_layers: layers of this stage.
        backend: provider of linear layers and norms (runtime/backends.py).
    """
    norm = backend.layer_norm(rms_norm=model.norm_type == "rmsnorm")
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(model, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=_mlp_spec(model, backend),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _attention_spec(model: ModelConfig, backend: BackendSpecProvider) -> ModuleSpec:
    submodules = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=ScaledDotProductCoreAttention,
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    params: dict[str, object] = {"attn_mask_type": AttnMaskType.causal}
    if not model.has_attention_router:
        return ModuleSpec(module=SelfAttention, params=params, submodules=submodules)
    params["router_options"] = _router_options(model, "attention")
    return ModuleSpec(module=MixtureOfAttentionHeads, params=params, submodules=submodules)


def _mlp_spec(model: ModelConfig, backend: BackendSpecProvider) -> ModuleSpec:
    submodules = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    if not model.has_mlp_router:
        return ModuleSpec(module=MLP, submodules=submodules, params={"ffn_hidden_size": model.intermediate_size})
    if model.expert_training == "sparse":
        grouped = not isinstance(backend, LocalSpecProvider)
        return get_moe_module_spec_for_backend(backend, num_experts=model.num_experts, moe_grouped_gemm=grouped)
    return ModuleSpec(
        module=DenseMoEMLP, submodules=submodules, params={"router_options": _router_options(model, "mlp")}
    )


def _router_options(model: ModelConfig, kind: RouterKind) -> RouterOptions:
    attention = kind == "attention"
    return RouterOptions(
        kind=kind,
        num_experts=model.num_attention_experts if attention else model.num_experts,
        router_type=model.router_type,
        router_hidden_size=model.router_hidden_size,
        mi_alpha=model.mi_alpha_attention if attention else model.mi_alpha_mlp,
        mi_scope=model.mi_scope,
    )
