"""A trained model in memory, from a training checkpoint of any layout or from an export."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaForCausalLM

from checkpoints_tools.distributed_checkpoint import OPTIMIZER, DistributedCheckpoint, check_files
from checkpoints_tools.hf_architecture import model_section, sparse_training
from checkpoints_tools.safetensors_folder import AsMegatron, SafetensorsFolder
from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import CheckpointError, ConfigurationError, first_line
from dsmoe_megatron.evaluation.policies import check_policy
from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.inference.policy import ExpertPolicy
from dsmoe_megatron.inference.tensor_mapping import TensorMapping, check_names
from dsmoe_megatron.run_folder import find_checkpoint, read_progress
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODEL_KEYS = {field.name for field in dataclasses.fields(ModelConfig)} - {"rope_parameters"}
# what a Llama is in a recipe's words; its MLP is one gated expert
LLAMA_ARCHITECTURE = {
    "attention_type": "gqa",
    "num_attention_experts": 1,
    "num_experts": 1,
    "gated_mlp": True,
    "hidden_act": "silu",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be evaluated.

    Attributes:
        model: in evaluation mode, on its device.
        architecture: as a recipe's model section.
        tokenizer_spec: where its tokenizer is.
        fingerprint_counts: whether datasets must have been made with that very tokenizer; an export has another form
            of it, so that only vocabulary sizes can be compared.
        reference_policy: as it was trained: dense, or the sparse-trained baseline's own top-k.
        default_policy: that the recipe or the export names.
        sequence_length: that it was trained with, or is meant for [tokens].
        separate_documents: whether it was trained to see only the document at hand.
        step: of the checkpoint; None for an export.
    """

    model: Any
    architecture: ModelConfig
    tokenizer_spec: str
    fingerprint_counts: bool
    reference_policy: ExpertPolicy
    default_policy: ExpertPolicy
    sequence_length: int
    separate_documents: bool = False
    step: int | None = None

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        Raises:
            TokenizerError: it cannot be loaded.
        """
        return load_tokenizer(self.tokenizer_spec)

    def set_policy(self, policy: ExpertPolicy) -> None:
        """Choose experts by this policy from now on. What it leaves open is all, not what was set before."""
        model = self.architecture
        if not (model.has_mlp_router or model.has_attention_router):
            return
        values = {name: value for name, value in dataclasses.asdict(policy).items() if value is not None}
        if policy.expert_policy == "topk" and policy.expert_policy_layers is None:
            everything = {
                "num_experts_per_tok": model.num_experts,
                "attention_experts_per_tok": model.num_attention_experts,
            }
            values = everything | values
        self.model.set_policy(**values)


def load_model(checkpoint: Path, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load whatever the path names.

    Args:
        checkpoint: run folder (its newest checkpoint), step folder, or export.
        dtype: of the weights; None is the run's precision or the export's.

    Raises:
        DSMoEError: there is nothing to load, or it is damaged or contradicts itself.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (checkpoint / "config.json").is_file():
        loaded = _load_export(checkpoint, dtype)
    elif (step_folder := find_checkpoint(checkpoint)) is not None:
        loaded = _load_step(step_folder, dtype)
    else:
        rule = "neither a run folder with a checkpoint, nor a step folder, nor an export"
        raise CheckpointError(f"{checkpoint}: {rule}")
    _check_finite(loaded.model.state_dict(), checkpoint)
    loaded.model.to(device).eval()
    return loaded


def _load_step(step_folder: Path, dtype: torch.dtype | None) -> LoadedModel:
    check_files(step_folder)
    recipe, progress = load_config(step_folder / "config.yaml"), read_progress(step_folder)
    if recipe.data.tokenizer is None:
        raise ConfigurationError("data.tokenizer", None, f"{step_folder / 'config.yaml'} names no tokenizer")
    architecture = recipe.model
    if architecture.vocab_size is None:
        raise ConfigurationError("model.vocab_size", None, f"{step_folder / 'config.yaml'} is not a resolved recipe")
    tensors = _read_tensors(step_folder, architecture, architecture.vocab_size)
    has_routers = architecture.has_mlp_router or architecture.has_attention_router
    reference = default = _reference_policy(architecture)
    if reference.expert_policy == "dense" and has_routers:
        default = ExpertPolicy.from_config(architecture)
    check_policy(default, architecture)
    return LoadedModel(
        _model_of(architecture, tensors, dtype or DTYPES[recipe.train.precision]),
        architecture,
        recipe.data.tokenizer,
        fingerprint_counts=True,
        reference_policy=reference,
        default_policy=default,
        sequence_length=recipe.train.sequence_length,
        separate_documents=recipe.data.separate_documents,
        step=progress.step,
    )


def _reference_policy(architecture: ModelConfig) -> ExpertPolicy:
    """As the model was trained."""
    if architecture.expert_training == "sparse":
        return ExpertPolicy("topk", num_experts_per_tok=architecture.num_experts_per_tok)
    return ExpertPolicy()


def _read_tensors(step_folder: Path, architecture: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """The weights under their exported names; every tensor of the model is used once."""
    source = DistributedCheckpoint(step_folder)
    mapping = TensorMapping(
        architecture, vocab_size, architecture.padded_vocab_size, expert_training=architecture.expert_training
    )
    found = [name for name in source.tensor_shapes if not name.startswith(OPTIMIZER)]
    check_names(dict.fromkeys(found), mapping.megatron_shapes(), str(step_folder))
    return _as_exported(source, mapping)


def _as_exported(source: DistributedCheckpoint | AsMegatron, mapping: TensorMapping) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for rule, layer in mapping:
        tensors |= rule.to_exported(source.read(rule.megatron, layer), layer)
    return tensors


def _model_of(
    architecture: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype, eos_token_id: int | None = None
) -> DSMoEForCausalLM:
    """A model of ours with these tensors, which have their exported names."""
    shared = {name: getattr(architecture, name) for name in MODEL_KEYS if hasattr(DSMoEConfig, name)}
    rope = dataclasses.asdict(architecture.rope_parameters)
    config = DSMoEConfig(**shared, rope_parameters=rope, eos_token_id=eos_token_id)
    return DSMoEForCausalLM.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def _load_export(folder: Path, dtype: torch.dtype | None) -> LoadedModel:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: not the configuration of an export ({error})") from None
    default = ExpertPolicy()
    if model_type == "qwen2_moe":
        model, architecture = _read_qwen2_moe(folder, values, dtype)
        default = ExpertPolicy("topk", num_experts_per_tok=values["num_experts_per_tok"])
    elif model_type in (classes := {"dsmoe": DSMoEForCausalLM, "llama": LlamaForCausalLM}):
        model = _read_export(folder, classes[model_type], dtype)
        architecture = dataclasses.replace(_architecture_of(model.config), **sparse_training(values))
        if model_type == "dsmoe":
            default = ExpertPolicy.from_config(model.config)
    else:
        rule = f"model_type {model_type!r} is not one of dsmoe, llama, qwen2_moe, which are read here"
        raise CheckpointError(f"{folder / 'config.json'}: {rule}")
    return LoadedModel(
        model,
        architecture,
        str(folder),
        fingerprint_counts=False,
        reference_policy=_reference_policy(architecture),
        default_policy=default,
        sequence_length=architecture.max_position_embeddings,
    )


def _read_qwen2_moe(folder: Path, values: dict[str, Any], dtype: torch.dtype | None) -> tuple[Any, ModelConfig]:
    """As a model of ours, so that it can be evaluated under every policy."""
    architecture, target = model_section(values, str(folder / "config.json"))
    vocab_size = values["vocab_size"]
    source = SafetensorsFolder(folder)
    megatron = AsMegatron(source, TensorMapping(architecture, vocab_size, vocab_size, target=target), str(folder))
    tensors = _as_exported(megatron, TensorMapping(architecture, vocab_size, vocab_size))
    dtype = dtype or next(iter(source.tensor_dtypes.values()))
    return _model_of(architecture, tensors, dtype, values.get("eos_token_id")), architecture


def _read_export(folder: Path, model_class: Any, dtype: torch.dtype | None) -> Any:
    """Only safetensors are read, and every tensor must be there, once, with the shape of the configuration."""
    try:
        model, report = model_class.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, by name
        )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{folder}: cannot be loaded: {reason}") from None
    faults = {
        "lacks": report["missing_keys"],
        "has unknown": report["unexpected_keys"],
        "has misshapen": [entry[0] for entry in report["mismatched_keys"]],
    }
    if any(faults.values()):
        text = " and ".join(f"{word} {', '.join(sorted(names))}" for word, names in faults.items() if names)
        raise CheckpointError(f"{folder}: {text}: its tensors are not those of its config.json")
    return model


def _architecture_of(config: Any) -> ModelConfig:
    values = {name: getattr(config, name) for name in MODEL_KEYS if getattr(config, name, None) is not None}
    if config.model_type == "llama":
        values |= LLAMA_ARCHITECTURE | {"moe_intermediate_size": config.intermediate_size}
    return ModelConfig(**values)


def _check_finite(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    damaged = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if damaged:
        raise CheckpointError(f"{checkpoint}: {', '.join(damaged)} has values that are not finite")
