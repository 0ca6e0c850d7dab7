"""Writer of Megatron's indexed datasets: PREFIX.bin holds the ids of all documents, PREFIX.idx says where each one is.

The files are byte for byte what megatron-core's IndexedDatasetBuilder writes for the same ids
(megatron/core/datasets/indexed_dataset.py), without torch and without its Python loop over the documents.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
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
MAX_VOCABULARY = 2**31  # ids of int32
PATHS = "paths.jsonl"  # suffix of the file that tells what file each document is


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that megatron-core stores the ids of such a vocabulary in.

    Raises:
        DataError: it has none that holds them.
    """
    if vocab_size > MAX_VOCABULARY:
        raise DataError(
            f"the tokenizer has ids up to {vocab_size - 1}: a dataset holds none above {MAX_VOCABULARY - 1}"
        )
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32)


def dataset_path(prefix: str | Path, suffix: str) -> Path:
    """PREFIX.suffix, also where the prefix has a dot in it."""
    return Path(f"{prefix}.{suffix}")


class IndexedDatasetWriter:
    """Writes documents one after the other; the files get their names when all of it is on the disk.

    Used as a context manager. Until `publish` there are only files of temporary names, and leaving the context without
    it removes them.

    Args:
        prefix: path of the dataset without `.bin` and `.idx`; its folder is made.
        dtype: type of the ids in the file, see `token_dtype`.
        with_paths: also write PREFIX.paths.jsonl, the file that each document is.
        folder: of the unfinished files, on the same disk; None is that of the dataset.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype[Any], with_paths: bool = False, folder: Path | None = None
    ) -> None:
        self.dtype = dtype
        self._paths = {suffix: dataset_path(prefix, suffix) for suffix in ("bin", "idx")}
        if with_paths:
            self._paths[PATHS] = dataset_path(prefix, PATHS)
        self._unfinished = {
            suffix: temporary(path) if folder is None else folder / temporary(path).name
            for suffix, path in self._paths.items()
        }
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._hashes = {suffix: hashlib.sha256() for suffix in self._paths}
        self._bytes = dict.fromkeys(self._paths, 0)
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "IndexedDatasetWriter":
        for suffix, path in self._paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[suffix] = self._unfinished[suffix].open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for suffix, path in self._unfinished.items():
            with suppress(OSError):  # of a full disk, which has been told
                self._files[suffix].close()
            path.unlink(missing_ok=True)

    def add_documents(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Append documents.

        Args:
            ids: the ids of all of them, [sum of lengths], in this writer's dtype.
            lengths: ids per document, [documents].
        """
        if ids.dtype != self.dtype or len(ids) != lengths.sum():
            raise ValueError(f"{len(ids)} {ids.dtype} ids for {lengths.sum()} {self.dtype} ones")
        self.append("bin", ids.tobytes())
        self.append_lengths(lengths)

    def append(self, suffix: str, content: "bytes | memoryview[int]") -> None:
        """Append to the ids (bin) or the paths of documents; their lengths are told by `append_lengths`."""
        self._files[suffix].write(content)
        self._hashes[suffix].update(content)
        self._bytes[suffix] += len(content)

    def append_lengths(self, lengths: npt.NDArray[np.int32]) -> None:
        """Tell the lengths of documents whose ids have been or will be appended, [documents]."""
        self._lengths.append(lengths.astype(np.int32))

    def seal(self) -> dict[str, dict[str, Any]]:
        """Bring all of it to the disk, still under the temporary names.

        Returns:
            {"bin": {"bytes", "sha256"}, "idx": {"bytes", "sha256"}}, and the paths' where they are written.

        Raises:
            ValueError: ids and lengths do not belong together.
        """
        tokens = sum(int(lengths.sum(dtype=np.int64)) for lengths in self._lengths)
        if tokens * self.dtype.itemsize != self._bytes["bin"]:
            raise ValueError(f"{self._bytes['bin']} bytes are not {tokens} ids of {self.dtype}")
        for table in self._index():
            self.append("idx", table)
        for file in self._files.values():
            sync(file)
            file.close()
        return {
            suffix: {"bytes": self._bytes[suffix], "sha256": digest.hexdigest()}
            for suffix, digest in self._hashes.items()
        }

    def publish(self) -> None:
        """Give the sealed files their names."""
        for suffix, path in self._paths.items():
            self._unfinished[suffix].replace(path)
        sync_folder(self._paths["bin"].parent)

    def _index(self) -> "Iterator[bytes | memoryview[int]]":
        """Header, dtype code, counts, then per document its length and the byte that it starts at; every document is
        one sequence, so the last table, of the documents' first sequences, is 0, 1, 2 ..."""
        if not self._lengths:
            raise DataError(f"{self._paths['bin']} would hold no document")
        lengths = np.concatenate(self._lengths)
        starts = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=starts[1:])
        starts *= self.dtype.itemsize
        document_indices = np.arange(len(lengths) + 1, dtype=np.int64)
        counts = struct.pack("<QBQQ", INDEX_VERSION, DTYPE_CODES[self.dtype.name], len(lengths), len(document_indices))
        yield INDEX_HEADER
        yield counts
        tables: list[Any] = [lengths, starts, document_indices]
        for table in tables:
            yield memoryview(table).cast("B")  # not copied: there may be millions


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    with temporary(path).open("wb") as file:
        file.write(content)
        sync(file)
    temporary(path).replace(path)
    sync_folder(path.parent)


def temporary(path: Path) -> Path:
    """The name that a file has while it is written."""
    return path.with_name(path.name + ".tmp")


def sync(file: BinaryIO) -> None:
    """Wait until the file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """A new name survives a power cut only once its folder is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
