"""Writer of Megatron's indexed datasets: PREFIX.bin holds the ids of all documents, PREFIX.idx says where each one is.

The files are byte for byte what megatron-core's IndexedDatasetBuilder writes for the same ids
(megatron/core/datasets/indexed_dataset.py), without torch and without its Python loop over the documents.
"""

import hashlib
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dsmoe_megatron.errors import DataError

INDEX_HEADER = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
DTYPE_CODES = {"uint16": 8, "int32": 4}
UINT16_VOCABULARY_LIMIT = 65500  # megatron-core's, not 65536


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that megatron-core stores the ids of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32)


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """PREFIX.suffix, also where the prefix has a dot in it."""
    return Path(f"{prefix}.{suffix}")


class IndexedDatasetWriter:
    """Writes documents one after the other; the files get their names when all of it is on the disk.

    Used as a context manager. Until `publish` there are only PREFIX.bin.tmp and PREFIX.idx.tmp, and leaving the context
    without it removes them.

    Args:
        prefix: path of the dataset without `.bin` and `.idx`; its folder is made.
        dtype: type of the ids in the file, see `token_dtype`.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.bin_path, self.idx_path = dataset_path(prefix, "bin"), dataset_path(prefix, "idx")
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._hash = hashlib.sha256()
        self._bin_bytes = 0

    def __enter__(self) -> "IndexedDatasetWriter":
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._bin: BinaryIO = _temporary(self.bin_path).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        for path in (self.bin_path, self.idx_path):
            _temporary(path).unlink(missing_ok=True)

    def add_documents(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Append documents.

        Args:
            ids: the ids of all of them, [sum of lengths], in this writer's dtype.
            lengths: ids per document, [documents].
        """
        if ids.dtype != self.dtype or len(ids) != lengths.sum():
            raise ValueError(f"{len(ids)} {ids.dtype} ids for {lengths.sum()} {self.dtype} ones")
        content = ids.tobytes()
        self._bin.write(content)
        self._hash.update(content)
        self._bin_bytes += len(content)
        self._lengths.append(lengths.astype(np.int32))

    def seal(self) -> dict[str, dict[str, Any]]:
        """Bring all of it to the disk, still under the temporary names.

        Returns:
            {"bin": {"bytes", "sha256"}, "idx": {"bytes", "sha256"}}.
        """
        _sync(self._bin)
        self._bin.close()
        index = self._index()
        with _temporary(self.idx_path).open("wb") as idx:
            idx.write(index)
            _sync(idx)
        return {
            "bin": {"bytes": self._bin_bytes, "sha256": self._hash.hexdigest()},
            "idx": {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()},
        }

    def publish(self) -> None:
        """Give the sealed files their names."""
        for path in (self.bin_path, self.idx_path):
            _temporary(path).replace(path)
        _sync_folder(self.bin_path.parent)

    def _index(self) -> bytes:
        """Header, dtype code, counts, then per document its length and the byte that it starts at; every document is
        one sequence, so the last table, of the documents' first sequences, is 0, 1, 2 ..."""
        if not self._lengths:
            raise DataError(f"{self.bin_path} would hold no document")
        lengths = np.concatenate(self._lengths)
        starts = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
        starts *= self.dtype.itemsize
        document_indices = np.arange(len(lengths) + 1, dtype=np.int64)
        counts = struct.pack("<QBQQ", INDEX_VERSION, DTYPE_CODES[self.dtype.name], len(lengths), len(document_indices))
        return b"".join([INDEX_HEADER, counts, lengths.tobytes(), starts.tobytes(), document_indices.tobytes()])


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    with _temporary(path).open("wb") as file:
        file.write(content)
        _sync(file)
    _temporary(path).replace(path)
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut only once its folder is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
