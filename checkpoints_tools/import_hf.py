"""Import an exported model (or a dense Llama) as a checkpoint that training starts from, under any layout.

The folder made is a step folder of step 0 with weights alone: `checkpoint.load` starts a run from it with a fresh
optimizer, and export_hf.py turns it back into the export, bit for bit.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoints_tools.checkpoint_writing import write_checkpoint
from checkpoints_tools.export_hf import DTYPES
from checkpoints_tools.hf_architecture import (
    REQUIRED_KEYS,
    check_model,
    matching_vocabulary,
    model_section,
    read_config_json,
)
from checkpoints_tools.safetensors_folder import AsMegatron, SafetensorsFolder
from checkpoints_tools.whole_folder import whole_folder, write_text
from dsmoe_megatron.checkpoint_manifest import entries_of, write_manifest
from dsmoe_megatron.config import Config, ModelConfig
from dsmoe_megatron.config_parsing import parse_config, save_config
from dsmoe_megatron.durable import sync
from dsmoe_megatron.errors import CheckpointError, ConfigurationError, DSMoEError, exit_with
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from dsmoe_megatron.recipe_text import recipe_text
from dsmoe_megatron.run_folder import Progress
from dsmoe_megatron.tokenizers import load_tokenizer

# a recipe may bring other values of these, which shape no weight and change no output
OPEN_KEYS = {"attention_dropout", "initializer_range", "max_position_embeddings"}
FIXED_KEYS = [key for key in REQUIRED_KEYS if key not in OPEN_KEYS]


def import_model(model: Path, output: Path, recipes: Sequence[Path] = (), overwrite: bool = False) -> int:
    """Write the step folder; it appears whole or not at all.

    Args:
        model: Hugging Face folder with safetensors: an export, or a Llama.
        output: step folder to make.
        recipes: files whose keys go into its config.yaml; what config.json says of the model they cannot change.
        overwrite: replace a step folder that is already there.

    Returns:
        Number of global tensors written. The memory needed is that of one layer and of what is in no layer.

    Raises:
        DSMoEError: see the message; nothing is left at `output`.
    """
    content = read_config_json(model)
    section, target = model_section(content, str(model / "config.json"))
    tensors = SafetensorsFolder(model)
    dtype = _dtype(tensors, content, model)
    config = _recipe(model, section, dtype, recipes)
    tokenizer = load_tokenizer(str(config.data.tokenizer))
    vocab_size = matching_vocabulary(section, tokenizer, str(model / "config.json"))

    padded_size = config.model.padded_vocab_size
    mapping = TensorMapping(config.model, vocab_size, padded_size, config.model.expert_training, target)
    source = AsMegatron(tensors, mapping, str(model))
    with whole_folder(output, overwrite, "a step folder", "progress.json") as folder:
        with tqdm(total=len(list(mapping)), unit="tensor", disable=None, leave=False) as bar:
            written = write_checkpoint(folder, source, mapping, dtype, lambda: bar.update())
        save_config(config, folder / "config.yaml")
        write_text(folder / "progress.json", json.dumps(dataclasses.asdict(Progress()), indent=2))
        sync(folder / "config.yaml")
        write_manifest(folder, entries_of(folder))
    if content.get("expert_policy_layers") is not None:
        print("import_hf: expert_policy_layers is no key of a recipe and is left out", file=sys.stderr)
    return written


def _dtype(tensors: SafetensorsFolder, content: Mapping[str, Any], model: Path) -> torch.dtype:
    """The one dtype of all tensors, which config.json must not deny."""
    found = set(tensors.tensor_dtypes.values())
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    if len(found) != 1 or not found <= set(DTYPES.values()):
        rule = "all must be float32 or all bfloat16: convert the model first"
        raise CheckpointError(f"{model}: the dtypes of its tensors are {names or 'none'}; {rule}")
    said = content.get("dtype", content.get("torch_dtype"))
    if said not in (None, names):
        raise CheckpointError(f"{model / 'config.json'}: dtype = {said!r}, but the tensors are {names}")
    return found.pop()


def _recipe(model: Path, section: ModelConfig, dtype: torch.dtype, recipes: Sequence[Path]) -> Config:
    """What the model says of itself, and the recipes over it.

    Raises:
        ConfigurationError: a recipe is wrong, or denies what config.json says of the model.
    """
    own: dict[str, Any] = {
        "model": dataclasses.asdict(section),
        "data": {"tokenizer": str(model.absolute())},
        "train": {"precision": next(name for name, value in DTYPES.items() if value is dtype)},
    }
    with tempfile.TemporaryDirectory() as scratch:
        lowest = Path(scratch) / "config.yaml"
        lowest.write_text(recipe_text(own), encoding="utf-8")
        config = parse_config([f"--config={path}" for path in (lowest, *recipes)], "import_hf")
    config.train.precision = own["train"]["precision"]  # it describes this folder; a run's own is its own
    wanted = dataclasses.asdict(config.model)
    for key in FIXED_KEYS:
        if wanted[key] != own["model"][key]:
            rule = f"{model / 'config.json'} makes it {own['model'][key]!r}; leave it out of the recipe"
            raise ConfigurationError(f"model.{key}", wanted[key], rule)
    check_model(config.model)
    return config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="import_hf", description="Import a Hugging Face model to train from.")
    parser.add_argument("--model", type=Path, required=True, help="folder of an export or of a Llama (safetensors)")
    parser.add_argument("--output", type=Path, required=True, help="step folder to make, for checkpoint.load")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="RECIPE",
        help="recipe with what an export does not tell, such as alphas; may be repeated",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a step folder that is already there")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        written = import_model(arguments.model, arguments.output, arguments.config, arguments.overwrite)
    except DSMoEError as error:
        exit_with(error, "import_hf")
    print(f"{arguments.output}: {written} tensors, whole", file=sys.stderr)


if __name__ == "__main__":
    main()
