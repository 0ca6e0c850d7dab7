"""Read a torch distributed checkpoint, as megatron-core writes it, in one process: no process group, no megatron-core.

Nothing in it can run code: checkpoint_metadata.py reads the table of contents, and tensors are read with
`weights_only`. A tensor is read straight into its place, in blocks: memory is what the caller asked for, whatever the
size of the pieces that it was saved in.
"""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import IO, BinaryIO, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.errors import CheckpointError

BLOCK_BYTES = 4 << 20  # read at a time where the values are cut or converted on the way; near the processor's cache


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
        return [name for name in self._metadata.state_dict_metadata if name not in self._tensors]

    @property
    def _tensors(self) -> dict[str, TensorStorageMetadata]:
        entries = self._metadata.state_dict_metadata.items()
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
        target = _empty(sizes, dtype or entry.properties.dtype, memory)
        try:
            for item in items:
                self._read_piece(item, _narrowed(target, item.dest_offsets, item.lengths))
        except (OSError, RuntimeError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {reason}") from error
        return target if layer is None else target[0]

    def _read_piece(self, item: ReadItem, target: Tensor) -> None:
        """Fill the target with the wanted part of one saved piece, an archive of torch.save inside a file."""
        place = self._metadata.storage_data[item.storage_index]
        if getattr(place, "transform_descriptors", None):
            raise RuntimeError("it is compressed or encoded")
        with (self.folder / place.relative_path).open("rb", buffering=0) as file:
            archive = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
            # on the device `meta` torch reads no values, but says where they begin
            piece = torch.load(archive, map_location="meta", weights_only=True)
            ends = [offset + length for offset, length in zip(item.storage_offsets, item.lengths, strict=True)]
            if not isinstance(piece, Tensor) or piece.dim() != len(ends) or any(map(int.__gt__, ends, piece.shape)):
                raise RuntimeError("a piece is not what the table of contents says")
            begin = getattr(piece.untyped_storage(), "_checkpoint_offset", None)
            if begin is None or not piece.is_contiguous():  # a torch that does not say it: all of the piece is read
                archive.seek(0)
                piece = torch.load(archive, map_location="cpu", weights_only=True)
                target.copy_(_narrowed(piece, item.storage_offsets, item.lengths))
                return
            begin += place.offset + piece.storage_offset() * piece.itemsize
            if begin + piece.nbytes > place.offset + place.length:
                raise EOFError("the piece ends before its values do")
            _fill(target, file, begin, piece, list(item.storage_offsets))


def _empty(sizes: Sequence[int], dtype: torch.dtype, memory: Tensor | None) -> Tensor:
    nbytes = math.prod(sizes) * dtype.itemsize
    if memory is None or nbytes > memory.numel():
        return torch.empty(sizes, dtype=dtype)
    return memory[:nbytes].view(dtype).view(sizes)


def _narrowed(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for axis, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, offset, length)
    return tensor


def _fill(target: Tensor, file: BinaryIO, begin: int, piece: Tensor, offsets: list[int]) -> None:
    """Read a part of a piece from a file.

    Args:
        target: the part's place, of any layout and floating type.
        file: unbuffered.
        begin: where the piece's values begin in the file, row by row.
        piece: its shape and type.
        offsets: where in the piece the part begins.
    """
    shape = list(piece.shape)
    while len(shape) > 1 and target.shape[0] == 1:  # one entry of an axis: go into it, so that a block is a part of it
        begin += offsets.pop(0) * math.prod(shape[1:]) * piece.itemsize
        shape.pop(0)
        target = target[0]
    if not shape:
        shape, offsets, target = [1], [0], target.view(1)
    row_shape = shape[1:]
    row_bytes = math.prod(row_shape) * piece.itemsize
    begin += offsets[0] * row_bytes
    as_it_is = target.is_contiguous() and target.dtype == piece.dtype and list(target.shape[1:]) == row_shape
    rows = target.shape[0] if as_it_is else max(1, BLOCK_BYTES // max(1, row_bytes))
    block = None if as_it_is else torch.empty([min(rows, target.shape[0]), *row_shape], dtype=piece.dtype)
    for first in range(0, target.shape[0], rows):
        part = target[first : first + rows]
        values = part if block is None else block[: part.shape[0]]
        file.seek(begin + first * row_bytes)
        _read_exactly(file, values)
        if block is not None:
            part.copy_(_narrowed(values, [0, *offsets[1:]], list(part.shape)))


def _read_exactly(file: BinaryIO, values: Tensor) -> None:
    left = values.reshape(-1).view(torch.uint8).numpy().data
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the file ends before its values do")
        left = left[count:]
