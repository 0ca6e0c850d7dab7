"""Export a training checkpoint, of any layout, as a Hugging Face folder.

The folder has safetensors shards, the model's code, the tokenizer, a generation configuration and a model card, so
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` needs nothing of this package. Every tensor of the
checkpoint is used once and every tensor of the export written once, or the export fails and says which.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint, MegatronTensors
from checkpoints_tools.model_card import model_card
from checkpoints_tools.whole_folder import sync, whole_or_nothing, write_text
from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import CheckpointError, ConfigurationError, DSMoEError, exit_with
from dsmoe_megatron.inference.policy import ExpertPolicy, PolicyError
from dsmoe_megatron.inference.tensor_mapping import TensorMapping, TensorRule, check_names
from dsmoe_megatron.run_folder import find_checkpoint, read_progress
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer, save_huggingface

Target = Literal["dsmoe", "llama"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 2_000_000_000
CODE_FILES = ("configuration_dsmoe.py", "modeling_dsmoe.py", "policy.py")
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


def export(
    checkpoint: Path,
    output: Path,
    policy_options: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the Hugging Face folder; it appears whole or not at all.

    Args:
        checkpoint: run folder (its newest checkpoint) or step folder.
        output: folder to make.
        policy_options: fields of ExpertPolicy that replace the recipe's.
        dtype: of the exported tensors; None is the run's precision.
        overwrite: replace an export that is already there.
        max_shard_bytes: largest safetensors file; the memory needed is about one such file, or the largest tensor.

    Returns:
        Number of tensors written.

    Raises:
        DSMoEError: see the message; nothing is left at `output`.
    """
    step_folder = find_checkpoint(checkpoint)
    if step_folder is None:
        raise CheckpointError(f"{checkpoint}: neither a run folder with a checkpoint nor a step folder")
    config, progress = load_config(step_folder / "config.yaml"), read_progress(step_folder)
    if config.data.tokenizer is None:
        raise ConfigurationError("data.tokenizer", None, f"{step_folder / 'config.yaml'} names no tokenizer to export")
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = _vocab_size(config.model, tokenizer)
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    target: Target = "llama" if _is_llama(model) else "dsmoe"
    dtype = dtype or DTYPES[config.train.precision]
    policy = _policy(model, policy_options or {})
    description = exported_config(model, policy, tokenizer, dtype, target)

    source = DistributedCheckpoint(step_folder)
    mapping = TensorMapping(model, vocab_size, model.padded_vocab_size, model.expert_training, target)
    _check_source(source, mapping)
    card = model_card(dataclasses.replace(config, model=model), progress, description)
    with whole_or_nothing(output, overwrite, "config.json", "an export") as folder:
        return write_export(folder, source, mapping, description, tokenizer, card, max_shard_bytes)


def write_export(
    folder: Path,
    source: MegatronTensors,
    mapping: TensorMapping,
    description: dict[str, Any],
    tokenizer: Tokenizer,
    card: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Fill an empty folder with all that an export is made of.

    Args:
        folder: exists.
        source: gives the tensors under Megatron's names, one layer at a time.
        mapping: the model's table.
        description: config.json; its `dtype` is that of the tensors.
        tokenizer: of the model.
        card: README.md.
        max_shard_bytes: largest safetensors file.

    Returns:
        Number of tensors written.
    """
    written = _write_tensors(source, mapping, folder, getattr(torch, description["dtype"]), max_shard_bytes)
    if description["model_type"] == "dsmoe":
        _copy_code(folder)
    save_huggingface(tokenizer, folder)
    write_text(folder / "config.json", json.dumps(description, indent=2, sort_keys=True) + "\n")
    write_text(folder / "generation_config.json", json.dumps(_generation_config(tokenizer), indent=2) + "\n")
    write_text(folder / "README.md", card)
    return written


def _vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> int:
    if model.vocab_size is None:
        return tokenizer.vocab_size
    if tokenizer.vocab_size > model.vocab_size:
        rule = f"is below the {tokenizer.vocab_size} tokens of {tokenizer.spec}: not the tokenizer of this run"
        raise ConfigurationError("model.vocab_size", model.vocab_size, rule)
    return model.vocab_size


def _is_llama(model: ModelConfig) -> bool:
    """Whether transformers' own Llama is this very architecture."""
    plain = not model.has_attention_router and not model.has_mlp_router
    llama_mlp = model.gated_mlp and model.hidden_act == "silu" and model.norm_type == "rmsnorm"
    # LlamaConfig refuses a hidden size that its heads do not divide
    return plain and llama_mlp and model.hidden_size % model.num_attention_heads == 0


def _policy(model: ModelConfig, options: dict[str, Any]) -> ExpertPolicy:
    """The export's default policy: the recipe's, changed by the command line's options."""
    if not model.has_mlp_router and not model.has_attention_router:
        if options:
            raise ConfigurationError(*next(iter(options.items())), "this model has no routers; leave it out")
        return ExpertPolicy()
    recipe = ExpertPolicy.from_config(model)
    if model.expert_training == "sparse":
        if options.get("expert_policy", "topk") != "topk":
            rule = "a sparse-trained model knows only topk"
            raise ConfigurationError("expert_policy", options["expert_policy"], rule)
        recipe = dataclasses.replace(recipe, expert_policy="topk")
    policy = recipe.with_changes(options)
    if policy.expert_policy == "threshold_topk":
        rule = "depends on the batch and is for evaluation only; export dense, topk or threshold"
        raise ConfigurationError("expert_policy", policy.expert_policy, rule)
    try:
        policy.validate(model.num_hidden_layers, model.num_experts, model.num_attention_experts)
    except PolicyError as error:
        raise ConfigurationError(error.key, error.value, error.rule) from None
    return policy


def exported_config(
    model: ModelConfig, policy: ExpertPolicy, tokenizer: Tokenizer, dtype: torch.dtype, target: Target
) -> dict[str, Any]:
    """config.json, checked by the class that will read it.

    Args:
        model: architecture, with the vocabulary's size.
        policy: the default policy.
        tokenizer: its end-of-document token begins and ends texts.
        dtype: of the tensors.
        target: `llama` where transformers' own Llama is the architecture.
    """
    from transformers import LlamaConfig

    from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig

    shared = {key: getattr(model, key) for key in SHARED_KEYS}
    shared |= {
        "vocab_size": model.vocab_size,
        "rope_parameters": dataclasses.asdict(model.rope_parameters),
        # documents follow an end-of-document token in training, so it also begins a text
        "bos_token_id": tokenizer.end_of_document_id,
        "eos_token_id": tokenizer.end_of_document_id,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if target == "llama":
        values = {**shared, "intermediate_size": model.intermediate_size}
        return {**LlamaConfig(**values).to_diff_dict(), **values, "architectures": ["LlamaForCausalLM"]}
    own = {key: getattr(model, key) for key in DSMOE_KEYS}
    # norm_topk_prob: readers of mixture-of-experts configurations take its absence for true
    values = {**shared, **own, **dataclasses.asdict(policy), "norm_topk_prob": False}
    description = {"architectures": ["DSMoEForCausalLM"], "auto_map": AUTO_MAP}
    return {**DSMoEConfig(**values).to_diff_dict(), **values, **description}


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.end_of_document_id
    # a batch is padded with it; the model's own configuration has no padding token, which would freeze an embedding
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def _check_source(source: DistributedCheckpoint, mapping: TensorMapping) -> None:
    """Before anything is read: every model tensor is in the mapping, with the mapping's shape, and no other."""
    found = {name: shape for name, shape in source.tensor_shapes.items() if not name.startswith("optimizer.")}
    expected = mapping.megatron_shapes()
    check_names(found, expected, str(source.folder))
    for name, shape in found.items():
        if shape != expected[name]:
            rule = f"but its configuration makes it {expected[name]}"
            raise CheckpointError(f"{source.folder}: {name} has shape {shape}, {rule}")
    # megatron-core's parallel layers save an object of their own (Transformer Engine's FP8 scales), without weights
    unknown = [n for n in source.object_names if not n.startswith("optimizer.") and "._extra_state" not in n]
    if unknown:
        raise CheckpointError(f"{source.folder} has unknown {', '.join(sorted(unknown))}: not a model's checkpoint")


def _write_tensors(
    source: MegatronTensors, mapping: TensorMapping, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> int:
    """Shard by shard: read, convert, write, forget. Returns the number of tensors."""
    shards = list(_plan_shards(mapping, dtype.itemsize, max_shard_bytes))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file_name = several if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, Tensor] = {}
        for rule, layer in shard:
            exported = rule.to_exported(source.read(rule.megatron, layer), layer)
            # copies: parts of one source share its memory, which safetensors refuses
            tensors |= {name: tensor.to(dtype, copy=True) for name, tensor in exported.items()}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        # safetensors lets nobody but the owner read it; the folder's mode carries the user's umask
        (folder / file_name).chmod(folder.stat().st_mode & 0o666)
        sync(folder / file_name)
        weight_map |= dict.fromkeys(tensors, file_name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    check_names(weight_map, mapping.exported_shapes(), str(folder))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return len(weight_map)


def _plan_shards(
    mapping: TensorMapping, bytes_per_element: int, max_shard_bytes: int
) -> Iterator[list[tuple[TensorRule, int | None]]]:
    """Rules in the model's order, as many per shard as fit; what comes of one source tensor stays together."""
    shard: list[tuple[TensorRule, int | None]] = []
    size = 0
    for rule, layer in mapping:
        shapes = rule.exported_shapes(layer).values()
        added = bytes_per_element * sum(torch.Size(shape).numel() for shape in shapes)
        if shard and size + added > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((rule, layer))
        size += added
    yield shard


def _copy_code(folder: Path) -> None:
    import dsmoe_megatron.inference

    code = Path(dsmoe_megatron.inference.__file__).parent
    for name in CODE_FILES:
        write_text(folder / name, (code / name).read_text(encoding="utf-8"))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="export_hf", description="Export a training checkpoint to Hugging Face.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder (its newest checkpoint) or step")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    policy = parser.add_argument_group("default policy of the export (the recipe's where not given)")
    policy.add_argument("--policy", dest="expert_policy", choices=("dense", "topk", "threshold"))
    policy.add_argument("--top-k", dest="num_experts_per_tok", type=int, metavar="K", help="active MLP experts")
    policy.add_argument(
        "--attention-top-k", dest="attention_experts_per_tok", type=int, metavar="K", help="active attention experts"
    )
    policy.add_argument(
        "--threshold",
        dest="expert_threshold",
        type=float,
        metavar="EPS",
        help="an expert is active where (number of experts) x (its probability) is above it",
    )
    policy.add_argument(
        "--attention-threshold", dest="attention_expert_threshold", type=float, metavar="EPS", help="of the attention"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the tensors; default: the run's precision")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is already there")
    return parser


def main() -> None:
    arguments = vars(build_parser().parse_args())
    names = {field.name for field in dataclasses.fields(ExpertPolicy)}
    options = {name: value for name, value in arguments.items() if name in names and value is not None}
    dtype = DTYPES[arguments["dtype"]] if arguments["dtype"] else None
    try:
        written = export(arguments["checkpoint"], arguments["output"], options, dtype, arguments["overwrite"])
    except DSMoEError as error:
        exit_with(error, "export_hf")
    print(f"{arguments['output']}: {written} tensors, whole", file=sys.stderr)


if __name__ == "__main__":
    main()
