"""Read a torch distributed checkpoint, as megatron-core writes it, in one process: no process group, no megatron-core.

Nothing in it can run code, and memory is what the caller asked for: see checkpoint_reading.py. Values are not checked
while they are read: `check_files` comes first.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from tqdm import tqdm

from dsmoe_megatron.checkpoint_manifest import NOT_CHECKED, find_faults, read_manifest
from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.checkpoint_reading import CheckpointReader
from dsmoe_megatron.errors import CheckpointError

OPTIMIZER = "optimizer."  # begins the names of its tensors


class MegatronTensors(Protocol):
    """A model's tensors under Megatron's names."""

    def read(
        self,
        name: str,
        layer: int | None = None,
        dtype: torch.dtype | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """A whole tensor, or one layer of a stacked one; converted, if a dtype is given, and in the given memory, if it
        can be of use."""
        ...


def check_files(folder: Path) -> None:
    """Refuse a step folder whose weights are not as they were written; where no manifest vouches for it, say so.

    Files of the optimizer's state alone are passed over: whoever wants the weights does not read them.

    Args:
        folder: of the step.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or the manifest or the table of contents is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        print(f"{folder}: {NOT_CHECKED}", file=sys.stderr)
        return
    places = read_metadata(folder).storage_data.items()
    of_optimizer = {place.relative_path for index, place in places if index.fqn.startswith(OPTIMIZER)}
    of_weights = {place.relative_path for index, place in places if not index.fqn.startswith(OPTIMIZER)}
    files = {name: entry for name, entry in manifest.files.items() if name not in of_optimizer - of_weights}
    total, watched = sum(entry.bytes for entry in files.values()), sys.stderr.isatty()
    with tqdm(total=total, unit="B", unit_scale=True, desc="check", leave=False, disable=not watched) as bar:
        faults = find_faults(folder, files, bar.update)
    if faults:
        others = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise CheckpointError(f"{faults[0]}{others}; it is not read: name an older step folder of the run")


class DistributedCheckpoint:
    """The tensors of one checkpoint folder, read piece by piece.

    Args:
        folder: holds `.metadata` and `*.distcp`.

    Raises:
        CheckpointError: there is no readable table of contents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = CheckpointReader(folder)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    @property
    def tensor_dtypes(self) -> dict[str, torch.dtype]:
        """Type of every tensor's values, as saved."""
        return {name: entry.properties.dtype for name, entry in self._tensors.items()}

    @property
    def object_names(self) -> list[str]:
        """Names of the entries that are not tensors; they are never read."""
        return [name for name in self._reader.metadata.state_dict_metadata if name not in self._tensors]

    @property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        entries = self._reader.metadata.state_dict_metadata.items()
        return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    def read(
        self,
        name: str,
        layer: int | None = None,
        dtype: torch.dtype | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """A whole tensor, or one entry of its first axis; nothing else of it is kept in memory.

        Args:
            name: of the tensor.
            layer: entry of the first axis; None is all of them.
            dtype: to convert to while reading; None is the saved one.
            memory: bytes to put it in where it fits, so that large tensors one after the other need no fresh pages,
                which cost more than reading; None always takes fresh ones.

        Raises:
            CheckpointError: a file is missing or damaged, or the pieces do not make up the tensor.
        """
        entry = self._reader.entry(name)
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        target = _empty(sizes, dtype or entry.properties.dtype, memory)
        self._reader.read_into(target, name, offsets)
        return target if layer is None else target[0]


def _empty(sizes: Sequence[int], dtype: torch.dtype, memory: Tensor | None) -> Tensor:
    nbytes = math.prod(sizes) * dtype.itemsize
    if memory is None or nbytes > memory.numel():
        return torch.empty(sizes, dtype=dtype)
    return memory[:nbytes].view(dtype).view(sizes)
