"""A signal to stop, to any rank: the step is finished and saved, and the next start goes on as if nothing had been."""

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain_job import SmallData, pretrain_job, read_lines, run_config, stopped_job, training_lines
from tests.worker_pool import WorkerPool

SECTIONS: dict[str, dict[str, Any]] = {
    "evaluation": {"interval": 1, "batches": 1},
    "checkpoint": {"interval": 100},
    "train": {"steps": 9},
}


@pytest.fixture(scope="module")
def whole_run(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("stopping") / "whole"
    worker_pool.run(2, pretrain_job, run_config(small_data, run_dir, **SECTIONS))
    return run_dir


@pytest.mark.parametrize(("rank", "number", "times"), [(1, signal.SIGUSR1, 1), (0, signal.SIGTERM, 40)])
def test_a_signal_saves_and_the_next_start_goes_on(
    worker_pool: WorkerPool,
    small_data: SmallData,
    whole_run: Path,
    tmp_path: Path,
    rank: int,
    number: signal.Signals,
    times: int,
) -> None:
    """The many signals arrive during the save and after it; validation that was due is made up for."""
    config = run_config(small_data, tmp_path, **SECTIONS)
    printed = worker_pool.run(2, stopped_job, config, rank, number, 2, times)[0]
    stopped_at = max(training_lines(tmp_path))
    assert f"{number.name}: stops after step {stopped_at}" in printed
    assert 2 <= stopped_at < 9
    assert (tmp_path / "latest").read_text().strip() == f"step_{stopped_at:08d}"

    worker_pool.run(2, pretrain_job, config)

    assert training_lines(tmp_path) == training_lines(whole_run)
    validations = [[line for line in read_lines(run) if "policies" in line] for run in (tmp_path, whole_run)]
    assert validations[0] == validations[1]
    others = [[line for line in read_lines(run) if "save_s" not in line] for run in (tmp_path, whole_run)]
    assert len(others[0]) == len(others[1])


def test_a_signal_before_the_first_step_ends_the_run_without_one(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    printed = worker_pool.run(2, stopped_job, run_config(small_data, tmp_path), 1, signal.SIGTERM, 0, 1)[0]

    assert "SIGTERM: stops after step 0" in printed
    assert not (tmp_path / "latest").exists()
