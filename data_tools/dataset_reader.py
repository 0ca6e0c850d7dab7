"""Memory-mapped reader of the indexed datasets that data_tools/indexed_dataset.py writes, without torch."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.indexed_dataset import DTYPE_CODES, INDEX_HEADER, INDEX_VERSION, dataset_path
from dsmoe_megatron.errors import DataError

COUNTS = "<QBQQ"  # version, dtype code, sequences, document indices
HEADER_BYTES = len(INDEX_HEADER) + struct.calcsize(COUNTS)


@dataclass(frozen=True)
class DatasetIndex:
    """The content of a PREFIX.idx, unchecked but for its header and size.

    Args:
        path: of the file.
        dtype: of the ids in the .bin.
        lengths: ids per document, [documents].
        starts: byte of the .bin that each document starts at, [documents].
        document_indices: the documents' first sequences and the number of all, [documents + 1].
    """

    path: Path
    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    def ends(self, documents: slice) -> npt.NDArray[np.int64]:
        """Byte of the .bin after each of these documents, [documents in the slice]."""
        return self.starts[documents] + self.lengths[documents].astype(np.int64) * self.dtype.itemsize

    def document(self, tokens: npt.NDArray[Any], number: int) -> npt.NDArray[Any]:
        """Ids of one document, its end included, out of all `tokens` of the .bin."""
        start = int(self.starts[number]) // self.dtype.itemsize
        return tokens[start : start + int(self.lengths[number])]

    def document_at(self, token: int) -> int:
        """Number of the document that the token at this position of the .bin is in."""
        return int(np.searchsorted(self.starts, token * self.dtype.itemsize, side="right")) - 1


def read_index(prefix: str) -> DatasetIndex:
    """Map PREFIX.idx into memory.

    Raises:
        DataError: it is missing, empty, truncated, or no index of the kind that preprocess.py writes.
    """
    path = dataset_path(prefix, "idx")
    size = file_size(path)
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES or not header.startswith(INDEX_HEADER):
        raise DataError(f"{path} is not a Megatron dataset index, or damaged: preprocess the data again")
    version, code, documents, entries = struct.unpack(COUNTS, header[len(INDEX_HEADER) :])
    dtypes = {code: np.dtype(name) for name, code in DTYPE_CODES.items()}
    if version != INDEX_VERSION or code not in dtypes:
        raise DataError(
            f"{path}: version {version} and dtype code {code}, where version {INDEX_VERSION} and code"
            f" {' or '.join(map(str, dtypes))} are read: damaged, or not written by preprocess.py"
        )
    if size != (promised := HEADER_BYTES + 12 * documents + 8 * entries):
        raise DataError(f"{path}: {size} bytes, where its header promises {promised}: truncated or damaged")
    if entries != documents + 1:
        raise DataError(f"{path}: {documents} sequences but {entries - 1} documents: not written by preprocess.py")
    if documents == 0:
        raise DataError(f"{path}: the dataset is empty")

    tables = np.memmap(path, np.uint8, mode="r", offset=HEADER_BYTES)
    lengths, starts, document_indices = np.split(tables, [4 * documents, 12 * documents])
    return DatasetIndex(path, dtypes[code], lengths.view("<i4"), starts.view("<i8"), document_indices.view("<i8"))


def map_tokens(prefix: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """All ids of PREFIX.bin, [tokens], mapped into memory.

    Raises:
        DataError: it is missing or empty.
    """
    path = dataset_path(prefix, "bin")
    if file_size(path) < dtype.itemsize:
        raise DataError(f"{path} is empty")
    return np.memmap(path, dtype, mode="r", shape=(file_size(path) // dtype.itemsize,))


def file_size(path: Path) -> int:
    """Bytes of a file that has to be there."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; the prefix is the path without .bin and .idx")
    return path.stat().st_size
