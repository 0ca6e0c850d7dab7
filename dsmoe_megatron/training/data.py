"""Blended indexed datasets and the order in which their samples are dealt.

Consumed samples alone fix the next batch, its size included: micro-batch k of data-parallel rank r takes samples
(k*DP + r)*m onward, so neither the data-parallel size nor gradient accumulation changes what is in a global batch.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from dsmoe_megatron.batch_ramp import batch_size_after
from dsmoe_megatron.config import Config, DatasetSource
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.runtime.distributed import raised_on_every_rank
from dsmoe_megatron.runtime.processes import serve_this_rank
from dsmoe_megatron.tokenizers import Tokenizer
from dsmoe_megatron.training.blends import blends_of
from dsmoe_megatron.training.engines.protocol import Batch
from dsmoe_megatron.training.index_cache import Say

INDEX_HEADER_BYTES = 34  # magic 9, version 8, dtype 1, sequences 8, documents 8
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # dtype code -> bytes of a token


def check_datasets(sources: Sequence[DatasetSource], tokenizer: Tokenizer, separate_documents: bool = False) -> None:
    """Refuse datasets that are missing, empty, truncated, or made with another tokenizer.

    Args:
        sources: the datasets.
        tokenizer: of the run.
        separate_documents: whether the run has to see where a document ends.

    Raises:
        DataError: one line that names the file.
    """
    for source in sources:
        index, tokens = Path(f"{source.prefix}.idx"), Path(f"{source.prefix}.bin")
        for path in (index, tokens):
            if not path.is_file():
                raise DataError(f"{path}: no such file; the prefix is the path without .bin/.idx")
        _check_sizes(index, tokens)
        manifest = _check_manifest(Path(f"{source.prefix}.manifest.json"), tokens, index, tokenizer)
        if separate_documents:
            _check_ends(source.prefix, manifest, tokenizer)


def _check_sizes(index: Path, tokens: Path) -> None:
    header = index.open("rb").read(INDEX_HEADER_BYTES)
    if len(header) < INDEX_HEADER_BYTES or header[:9] != b"MMIDIDX\x00\x00":
        raise DataError(f"{index}: not a Megatron dataset index, or truncated; build it again with preprocess.py")
    token_bytes = TOKEN_BYTES.get(header[17], 0)
    sequences, documents = (int.from_bytes(header[at : at + 8], "little") for at in (18, 26))
    expected = INDEX_HEADER_BYTES + sequences * (4 + 8) + documents * 8
    if index.stat().st_size != expected:
        raise DataError(f"{index}: {index.stat().st_size} bytes where its header promises {expected}: truncated")
    if sequences == 0:
        raise DataError(f"{index}: the dataset is empty")
    with index.open("rb") as file:
        file.seek(INDEX_HEADER_BYTES + 4 * (sequences - 1))
        last_length = int.from_bytes(file.read(4), "little")
        file.seek(INDEX_HEADER_BYTES + 4 * sequences + 8 * (sequences - 1))
        last_pointer = int.from_bytes(file.read(8), "little")
    expected = last_pointer + last_length * token_bytes
    if tokens.stat().st_size != expected:
        raise DataError(f"{tokens}: {tokens.stat().st_size} bytes where {index.name} promises {expected}: truncated")


def _check_manifest(manifest: Path, tokens: Path, index: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    if not manifest.is_file():
        raise DataError(f"{manifest}: no such file, so the tokenizer is unknown: preprocess.py writes it last")
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        made_with, files = content["tokenizer"], content["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest}: not a manifest of preprocess.py ({error})") from None
    for path, kind in ((tokens, "bin"), (index, "idx")):
        if path.stat().st_size != files[kind]["bytes"]:
            raise DataError(f"{path}: {path.stat().st_size} bytes where its manifest says {files[kind]['bytes']}")
    if made_with["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"{manifest}: the data was made with tokenizer {made_with['spec']} (fingerprint "
            f"{made_with['fingerprint'][:12]}), not with data.tokenizer = {tokenizer.spec} "
            f"({tokenizer.fingerprint[:12]}): give that one, or preprocess the data again"
        )
    return dict(content)


def _check_ends(prefix: str, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Documents can be told apart only by the token that the tokenizer ends them with."""
    end = manifest["tokenizer"].get("end_of_document_id")
    if manifest.get("options", {}).get("end_of_document") == "none" or end != tokenizer.end_of_document_id:
        raise DataError(
            f"{prefix}: its documents do not end with token {tokenizer.end_of_document_id}, by which "
            "data.separate_documents tells them apart: preprocess with --end-of-document append, or set that to false"
        )


def data_identity(config: Config, tokenizer: Tokenizer, train_data: Any) -> str:
    """A hash of what fixes the order of training samples: blend, tokenizer, sequence length, seed.

    Datasets count by their content, so that they may lie elsewhere after a resume. The length of the run counts only
    where a dataset is repeated: megatron-core shuffles all of its epochs together, so that more of them change the
    order from the beginning.
    """
    blend = []
    for source in config.data.train:
        manifest = json.loads(Path(f"{source.prefix}.manifest.json").read_text(encoding="utf-8"))
        blend.append([manifest["files"]["bin"]["sha256"], source.weight])
    repeated = [
        dataset.num_samples if dataset._get_num_epochs(dataset._get_num_tokens_per_epoch()) > 1 else None
        for dataset in getattr(train_data, "datasets", [train_data])
    ]
    parts = [blend, repeated, tokenizer.fingerprint, config.train.sequence_length, config.train.seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def build_datasets(
    config: Config, tokenizer: Tokenizer, cache_dir: Path, say: Say = print, train_samples: int | None = None
) -> tuple[Any, Any | None]:
    """The training and validation datasets; rank 0 makes their sample indices, or checks those in the cache.

    Args:
        config: checked recipe; the validation set covers evaluation.batches.
        tokenizer: that the data was made with.
        cache_dir: folder of the sample indices, which all ranks see.
        say: takes one line on each blend whose indices are built, on rank 0.
        train_samples: that the training set covers; None: train.steps of train.global_batch_size.

    Returns:
        Training dataset, and the validation dataset or None.

    Raises:
        DataError: the cache folder cannot be written or is not shared; on every rank.
    """
    blends = blends_of(config, tokenizer, cache_dir, train_samples)
    datasets: list[Any | None] = [None] * len(blends)
    with raised_on_every_rank():  # which is also what the other ranks wait at
        if dist.get_rank() == 0:
            datasets = [blend.make_indices(say) for blend in blends]
    with raised_on_every_rank():
        train, *validation = [
            blend.open() if dataset is None else dataset for dataset, blend in zip(datasets, blends, strict=True)
        ]
    return train, validation[0] if validation else None


def training_batches(
    dataset: Any, config: Config, rank: int, ranks: int, consumed_samples: int = 0, data_begin: int = 0
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of one training step after the other, the ramp of the batch size included.

    Args:
        dataset: maps a sample's index to its tensors [S].
        config: batch sizes, and how many loader processes read.
        rank: data-parallel rank.
        ranks: data-parallel size.
        consumed_samples: samples that earlier steps took, over all ranks.
        data_begin: how many of them were of other data, before the first sample of these.
    """
    return _batches(
        dataset,
        config,
        (rank, ranks),
        consumed_samples - data_begin,
        lambda taken: batch_size_after(config.train, data_begin + taken),
    )


def global_batches(dataset: Any, config: Config, rank: int, ranks: int) -> Iterator[list[Batch]]:
    """This rank's micro-batches of one batch of train.global_batch_size after the other; arguments as above."""
    return _batches(dataset, config, (rank, ranks), 0, lambda _: config.train.global_batch_size)


def _batches(
    dataset: Any, config: Config, place: tuple[int, int], consumed_samples: int, size_after: Callable[[int], int]
) -> Iterator[list[Batch]]:
    (rank, ranks), micro = place, config.train.micro_batch_size

    def batches() -> Iterator[range]:  # a generator, because the indices of a whole run would fill memory
        first = consumed_samples
        while (end := first + size_after(first)) <= len(dataset):
            yield range(first, end)
            first = end

    indices = (
        list(range(start, start + micro))
        for batch in batches()
        for start in range(batch.start + rank * micro, batch.stop, micro * ranks)
    )
    loader = DataLoader(
        dataset,
        batch_sampler=indices,
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.data.num_workers > 0,
        worker_init_fn=serve_this_rank,
    )
    micro_batches = iter(loader)
    for batch in batches():
        yield list(itertools.islice(micro_batches, len(batch) // (micro * ranks)))
