"""The writer against megatron-core's own builder and reader."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_tools.indexed_dataset import IndexedDatasetWriter, token_dtype
from dsmoe_megatron.errors import DataError


def random_documents(vocab_size: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    dtype = token_dtype(vocab_size)
    return [generator.integers(0, vocab_size, size).astype(dtype) for size in [1, 700, 3, *range(1, 90), 40_000]]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32), (128_256, np.int32)])
def test_files_equal_those_of_megatron_core(vocab_size: int, dtype: type, tmp_path: Path) -> None:
    documents = random_documents(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    with IndexedDatasetWriter(tmp_path / "ours", token_dtype(vocab_size)) as writer:
        for some in (documents[:1], documents[1:50], documents[50:]):
            lengths = np.array([len(document) for document in some], np.int32)
            writer.add_documents(np.concatenate(some), lengths)
        files = writer.seal()
        writer.publish()

    for suffix in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
        assert files[suffix]["bytes"] == theirs.stat().st_size
    read = IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(read[i], document) for i, document in enumerate(documents))


def test_nothing_has_its_name_until_all_is_published(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "deep" / "data", np.dtype(np.uint16)) as writer:
        writer.add_documents(np.arange(5, dtype=np.uint16), np.array([2, 3], np.int32))
        writer.seal()
        names = {path.name for path in (tmp_path / "deep").iterdir()}
    assert names == {"data.bin.tmp", "data.idx.tmp"}
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_dataset_without_documents_is_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.dtype(np.uint16)) as writer, pytest.raises(DataError, match="data"):
        writer.seal()


def test_ids_of_another_type_or_count_are_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "data", np.dtype(np.uint16)) as writer:
        with pytest.raises(ValueError):
            writer.add_documents(np.zeros(4, np.int32), np.array([4], np.int32))
        with pytest.raises(ValueError):
            writer.add_documents(np.zeros(4, np.uint16), np.array([3], np.int32))
