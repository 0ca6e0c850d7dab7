"""Write safetensors files tensor by tensor: their names, shapes and type are known before their values are.

The library's own writer wants all tensors of a file in memory. The format is its documentation's: the length of a
header, the header as JSON, then the values of one tensor after the other.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dsmoe_megatron.errors import CheckpointError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
ALIGNMENT = 8  # of the values' begin, by spaces after the header
BLOCK_BYTES = 4 << 20
WRITE_BACK_BYTES = 64 << 20


class StreamedFile:
    """One file; values are added in the order of the names given.

    Args:
        path: file to make.
        shapes: name -> shape of every tensor, in the order in which they will come.
        dtype: of all of them.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._path, self._dtype = path, dtype
        self._expected = list(shapes.items())
        self._header = _header(shapes, dtype)
        self._unsynced = 0

    def __enter__(self) -> "StreamedFile":
        self._file = self._path.open("wb", buffering=0)
        self._write(memoryview(self._header))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                assert not self._expected, f"not written: {self._expected}"
                os.fsync(self._file.fileno())

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the values of the next tensor.

        Args:
            name: the next of the names.
            tensor: of the shape and type that were announced.

        Raises:
            CheckpointError: it has values that are NaN or infinite.
        """
        assert (name, tuple(tensor.shape), tensor.dtype) == (*self._expected.pop(0), self._dtype)
        for block in _blocks(tensor):
            if not _is_finite(block):
                raise CheckpointError(f"{name} has values that are NaN or infinite")
            self._write(block.view(torch.uint8).numpy().data)

    def _write(self, values: memoryview) -> None:
        while values:
            written = self._file.write(values[:WRITE_BACK_BYTES])
            values = values[written:]
            self._unsynced += written
            if self._unsynced >= WRITE_BACK_BYTES:
                self._start_writing_back()

    def _start_writing_back(self) -> None:
        """Have the kernel bring to the disk what is written, while the next values are read."""
        if hasattr(os, "posix_fadvise"):  # Linux
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unsynced = 0


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """The values in order, flat, in parts that are still in the processor's cache when they are written."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(BLOCK_BYTES // tensor.itemsize)
        return
    for entry in tensor:  # reordered: so much at a time, since fresh memory costs more than the copy
        yield from _blocks(entry.contiguous() if entry.nbytes <= BLOCK_BYTES else entry)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    # one pass that keeps nothing, and NaN comes through it
    return all(value.isfinite() for value in tensor.aminmax())
