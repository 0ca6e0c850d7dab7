"""Read a torch distributed checkpoint, as megatron-core writes it, in one process: no process group, no megatron-core.

Nothing in it can run code: checkpoint_metadata.py reads the table of contents, and tensors are read with
`weights_only`.
"""

import math
import pickle
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.errors import CheckpointError


class DistributedCheckpoint:
    """The tensors of one checkpoint folder, read piece by piece.

    Args:
        folder: holds `.metadata` and `*.distcp`.

    Raises:
        CheckpointError: there is no readable table of contents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor."""
        entries = self._metadata.state_dict_metadata.items()
        return {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    @property
    def object_names(self) -> list[str]:
        """Names of the entries that are not tensors; they are never read."""
        entries = self._metadata.state_dict_metadata.items()
        return [name for name, entry in entries if not isinstance(entry, TensorStorageMetadata)]

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one entry of its first axis; nothing else of it is kept in memory.

        Raises:
            CheckpointError: a file is missing or damaged, or the pieces do not make up the tensor.
        """
        entry = self._metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: {name} is not a tensor")
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise CheckpointError(f"{self.folder}: the saved pieces of {name} do not make up the whole tensor")
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except (OSError, RuntimeError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {reason}") from error
        return target if layer is None else target[0]


class _IntoTensor(DefaultLoadPlanner):
    """Places every piece in one tensor, whatever global offset that tensor begins at."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, offset, length)
        return view
