"""The architectures that an export can have: which one fits a model, its config.json, its tensors.

- `dsmoe`: this package's own, for every model; the code travels with the export.
- `llama`: a dense baseline that transformers' Llama is.
- `qwen2_moe`: transformers' Qwen2-MoE, which serving engines know natively: plain grouped-query attention, gated SiLU
  experts, linear routers, RMSNorm, a fixed number of experts per token. What that architecture has besides is zero.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.errors import CheckpointError, ConfigurationError
from dsmoe_megatron.inference.policy import ExpertPolicy
from dsmoe_megatron.inference.tensor_mapping import Target, TensorMapping
from dsmoe_megatron.inference.tensor_rules import SHARED_EXPERT_UNITS, Shape
from dsmoe_megatron.tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Format = Literal["auto", "qwen2_moe"]
ARCHITECTURES: dict[Target, str] = {
    "dsmoe": "DSMoEForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
}
AUTO_MAP = {
    "AutoConfig": "configuration_dsmoe.DSMoEConfig",
    "AutoModel": "modeling_dsmoe.DSMoEModel",
    "AutoModelForCausalLM": "modeling_dsmoe.DSMoEForCausalLM",
}
# keys of the recipe's model section that config.json has under the same name
SHARED_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
    "attention_dropout",
    "initializer_range",
)
DSMOE_KEYS = (
    "attention_type",
    "num_attention_experts",
    "num_experts",
    "moe_intermediate_size",
    "gated_mlp",
    "router_type",
    "router_hidden_size",
    "norm_type",
)

TRAINED_K = "trained_experts_per_tok"  # of a sparse-trained model

# what Qwen2-MoE has besides; with these values it adds nothing
QWEN2_MOE_KEYS: dict[str, Any] = {
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": SHARED_EXPERT_UNITS,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "qkv_bias": True,  # vLLM always has them
}


def choose_target(wanted: Format, model: ModelConfig, policy: ExpertPolicy) -> Target:
    """The architecture of an export.

    Args:
        wanted: `auto`, or `qwen2_moe` where the model must fit it.
        model: the recipe's model section.
        policy: default policy of the export.

    Raises:
        ConfigurationError: the model or the policy is none that Qwen2-MoE has; names the first property.
    """
    if wanted == "qwen2_moe":
        for key, value, rule in _departures_from_qwen2_moe(model, policy):
            raise ConfigurationError(key, value, f"{rule}; export without --format qwen2_moe")
        return "qwen2_moe"
    return "llama" if _is_llama(model) else "dsmoe"


def _is_llama(model: ModelConfig) -> bool:
    """Whether transformers' own Llama is this very architecture."""
    plain = not model.has_attention_router and not model.has_mlp_router
    llama_mlp = model.gated_mlp and model.hidden_act == "silu" and model.norm_type == "rmsnorm"
    # LlamaConfig refuses a hidden size that its heads do not divide
    return plain and llama_mlp and model.hidden_size % model.num_attention_heads == 0


def _departures_from_qwen2_moe(model: ModelConfig, policy: ExpertPolicy) -> Iterator[tuple[str, object, str]]:
    """(key, value, rule) of each property that Qwen2-MoE does not have."""
    if model.has_attention_router:
        yield "model.attention_type", model.attention_type, "Qwen2-MoE has plain grouped-query attention (gqa)"
    if not model.has_mlp_router:
        yield "model.num_experts", model.num_experts, "Qwen2-MoE has several experts"
    if not model.gated_mlp:
        yield "model.gated_mlp", model.gated_mlp, "Qwen2-MoE has gated experts"
    if model.hidden_act != "silu":
        yield "model.hidden_act", model.hidden_act, "engines compute Qwen2-MoE with silu"
    if model.router_type != "linear":
        yield "model.router_type", model.router_type, "Qwen2-MoE has linear routers"
    if model.norm_type != "rmsnorm":
        yield "model.norm_type", model.norm_type, "Qwen2-MoE has RMSNorm"
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        yield "model.head_dim", model.head_dim, "engines take hidden_size / num_attention_heads for Qwen2-MoE"
    if policy.expert_policy != "topk":
        yield "expert_policy", policy.expert_policy, "Qwen2-MoE knows only topk (--policy topk --top-k K)"
    if policy.expert_policy_layers is not None:
        yield "expert_policy_layers", policy.expert_policy_layers, "Qwen2-MoE has one K for all layers"


def exported_config(
    model: ModelConfig, policy: ExpertPolicy, tokenizer: Tokenizer, dtype: torch.dtype, target: Target
) -> dict[str, Any]:
    """config.json, checked by the class that will read it."""
    shared = {key: getattr(model, key) for key in SHARED_KEYS}
    shared |= {
        "vocab_size": model.vocab_size,
        "rope_parameters": dataclasses.asdict(model.rope_parameters),
        # documents follow an end-of-document token in training, so it also begins a text
        "bos_token_id": tokenizer.end_of_document_id,
        "eos_token_id": tokenizer.end_of_document_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if tokenizer.padding_id != tokenizer.end_of_document_id:
        # the embedding of this token gets no gradient, so it must be none that is trained: then generation_config.json
        # and the tokenizer alone name it
        shared |= {"pad_token_id": tokenizer.padding_id}
    if target == "llama":
        own: dict[str, Any] = {"intermediate_size": model.intermediate_size}
    elif target == "qwen2_moe":
        own = _qwen2_moe_values(model, policy)
    else:
        own = {key: getattr(model, key) for key in DSMOE_KEYS}
        own |= {TRAINED_K: _trained_experts_per_tok(model)}
        # norm_topk_prob: readers of mixture-of-experts configurations take its absence for true
        own |= {**dataclasses.asdict(policy), "norm_topk_prob": False}
    values = {**shared, **own}
    description = {"architectures": [ARCHITECTURES[target]], **({"auto_map": AUTO_MAP} if target == "dsmoe" else {})}
    return {**_config_class(target)(**values).to_diff_dict(), **values, **description}


def _trained_experts_per_tok(model: ModelConfig) -> int | None:
    return model.num_experts_per_tok if model.expert_training == "sparse" else None


def _qwen2_moe_values(model: ModelConfig, policy: ExpertPolicy) -> dict[str, Any]:
    trained = _trained_experts_per_tok(model)
    return {
        **({} if trained is None else {TRAINED_K: trained}),  # for our own readers; others pass over it
        **QWEN2_MOE_KEYS,
        "num_experts": model.num_experts,
        "num_experts_per_tok": policy.num_experts_per_tok or model.num_experts,
        "moe_intermediate_size": model.moe_intermediate_size,
        "intermediate_size": model.intermediate_size,  # of layers without experts: there are none
    }


def read_exported_config(folder: Path) -> "PreTrainedConfig":
    """config.json of an export, read and checked by the class of its architecture.

    Raises:
        CheckpointError: there is none, or it is of another architecture, or breaks a rule.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        target = values["model_type"]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}: is {folder} an export?") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not the configuration of a model") from None
    if target not in ARCHITECTURES:
        raise CheckpointError(f"{path}: model_type = {target!r}: none of {', '.join(ARCHITECTURES)}")
    try:
        return _config_class(target).from_dict(values)
    except Exception as error:  # transformers checks types by classes of its own
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error


def _config_class(target: Target) -> "type[PreTrainedConfig]":
    if target == "llama":
        from transformers import LlamaConfig

        return LlamaConfig
    if target == "qwen2_moe":
        from transformers import Qwen2MoeConfig

        return Qwen2MoeConfig
    from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig

    return DSMoEConfig


def model_class(config: "PreTrainedConfig") -> Any:
    """The class that computes an export."""
    if config.model_type == "llama":
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM
    if config.model_type == "qwen2_moe":
        from transformers import Qwen2MoeForCausalLM

        return Qwen2MoeForCausalLM
    from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM

    return DSMoEForCausalLM


def expected_shapes(config: "PreTrainedConfig") -> dict[str, Shape]:
    """Names and shapes of all tensors of an export, as its configuration makes them."""
    architecture = config
    if config.model_type != "dsmoe":
        experts = config.model_type == "qwen2_moe"
        architecture = ModelConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            attention_type="gqa",
            num_attention_experts=1,
            num_experts=config.num_experts if experts else 1,
            moe_intermediate_size=config.moe_intermediate_size if experts else config.intermediate_size,
            hidden_act="silu",
            gated_mlp=True,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    return TensorMapping(architecture, config.vocab_size, config.vocab_size, target=config.model_type).exported_shapes()
