"""Read parts of the tensors of a distributed checkpoint into memory that is there.

Nothing in a checkpoint can run code: checkpoint_metadata.py reads the table of contents, and tensors are read with
`weights_only`. Values are read straight into their place, whatever the size of the pieces they were saved in.
"""

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.errors import CheckpointError, first_line

BLOCK_BYTES = 4 << 20  # read at a time where the values are cut or converted on the way; near the processor's cache


class CheckpointReader:
    """Reads parts of saved tensors; from several threads if need be.

    Args:
        folder: holds `.metadata` and `*.distcp`.

    Attributes:
        metadata: the table of contents.

    Raises:
        CheckpointError: there is no readable table of contents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)
        self._heads: dict[int, _Head] = {}

    def entry(self, name: str) -> TensorStorageMetadata:
        """What the table of contents says of a tensor.

        Raises:
            CheckpointError: it is not there, or not a tensor.
        """
        entry = self.metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: {name} is {'missing' if entry is None else 'not a tensor'}")
        return entry

    def read_into(self, target: Tensor, name: str, offsets: Sequence[int]) -> None:
        """Fill a tensor with a part of a saved one, of its shape.

        Args:
            target: of any floating type and device.
            name: of the saved tensor.
            offsets: where the part begins, for each axis.

        Raises:
            CheckpointError: a file is missing or damaged, or the pieces do not make up the part.
        """
        wanted = ChunkStorageMetadata(torch.Size(offsets), target.shape)
        items = create_read_items_for_chunk_list(name, self.entry(name), [wanted])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(f"{self.folder}: the saved pieces of {name} do not make up the whole tensor")
        try:
            for item in items:
                self._read_piece(item, _narrowed(target, item.dest_offsets, item.lengths))
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {reason}") from error

    def _read_piece(self, item: ReadItem, target: Tensor) -> None:
        """Fill the target with the wanted part of one saved piece, an archive of torch.save inside a file."""
        place = self.metadata.storage_data[item.storage_index]
        if getattr(place, "transform_descriptors", None):
            raise RuntimeError("it is compressed or encoded")
        with (self.folder / place.relative_path).open("rb", buffering=0) as file:
            archive = cast(IO[bytes], _create_file_view(file, place.offset, place.length))
            piece, begin = self._head(file, archive, place)
            ends = [offset + length for offset, length in zip(item.storage_offsets, item.lengths, strict=True)]
            if piece.dim() != len(ends) or any(map(int.__gt__, ends, piece.shape)):
                raise RuntimeError("a piece is not what the table of contents says")
            if begin is None or not piece.is_contiguous():  # a torch that does not say it: all of the piece is read
                archive.seek(0)
                piece = torch.load(archive, map_location="cpu", weights_only=True)
                target.copy_(_narrowed(piece, item.storage_offsets, item.lengths))
                return
            begin += int(piece.storage_offset()) * piece.itemsize
            if begin + piece.nbytes > place.length:
                raise EOFError("the piece ends before its values do")
            # values are read into host memory; a device takes them from there
            host = target if target.device.type == "cpu" else torch.empty(target.shape, dtype=target.dtype)
            _fill(host, file, place.offset + begin, piece, list(item.storage_offsets))
            if host is not target:
                target.copy_(host)

    def _head(self, file: BinaryIO, archive: IO[bytes], place: Any) -> tuple[Tensor, int | None]:
        """A piece without values, and where in the archive they begin; None where torch does not say it.

        An archive begins with all that describes its values. Where that is, byte for byte, what another of the same
        length had, torch is not asked again, which takes longer than reading a megabyte.
        """
        known = self._heads.get(place.length)
        if known is not None:
            file.seek(place.offset)
            if file.read(len(known.content)) == known.content:
                return known.piece, len(known.content)
            archive.seek(0)
        # on the device `meta` torch reads no values, but says where they begin
        piece = torch.load(archive, map_location="meta", weights_only=True)
        if not isinstance(piece, Tensor):
            raise RuntimeError("a piece is not a tensor")
        begin = getattr(piece.untyped_storage(), "_checkpoint_offset", None)
        if begin is not None:
            file.seek(place.offset)
            self._heads[place.length] = _Head(file.read(begin), piece)
        return piece, begin


@dataclass(frozen=True)
class _Head:
    """What precedes the values in an archive, and the tensor that it describes."""

    content: bytes
    piece: Tensor


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
