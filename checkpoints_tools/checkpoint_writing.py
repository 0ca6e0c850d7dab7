"""Write a torch distributed checkpoint in megatron-core's form, in one process: no process group, no megatron-core."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from checkpoints_tools.distributed_checkpoint import MegatronTensors
from checkpoints_tools.whole_folder import write_text
from dsmoe_megatron.durable import sync
from dsmoe_megatron.inference.tensor_mapping import TensorMapping

# what megatron-core asks of a checkpoint beside torch's files: which format it has, and what no rank shards
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


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
