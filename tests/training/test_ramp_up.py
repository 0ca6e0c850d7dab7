"""A run whose batches grow: what it consumes, that it resumes within the ramp, that the layout changes nothing."""

from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import Config, RampUpConfig
from tests.pretrain_job import SmallData, pretrain_job, run_config, training_lines
from tests.worker_pool import WorkerPool

SIZES = [4, 4, 8, 12, 12, 12]  # each of the two sizes below 12 has 7.5 of the 15 samples of the ramp


def ramped(small_data: SmallData, run_dir: Path, **sections: Any) -> Config:
    train = {"global_batch_size": 12, "ramp_up": RampUpConfig(4, 4, 15)}
    checkpoint = {"interval": 2, "keep_last": 0, **sections.pop("checkpoint", {})}
    return run_config(small_data, run_dir, train=train, checkpoint=checkpoint, **sections)


@pytest.fixture(scope="module")
def ramped_run(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("ramp") / "whole"
    worker_pool.run(1, pretrain_job, ramped(small_data, run_dir))
    return run_dir


def test_batches_grow_and_tokens_follow(ramped_run: Path) -> None:
    lines = training_lines(ramped_run)

    assert [line["batch_size"] for line in lines.values()] == SIZES
    assert [line["tokens"] for line in lines.values()] == [32 * sum(SIZES[:step]) for step in lines]


@pytest.mark.parametrize("step", [2, 4], ids=["within the ramp", "after it"])
def test_resumes_as_if_uninterrupted(
    worker_pool: WorkerPool, small_data: SmallData, ramped_run: Path, tmp_path: Path, step: int
) -> None:
    load = {"load": str(ramped_run / "checkpoints" / f"step_0000000{step}")}
    data = {"num_workers": 1}  # a loader that reads ahead must not lose count either

    worker_pool.run(1, pretrain_job, ramped(small_data, tmp_path, checkpoint=load, data=data))

    whole = training_lines(ramped_run)
    assert training_lines(tmp_path) == {later: whole[later] for later in range(step + 1, 7)}


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=["DP2", "PP2"])
def test_the_layout_changes_nothing(
    worker_pool: WorkerPool, small_data: SmallData, ramped_run: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    worker_pool.run(2, pretrain_job, ramped(small_data, tmp_path, parallel=parallel))

    lines = training_lines(tmp_path)
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    for step, line in training_lines(ramped_run).items():
        assert lines[step] == pytest.approx(line, rel=1e-5)
