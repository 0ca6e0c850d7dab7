"""Read the tensors of a Hugging Face folder one by one: safetensors files only, nothing is unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.inference.tensor_mapping import TensorMapping, check_names
from dsmoe_megatron.inference.tensor_rules import Shape, TensorRule

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# safetensors' names of what a weight may be stored in here
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ExportedTensors(Protocol):
    """The tensors of a model under their Hugging Face names."""

    @property
    def tensor_shapes(self) -> dict[str, Shape]: ...
    @property
    def tensor_dtypes(self) -> dict[str, torch.dtype]: ...
    def read(self, name: str) -> Tensor: ...


class SafetensorsFolder:
    """The tensors that a folder's index lists, or those of its only file; each is read when it is asked for.

    Args:
        folder: Hugging Face folder.

    Raises:
        CheckpointError: no safetensors there, a file is missing or damaged, or the index does not describe the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensor_shapes: dict[str, Shape] = {}
        self.tensor_dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, Any] = {}
        index = _read_index(folder)
        for file_name in sorted(set(index.values())) if index is not None else [SINGLE_FILE]:
            self._add_file(folder / file_name)
        if index is not None:
            check_index(index, self._places, folder)

    def _add_file(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in self._places:
                    raise CheckpointError(f"{path}: {name} stands in another file of the model too")
                entry = file.get_slice(name)
                kind = entry.get_dtype()
                if kind not in FLOATS:
                    raise CheckpointError(f"{path}: {name} is {kind}; a weight is one of {', '.join(FLOATS)}")
                self.tensor_shapes[name] = tuple(entry.get_shape())
                self.tensor_dtypes[name] = FLOATS[kind]
                self._places[name] = file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or an infinity.
        """
        try:
            tensor: Tensor = self._places[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from None
        check_finite(name, tensor, str(self.folder))
        return tensor


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name; None for a folder with one file."""
    path = folder / INDEX_FILE
    if not path.is_file():
        if (folder / SINGLE_FILE).is_file():
            return None
        pickles = sorted(found.name for pattern in PICKLES for found in folder.glob(pattern))
        instead = f"; {pickles[0]} is a pickle, which is not read: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}{instead}")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of safetensors files: {error}") from None
    outside = sorted(file for file in files.values() if Path(file).name != file)
    if outside:
        raise CheckpointError(f"{path}: names {outside[0]}, which is not in the folder")
    return files


def check_index(index: Mapping[str, str], found: Mapping[str, object], folder: Path) -> None:
    """The files hold what the index lists, and nothing else.

    Raises:
        CheckpointError: names what is missing and what is left over.
    """
    missing, unknown = sorted(set(index) - set(found)), sorted(set(found) - set(index))
    faults = [
        f"{label} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for label, names in (("the files lack", missing), ("the index lacks", unknown))
        if names
    ]
    if faults:
        raise CheckpointError(f"{folder / INDEX_FILE}: {' and '.join(faults)}")


def check_finite(name: str, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError where a tensor holds NaN or an infinity."""
    lowest, highest = torch.aminmax(tensor)  # NaN wins in both, and nothing of the tensor's size is made
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise CheckpointError(f"{where}: {name} holds NaN or infinite values")


class AsMegatron:
    """A Hugging Face model's tensors under Megatron's names, each made when it is asked for.

    Args:
        tensors: all that the mapping's export has, and no other.
        mapping: the model's table.
        where: what messages call the model.

    Raises:
        CheckpointError: a tensor is missing, left over, or has not the shape that the configuration makes.
    """

    def __init__(self, tensors: ExportedTensors, mapping: TensorMapping, where: str) -> None:
        expected = mapping.exported_shapes()
        check_names(tensors.tensor_shapes, expected, where)
        for name, shape in tensors.tensor_shapes.items():
            if shape != expected[name]:
                rule = f"but config.json makes it {expected[name]}"
                raise CheckpointError(f"{where}: {name} has shape {shape}, {rule}")
        self._tensors = tensors
        self._rules: dict[str, TensorRule] = {rule.megatron: rule for rule, _ in mapping}

    def read(
        self,
        name: str,
        layer: int | None = None,
        dtype: torch.dtype | None = None,
        memory: Tensor | None = None,  # noqa: ARG002 (every tensor is made anew)
    ) -> Tensor:
        """One layer of a Megatron tensor, or the whole of one that has no layers; converted, if a dtype is given."""
        rule = self._rules[name]
        parts = {exported: self._tensors.read(exported) for exported in rule.exported_shapes(layer)}
        tensor = rule.to_megatron(parts, layer)
        return tensor if dtype is None else tensor.to(dtype)
