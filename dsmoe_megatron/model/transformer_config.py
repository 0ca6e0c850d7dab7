"""The recipe in megatron-core's words."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dsmoe_megatron.config import Config


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """megatron-core's configuration of a checked recipe.

    Args:
        config: recipe that config_rules.check_config accepted.
        device: decides fusions and how pipeline stages exchange tensors.
    """
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    on_cuda = device.type == "cuda"
    interleaved = parallel.virtual_pipeline > 1
    full_recompute = config.train.recompute == "full"
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.intermediate_size,
        gated_linear_unit=model.gated_mlp,
        activation_func=F.silu if model.hidden_act == "silu" else F.gelu,
        add_bias_linear=False,
        normalization="RMSNorm" if model.norm_type == "rmsnorm" else "LayerNorm",
        layernorm_epsilon=model.rms_norm_eps,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        # model/initialization.py sets every weight, from the seed alone. megatron-core must still go through the
        # motions: without, it does not mark its shards as such, and the gradient norm misses most of them
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        embedding_init_method=_leave_as_it_is,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        deterministic_mode=config.train.deterministic,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.tensor_of_experts,
        # gloo sends asynchronously from the storage that deallocation would swap: wrong losses under interleaving
        deallocate_pipeline_outputs=on_cuda,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        recompute_granularity=None if config.train.recompute == "none" else config.train.recompute,
        recompute_method="uniform" if full_recompute else None,
        recompute_num_layers=1 if full_recompute else None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=on_cuda,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        **_expert_options(config),
    )


def _leave_as_it_is(weight: Tensor) -> Tensor:
    return weight


def _expert_options(config: Config) -> dict[str, object]:
    model = config.model
    if not (model.has_mlp_router or model.has_attention_router):
        return {}
    # the schedule scales auxiliary losses by 1 / micro-batches only where num_moe_experts is set: without it the
    # mutual-information loss would grow with gradient accumulation
    options: dict[str, object] = {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.moe_intermediate_size,
    }
    if model.expert_training == "sparse":
        options |= {
            "moe_router_topk": model.num_experts_per_tok,
            # scores are a softmax over all experts and are not renormalised, as at DS-MoE's sparse inference
            "moe_router_pre_softmax": True,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": model.switch_loss_coefficient,
            "moe_token_dispatcher_type": "alltoall",
        }
    return options
