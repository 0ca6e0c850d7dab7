"""Whether an export is whole, from its files alone: configuration, index, and every tensor that it must have.

Each fault is one line: the file, the tensor, what is wrong. Nothing is computed with the model.
"""

import json
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoints_tools.export_formats import expected_shapes, read_exported_config
from dsmoe_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODE_KEY = "auto_map"


def find_faults(folder: Path) -> Iterator[str]:
    """All faults of an export, one line each; none where it is whole."""
    try:
        config = read_exported_config(folder)
        places = yield from _index_faults(folder)
        yield from _code_faults(folder, config)
        yield from _tokenizer_faults(folder)
        yield from _tensor_faults(folder, config, places)
    except CheckpointError as error:
        yield str(error)
    except OSError as error:
        yield f"{error.filename or folder}: {error.strerror or error}"


def _index_faults(folder: Path) -> Generator[str, None, dict[str, str]]:
    """Returns where each tensor is said to be: name -> file name."""
    files = {path.name: _names(path) for path in sorted(folder.glob("*.safetensors"))}
    held = {name: file for file, names in files.items() for name in names}
    path = folder / INDEX
    if not path.is_file():
        if list(files) != [SINGLE]:
            yield f"{folder}: has {', '.join(files) or 'no safetensors file'}, but neither {SINGLE} alone nor {INDEX}"
        return held
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places, total = dict(index["weight_map"]), index["metadata"]["total_size"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: not the index of safetensors files") from None
    for file in sorted(set(places.values()) - set(files)):
        yield f"{path}: names {file}, which is not there"
    for file, names in files.items():
        for name in names:
            if places.get(name) != file:
                where = f"places it in {places[name]}" if name in places else "does not name it"
                yield f"{folder / file}: {name}: is there, but {INDEX} {where}"
    for name, file in places.items():
        if file in files and name not in files[file]:
            yield f"{folder / file}: {name}: is not there, but {INDEX} places it there"
    size = sum(_value_bytes(folder / file) for file in files)
    if size != total:
        yield f"{path}: total_size = {total}, but the files hold {size} bytes of values"
    return held


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read, damaged or cut short: {error}") from None


def _value_bytes(path: Path) -> int:
    """Of a file that safetensors has opened: it refuses one whose header does not account for every byte."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def _code_faults(folder: Path, config: "PreTrainedConfig") -> Iterator[str]:
    """The files that config.json names, and those that they import."""
    from transformers.dynamic_module_utils import get_relative_imports

    targets = sorted({target.split(".")[0] for target in (getattr(config, CODE_KEY, None) or {}).values()})
    named_by = dict.fromkeys(targets, "config.json")
    for module in targets:  # grows
        file = folder / f"{module}.py"
        if not file.is_file():
            yield f"{folder / named_by[module]}: names {module}, but {file.name} is not there"
            continue
        for imported in get_relative_imports(file):
            if imported not in named_by:
                named_by[imported] = file.name
                targets.append(imported)


def _tokenizer_faults(folder: Path) -> Iterator[str]:
    """A model may be saved without a tokenizer, but not with a part of one."""
    if (folder / "tokenizer_config.json").is_file() and not (folder / "tokenizer.json").is_file():
        yield f"{folder}: has tokenizer_config.json, but not tokenizer.json"


def _tensor_faults(folder: Path, config: "PreTrainedConfig", places: dict[str, str]) -> Iterator[str]:
    expected = expected_shapes(config)
    for name in expected:
        if name not in places:
            yield f"{folder}: {name}: is missing, though config.json asks for it"
    # no bar where nobody watches it
    with tqdm(total=len(places), unit="tensor", desc="export", leave=False, disable=not sys.stderr.isatty()) as bar:
        for file in sorted(set(places.values())):
            with safe_open(folder / file, framework="pt") as tensors:
                for name in sorted(name for name, place in places.items() if place == file):
                    fault = _fault_of(tensors.get_tensor(name), expected.get(name), config.dtype)
                    if fault:
                        yield f"{folder / file}: {name}: {fault}"
                    bar.update()


def _fault_of(tensor: torch.Tensor, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> str | None:
    if shape is None:
        return "is not a tensor that config.json asks for"
    if tuple(tensor.shape) != shape:
        return f"has shape {tuple(tensor.shape)}, but config.json makes it {shape}"
    if dtype is not None and tensor.dtype != dtype:
        return f"is {tensor.dtype}, but config.json says {dtype}"
    count = tensor.numel() - int(tensor.isfinite().sum())
    return f"has {count:,} values that are NaN or infinite" if count else None
