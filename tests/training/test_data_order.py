"""Which samples a run sees: fixed by how many it has seen, whatever the data-parallel size; each once per epoch."""

from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import Config, DatasetSource, TrainConfig
from tests.pretrain_job import SmallData, pretrain_job, refused_job, run_config
from tests.worker_pool import WorkerPool


class Indices:
    """A dataset that shows which of its samples are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def dealt(size: int, segments: list[tuple[int, int, int, int]]) -> list[list[int]]:
    """Indices of each global batch, over all ranks, of a run in segments.

    Args:
        size: samples of an epoch.
        segments: steps, ranks, micro-batch size and global batch size of each.
    """
    from dsmoe_megatron.training.data import training_batches

    consumed, batches = 0, []
    for steps, ranks, micro, batch in segments:
        config = Config(train=TrainConfig(micro_batch_size=micro, global_batch_size=batch))
        feeds = [training_batches(Indices(size), config, rank, ranks, consumed) for rank in range(ranks)]
        for _ in range(steps):
            micro_batches = [next(feed) for feed in feeds]
            # micro-batch k of all ranks comes before micro-batch k + 1 of any
            batches.append([int(i) for parts in zip(*micro_batches, strict=True) for part in parts for i in part])
        consumed += steps * batch
    return batches


@pytest.mark.parametrize(
    "segments",
    [
        [(6, 1, 1, 8)],
        [(1, 1, 8, 8), (2, 2, 2, 8), (3, 4, 1, 8)],
        [(2, 4, 2, 8), (1, 1, 2, 8), (2, 2, 4, 8), (1, 8, 1, 8)],
        [(1, 2, 1, 16), (4, 4, 1, 8)],
    ],
    ids=["one rank", "DP1, DP2, DP4", "DP4, DP1, DP2, DP8", "another batch size"],
)
def test_every_sample_once_and_in_order(segments: list[tuple[int, int, int, int]]) -> None:
    batches = dealt(48, segments)

    assert [index for batch in batches for index in batch] == list(range(48))


def recording_job(config: Config) -> tuple[str, list[int]]:
    """Train; returns what was printed and the indices of the samples that this rank read."""
    read: list[int] = []

    def record(run: Any) -> None:
        run.train_data = Recording(run.train_data, read)

    return pretrain_job(config, prepare=record), read


class Recording:
    """A dataset that notes which of its samples are read."""

    def __init__(self, dataset: Any, read: list[int]) -> None:
        self.dataset, self.read = dataset, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return self.dataset[index]


def read_by_all(answers: list[tuple[str, list[int]]]) -> list[int]:
    return sorted(index for _, read in answers for index in read)


def test_a_resumed_run_reads_on_where_it_was_left(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    """Two steps of 8 on one process, two on two, then, asked for, two in batches of 12."""
    schedule = {"optimizer": {"decay_steps": 6}}
    first = worker_pool.run(1, recording_job, run_config(small_data, tmp_path, train={"steps": 2}, **schedule))
    second = worker_pool.run(2, recording_job, run_config(small_data, tmp_path, train={"steps": 4}, **schedule))
    other_batch: dict[str, Any] = {"train": {"steps": 6, "global_batch_size": 12}, **schedule}
    [refused] = worker_pool.run(1, refused_job, run_config(small_data, tmp_path, **other_batch))
    other_batch["checkpoint"] = {"allow_other_data": True}
    third = worker_pool.run(1, recording_job, run_config(small_data, tmp_path, **other_batch))

    assert read_by_all(first) == list(range(16))
    assert read_by_all(second) == list(range(16, 32))
    assert "ConfigurationError: train.global_batch_size = 12: " in refused
    assert "was trained with 8" in refused
    assert "checkpoint.allow_other_data" in refused
    assert read_by_all(third) == list(range(32, 56))


def test_other_data_are_read_from_their_beginning_where_that_is_asked_for(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    worker_pool.run(1, pretrain_job, run_config(small_data, tmp_path, train={"steps": 2}))
    other: dict[str, Any] = {
        "data": {"train": [DatasetSource(small_data.validation)]},
        "checkpoint": {"allow_other_data": True, "interval": 2},
    }

    [(printed, read)] = worker_pool.run(1, recording_job, run_config(small_data, tmp_path, train={"steps": 4}, **other))
    # it goes on with these data without being asked again
    other["checkpoint"] = {}
    [(_, then_read)] = worker_pool.run(1, recording_job, run_config(small_data, tmp_path, **other))

    assert "other data than the checkpoint's: they are read from their beginning" in printed
    assert read == list(range(16))
    assert then_read == list(range(16, 32))
