"""Time to write the index of a dataset of many short documents, beside megatron-core's builder."""

import filecmp
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.indexed_dataset import IndexedDatasetWriter

OURS, MEGATRON = "ours", "Megatron-Core IndexedDatasetBuilder"
LONGEST = 4  # tokens; short, since it is the number of documents that an index grows with


def measure_index(documents: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Both write the same index, in turns.

    Args:
        documents: in the index.
        repeats: runs of each.
        folder: for the files.

    Returns:
        Seconds by the clock of each run, and whether the files are equal.
    """
    lengths = np.random.default_rng(1234).integers(1, LONGEST, documents, dtype=np.int32, endpoint=True)
    seconds: dict[str, list[float]] = {OURS: [], MEGATRON: []}
    identical = True
    folder.mkdir()
    for _ in range(repeats):
        seconds[OURS].append(_ours(lengths, folder / "ours"))
        seconds[MEGATRON].append(_megatron(lengths, folder / "megatron"))
        identical &= filecmp.cmp(folder / "ours.idx", folder / "megatron.idx", shallow=False)
    return {
        "documents": documents,
        "seconds": seconds,
        "median_seconds": {name: statistics.median(own) for name, own in seconds.items()},
        "identical": identical,
    }


def _ours(lengths: npt.NDArray[np.int32], prefix: Path) -> float:
    """From the last document to the index on the disk, synced and with its checksum."""
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_documents(np.zeros(int(lengths.sum()), np.uint16), lengths)
        _bring_to_disk(prefix.parent)  # the ids' own way to the disk is no part of the index
        started = time.perf_counter()
        writer.seal()
        seconds = time.perf_counter() - started
        writer.publish()
    return seconds


def _megatron(lengths: npt.NDArray[np.int32], prefix: Path) -> float:
    """`finalize`, which does not sync. The builder's lists are filled directly: adding the documents is not timed."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.sequence_lengths = lengths.tolist()
    builder.document_indices = list(range(len(lengths) + 1))
    started = time.perf_counter()
    builder.finalize(f"{prefix}.idx")
    return time.perf_counter() - started


def _bring_to_disk(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
