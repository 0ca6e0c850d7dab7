"""Export a training checkpoint, of any layout, as a Hugging Face folder.

The folder has safetensors shards, the model's code, the tokenizer, a generation configuration and a model card, so
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` needs nothing of this package. Every tensor of the
checkpoint is used once and every tensor of the export written once, or the export fails and says which. Memory is for
a tensor of one layer or the embedding, whatever the model's size.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.distributed_checkpoint import OPTIMIZER, DistributedCheckpoint, MegatronTensors, check_files
from checkpoints_tools.export_formats import Format, choose_target, exported_config
from checkpoints_tools.model_card import model_card
from checkpoints_tools.streamed_safetensors import StreamedFile
from checkpoints_tools.whole_folder import whole_folder, write_text
from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.durable import sync
from dsmoe_megatron.errors import CheckpointError, ConfigurationError, DSMoEError, exit_with
from dsmoe_megatron.evaluation.policies import policy_values, read_policy_file
from dsmoe_megatron.inference.policy import ExpertPolicy, PolicyError
from dsmoe_megatron.inference.tensor_mapping import TensorMapping, check_names
from dsmoe_megatron.inference.tensor_rules import Shape, TensorRule
from dsmoe_megatron.run_folder import find_checkpoint, read_progress
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer, save_huggingface

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 2_000_000_000
REUSED_BYTES = 64 << 20  # twice: memory for tensors up to this size
CODE_FILES = ("configuration_dsmoe.py", "expert_products.py", "modeling_dsmoe.py", "policy.py", "routed_layers.py")


def export(
    checkpoint: Path,
    output: Path,
    policy_options: Mapping[str, Any] | ExpertPolicy | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    wanted_format: Format = "auto",
) -> int:
    """Write the Hugging Face folder; it appears whole or not at all.

    Args:
        checkpoint: run folder (its newest checkpoint) or step folder.
        output: folder to make.
        policy_options: the default policy, or fields of it that replace the recipe's.
        dtype: of the exported tensors; None is the run's precision.
        overwrite: replace an export that is already there.
        max_shard_bytes: largest safetensors file, unless one tensor is larger.
        wanted_format: `auto`, or `qwen2_moe` where the model must fit that architecture.

    Returns:
        Number of tensors written.

    Raises:
        DSMoEError: see the message; nothing is left at `output`.
    """
    step_folder = find_checkpoint(checkpoint)
    if step_folder is None:
        raise CheckpointError(f"{checkpoint}: neither a run folder with a checkpoint nor a step folder")
    check_files(step_folder)
    config, progress = load_config(step_folder / "config.yaml"), read_progress(step_folder)
    if config.data.tokenizer is None:
        raise ConfigurationError("data.tokenizer", None, f"{step_folder / 'config.yaml'} names no tokenizer to export")
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = _vocab_size(config.model, tokenizer)
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    policy = _policy(model, policy_options or {})
    target = choose_target(wanted_format, model, policy)
    dtype = dtype or DTYPES[config.train.precision]
    description = exported_config(model, policy, tokenizer, dtype, target)

    source = DistributedCheckpoint(step_folder)
    mapping = TensorMapping(model, vocab_size, model.padded_vocab_size, model.expert_training, target)
    _check_source(source, mapping)
    card = model_card(dataclasses.replace(config, model=model), progress, description)
    with whole_folder(output, overwrite) as folder:
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
    for file in folder.iterdir():
        sync(file)
    return written


def _vocab_size(model: ModelConfig, tokenizer: Tokenizer) -> int:
    if model.vocab_size is None:
        return tokenizer.vocab_size
    if tokenizer.vocab_size > model.vocab_size:
        rule = f"is below the {tokenizer.vocab_size} tokens of {tokenizer.spec}: not the tokenizer of this run"
        raise ConfigurationError("model.vocab_size", model.vocab_size, rule)
    return model.vocab_size


def _policy(model: ModelConfig, options: Mapping[str, Any] | ExpertPolicy) -> ExpertPolicy:
    """The export's default policy: the recipe's, changed by the command line's options, or a whole one."""
    if not model.has_mlp_router and not model.has_attention_router:
        if options:
            given = policy_values(options) if isinstance(options, ExpertPolicy) else options
            raise ConfigurationError(*next(iter(given.items())), "this model has no routers; leave it out")
        return ExpertPolicy()
    is_sparse = model.expert_training == "sparse"
    if isinstance(options, ExpertPolicy):
        policy = options
    else:
        recipe = ExpertPolicy.from_config(model)
        policy = dataclasses.replace(recipe, expert_policy="topk") if is_sparse else recipe
        policy = policy.with_changes(options)
    if is_sparse and policy.expert_policy != "topk":
        raise ConfigurationError("expert_policy", policy.expert_policy, "a sparse-trained model knows only topk")
    if policy.expert_policy == "threshold_topk":
        rule = "depends on the batch and is for evaluation only; export dense, topk or threshold"
        raise ConfigurationError("expert_policy", policy.expert_policy, rule)
    try:
        policy.validate(model.num_hidden_layers, model.num_experts, model.num_attention_experts)
    except PolicyError as error:
        raise ConfigurationError(error.key, error.value, error.rule) from None
    return policy


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.end_of_document_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": tokenizer.padding_id}


def _check_source(source: DistributedCheckpoint, mapping: TensorMapping) -> None:
    """Before anything is read: every model tensor is in the mapping, with the mapping's shape, and no other."""
    found = {name: shape for name, shape in source.tensor_shapes.items() if not name.startswith(OPTIMIZER)}
    expected = mapping.megatron_shapes()
    check_names(found, expected, str(source.folder))
    for name, shape in found.items():
        if shape != expected[name]:
            rule = f"but its configuration makes it {expected[name]}"
            raise CheckpointError(f"{source.folder}: {name} has shape {shape}, {rule}")
    # megatron-core's parallel layers save an object of their own (Transformer Engine's FP8 scales), without weights
    unknown = [n for n in source.object_names if not n.startswith(OPTIMIZER) and "._extra_state" not in n]
    if unknown:
        raise CheckpointError(f"{source.folder} has unknown {', '.join(sorted(unknown))}: not a model's checkpoint")


@dataclass(frozen=True)
class Shard:
    """What one safetensors file is made of.

    Args:
        sources: rules, each with its layer; what comes of one Megatron tensor stays together.
        shapes: of the exported tensors, in the same order.
    """

    sources: list[tuple[TensorRule, int | None]] = dataclasses.field(default_factory=list)
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)

    def nbytes(self, dtype: torch.dtype) -> int:
        return dtype.itemsize * sum(torch.Size(shape).numel() for shape in self.shapes.values())


def _write_tensors(
    source: MegatronTensors, mapping: TensorMapping, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> int:
    """Tensor by tensor: read, convert, write, forget. Returns the number of tensors."""
    shards = list(_plan_shards(mapping, dtype, max_shard_bytes))
    all_exported = _read_ahead(source, [each for shard in shards for each in shard.sources], dtype)
    total_bytes = sum(shard.nbytes(dtype) for shard in shards)
    weight_map: dict[str, str] = {}
    # no bar where nobody watches it
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="export", disable=not sys.stderr.isatty()) as bar:
        for number, shard in enumerate(shards, start=1):
            several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file_name = several if len(shards) > 1 else "model.safetensors"
            with StreamedFile(folder / file_name, shard.shapes, dtype) as file:
                for exported in itertools.islice(all_exported, len(shard.sources)):
                    for name, tensor in exported.items():
                        file.add(name, tensor)
                        bar.update(tensor.nbytes)
            weight_map |= dict.fromkeys(shard.shapes, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return len(weight_map)


def _read_ahead(
    source: MegatronTensors, sources: Sequence[tuple[TensorRule, int | None]], dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """The exported tensors of each source, valid until the next; a thread reads these while the last are written."""
    memories = itertools.cycle([torch.empty(REUSED_BYTES, dtype=torch.uint8) for _ in range(2)])

    def read(rule: TensorRule, layer: int | None) -> dict[str, Tensor]:
        tensor = source.read(rule.megatron, layer, dtype, memory=next(memories))
        return dict(zip(rule.exported_shapes(layer), rule.forward(tensor), strict=True))

    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(read, *sources[0])
        for rule, layer in sources[1:]:
            exported, ahead = ahead.result(), thread.submit(read, rule, layer)
            yield exported
        yield ahead.result()


def _plan_shards(mapping: TensorMapping, dtype: torch.dtype, max_shard_bytes: int) -> Iterator[Shard]:
    """Rules in the model's order, as many per shard as fit."""
    shard, size = Shard(), 0
    for rule, layer in mapping:
        added = Shard([(rule, layer)], rule.exported_shapes(layer))
        if shard.sources and size + added.nbytes(dtype) > max_shard_bytes:
            yield shard
            shard, size = Shard(), 0
        shard.sources.extend(added.sources)
        shard.shapes.update(added.shapes)
        size += added.nbytes(dtype)
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
    policy.add_argument(
        "--policy-file", type=Path, metavar="FILE", help="the whole policy, as `evaluate --calibrate` saves it"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the tensors; default: the run's precision")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        default="auto",
        help="auto: this package's own, or Llama for a dense baseline that is one; qwen2_moe: for engines that know it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is already there")
    return parser


def main() -> None:
    arguments = vars(build_parser().parse_args())
    names = {field.name for field in dataclasses.fields(ExpertPolicy)}
    given = {name: value for name, value in arguments.items() if name in names and value is not None}
    options: dict[str, Any] | ExpertPolicy = given
    dtype = DTYPES[arguments["dtype"]] if arguments["dtype"] else None
    try:
        if arguments["policy_file"] is not None:
            if given:
                rule = "names the whole policy; leave the other policy options out"
                raise ConfigurationError("--policy-file", str(arguments["policy_file"]), rule)
            options = read_policy_file(arguments["policy_file"])
        written = export(
            arguments["checkpoint"],
            arguments["output"],
            options,
            dtype,
            arguments["overwrite"],
            wanted_format=arguments["format"],
        )
    except DSMoEError as error:
        exit_with(error, "export_hf")
    print(f"{arguments['output']}: {written} tensors, whole", file=sys.stderr)


if __name__ == "__main__":
    main()
