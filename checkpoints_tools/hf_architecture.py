"""config.json of a Hugging Face model -> the recipe's model section, or one line that says why there is none.

Known are our own exports (`dsmoe`, and `qwen2_moe` as export_hf writes it), and dense decoders with RMSNorm, rotary
embeddings and a gated MLP (`llama`, and `mistral` without its sliding window), which are this system's dense baseline.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from checkpoints_tools.export_formats import DSMOE_KEYS, QWEN2_MOE_KEYS, SHARED_KEYS, TRAINED_K
from dsmoe_megatron.config import Config, ModelConfig, RopeParameters, TrainConfig
from dsmoe_megatron.config_parsing import check_values
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import CheckpointError, ConfigurationError
from dsmoe_megatron.inference.policy import ExpertPolicy
from dsmoe_megatron.inference.tensor_mapping import Target
from dsmoe_megatron.tokenizers import Tokenizer

REQUIRED_KEYS = (*SHARED_KEYS, *DSMOE_KEYS, "vocab_size", "rope_parameters")


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        CheckpointError: it is missing or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not an object of keys and values")
    return content


def model_section(content: Mapping[str, Any], where: str) -> tuple[ModelConfig, Target]:
    """The model section of a config.json, and which names its tensors have.

    Args:
        content: of config.json.
        where: what messages call it.

    Raises:
        CheckpointError: another architecture, a missing or impossible value, or a part that cannot be carried.
    """
    from transformers import LlamaConfig, MistralConfig

    family = content.get("model_type")
    if family == "dsmoe":
        return _of_export(content, where), "dsmoe"
    if family == "qwen2_moe":
        return _of_qwen2_moe(content, where), "qwen2_moe"
    if family not in ("llama", "mistral"):
        _refuse(where, "model_type", family, "only dsmoe, qwen2_moe, llama and mistral are known")
    config = _parse(LlamaConfig if family == "llama" else MistralConfig, content, where)
    return dense_model_section(config, where), "llama"


def check_model(model: ModelConfig) -> None:
    """The rules of a recipe's model section, whatever the layout and the sequence length.

    Raises:
        ConfigurationError: the first rule that is broken.
    """
    check_config(Config(model=model, train=TrainConfig(sequence_length=1)), world_size=1)


def matching_vocabulary(model: ModelConfig, tokenizer: Tokenizer, where: str) -> int:
    """The vocabulary's size, which training takes from the tokenizer.

    Raises:
        CheckpointError: the model has another.
    """
    if model.vocab_size != tokenizer.vocab_size:
        rule = f"the tokenizer {tokenizer.spec} has {tokenizer.vocab_size} tokens; save the model after transformers'"
        rule += f" resize_token_embeddings({tokenizer.vocab_size}), or name its own tokenizer"
        _refuse(where, "vocab_size", model.vocab_size, rule)
    return tokenizer.vocab_size


def _of_export(content: Mapping[str, Any], where: str) -> ModelConfig:
    from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig

    missing = [key for key in REQUIRED_KEYS if key not in content]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    config = _parse(DSMoEConfig, content, where)
    values = {key: getattr(config, key) for key in (*SHARED_KEYS, *DSMOE_KEYS, "vocab_size")}
    policy = {field.name: getattr(config, field.name) for field in dataclasses.fields(ExpertPolicy)}
    policy.pop("expert_policy_layers")  # no key of a recipe
    if policy["num_experts_per_tok"] is None:
        policy["num_experts_per_tok"] = config.num_experts  # what null means there
    if policy["expert_threshold"] is None:
        policy.pop("expert_threshold")  # the policy does not use it
    policy |= sparse_training(content)
    return _checked(ModelConfig(**values, **policy, rope_parameters=_rope(config, where)), where)


def _of_qwen2_moe(content: Mapping[str, Any], where: str) -> ModelConfig:
    """An export in that form; models of Qwen's have parts that this system has not."""
    from transformers import Qwen2MoeConfig

    config = _parse(Qwen2MoeConfig, content, where)
    for key, ours in {**QWEN2_MOE_KEYS, "hidden_act": "silu"}.items():
        if getattr(config, key) != ours:
            _refuse(where, key, getattr(config, key), f"must be {ours!r}, as exports have it: there is nothing like it")
    values = {key: getattr(config, key) for key in SHARED_KEYS if key != "head_dim"}
    model = ModelConfig(
        **values,
        vocab_size=config.vocab_size,
        rope_parameters=_rope(config, where),
        head_dim=config.hidden_size // config.num_attention_heads,
        attention_type="gqa",
        num_attention_experts=1,
        num_experts=config.num_experts,
        moe_intermediate_size=config.moe_intermediate_size,
        gated_mlp=True,
        expert_policy="topk",
        **{"num_experts_per_tok": config.num_experts_per_tok, **sparse_training(content)},
    )
    return _checked(model, where)


def sparse_training(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of a model that was trained sparsely, as its export tells; nothing of others."""
    trained = content.get(TRAINED_K)
    return {} if trained is None else {"expert_training": "sparse", "num_experts_per_tok": trained}


def dense_model_section(config: Any, where: str) -> ModelConfig:
    """The dense baseline that a transformers configuration of the Llama family describes.

    Args:
        config: LlamaConfig, or MistralConfig.
        where: what messages call it.

    Raises:
        CheckpointError: a part that cannot be carried.
    """
    if config.model_type not in ("llama", "mistral"):
        _refuse(where, "model_type", config.model_type, "only llama and mistral are known")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        _refuse(where, "sliding_window", window, "attention here sees the whole sequence")
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            _refuse(where, key, True, "linear layers here have no biases, so these cannot be carried")
    if getattr(config, "quantization_config", None) is not None:
        rule = "the weights are quantized; save the model dequantized first"
        _refuse(where, "quantization_config", config.quantization_config, rule)
    if config.hidden_act not in ("silu", "gelu"):
        _refuse(where, "hidden_act", config.hidden_act, "only silu and gelu are known")
    values = {key: getattr(config, key) for key in (*SHARED_KEYS, "vocab_size")}
    model = ModelConfig(
        **values,
        rope_parameters=_rope(config, where),
        attention_type="gqa",
        num_attention_experts=1,
        num_experts=1,
        moe_intermediate_size=config.intermediate_size,
        gated_mlp=True,
        num_experts_per_tok=1,
        expert_policy="dense",
    )
    return _checked(model, where)


def _parse(config_class: Any, content: Mapping[str, Any], where: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(copy.deepcopy(dict(content)))  # it changes what it is given
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{where}: {lines[-1].strip()}") from None


def _rope(config: Any, where: str) -> RopeParameters:
    values = dict(config.rope_parameters or {})
    kind, theta = values.pop("rope_type", "default"), values.pop("rope_theta", None)
    if kind != "default":
        _refuse(
            where, "rope_parameters.rope_type", kind, "only unscaled rotary embeddings (default) can be trained here"
        )
    turned = values.pop("partial_rotary_factor", None)
    if turned not in (None, 1.0):
        _refuse(where, "rope_parameters.partial_rotary_factor", turned, "whole heads are turned here")
    if values:
        _refuse(where, "rope_parameters", values, "only rope_type default with rope_theta is known")
    if not isinstance(theta, int | float):
        _refuse(where, "rope_parameters.rope_theta", theta, "must be a number")
    return RopeParameters(rope_theta=float(theta))


def _checked(model: ModelConfig, where: str) -> ModelConfig:
    try:
        check_values(dataclasses.asdict(model), ModelConfig, "model")
        check_model(model)
    except ConfigurationError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return model


def _refuse(where: str, key: str, value: object, rule: str) -> NoReturn:
    raise CheckpointError(f"{where}: {key} = {value!r}: {rule}")
