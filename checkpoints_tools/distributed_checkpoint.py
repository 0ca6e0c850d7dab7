"""Read and write a torch distributed checkpoint, in megatron-core's form, in one process: no process group, no
megatron-core.

Nothing in it can run code: checkpoint_metadata.py reads the table of contents, and tensors are read with
`weights_only`.
"""

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    ReadItem,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from checkpoints_tools.whole_folder import sync, write_text
from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.inference.tensor_mapping import TensorMapping

# what megatron-core asks of a checkpoint beside torch's files: which format it has, and what no rank shards
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class MegatronTensors(Protocol):
    """A model's tensors under Megatron's names."""

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one layer of a stacked one."""
        ...


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


def write_checkpoint(
    folder: Path, source: MegatronTensors, mapping: TensorMapping, dtype: torch.dtype, done: Callable[[], object]
) -> int:
    """Write a model, weights alone, as a checkpoint that megatron-core loads under any layout.

    A stacked tensor is written layer by layer; what is in memory is one layer and what has no layers.

    Args:
        folder: empty.
        source: gives the tensors.
        mapping: the model's table.
        dtype: of every tensor.
        done: called after each piece.

    Returns:
        Number of global tensors written.

    Raises:
        CheckpointError: from the source.
        OSError: the disk is full or the folder cannot be written.
    """
    shapes = mapping.megatron_shapes()
    pieces = [_Piece(rule.megatron, shapes[rule.megatron], layer) for rule, layer in mapping]
    planner = _FromSource(source, pieces, dtype, done)
    writer = FileSystemWriter(folder)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    [plan] = writer.prepare_global_plan(plans)
    results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    torch.save({}, folder / "common.pt")
    sync(folder / "common.pt")
    write_text(folder / "metadata.json", json.dumps(FORMAT))
    return len(shapes)


@dataclass(frozen=True)
class _Piece:
    """What is written at once: one layer of a stacked tensor, or a whole tensor."""

    name: str
    global_shape: tuple[int, ...]
    layer: int | None

    @property
    def chunk(self) -> ChunkStorageMetadata:
        offsets, sizes = [0] * len(self.global_shape), list(self.global_shape)
        if self.layer is not None:
            offsets[0], sizes[0] = self.layer, 1
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    def write_item(self, dtype: torch.dtype) -> WriteItem:
        data = TensorWriteData(self.chunk, TensorProperties(dtype=dtype), torch.Size(self.global_shape))
        return WriteItem(MetadataIndex(self.name, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _FromSource(DefaultSavePlanner):
    """Makes each piece when its turn to be written comes."""

    def __init__(
        self, source: MegatronTensors, pieces: list[_Piece], dtype: torch.dtype, done: Callable[[], object]
    ) -> None:
        super().__init__()
        self.source, self.dtype, self.done = source, dtype, done
        self.pieces = {MetadataIndex(piece.name, piece.chunk.offsets): piece for piece in pieces}

    def create_local_plan(self) -> SavePlan:
        items = [piece.write_item(self.dtype) for piece in self.pieces.values()]
        # torch keeps the mapping of a nested state dict there; these names are flat
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece = self.pieces[write_item.index]
        tensor = self.source.read(piece.name, piece.layer)
        self.done()
        return (tensor if piece.layer is None else tensor[None]).to(self.dtype).contiguous()
