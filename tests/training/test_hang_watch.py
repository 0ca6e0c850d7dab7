"""A run that does not get on ends with every rank's stack and one line on who holds it up."""

import contextlib
import io
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config
from dsmoe_megatron.training.hang_watch import HangWatch
from tests.pretrain_job import SmallData, pretrain_job, run_config
from tests.worker_pool import WorkerPool

LIMIT_SECONDS = 0.4


def read_a_batch_for_ever() -> None:
    while True:
        time.sleep(0.01)


def stuck_rank(run_dir: Path, rank: int, ranks: int) -> None:
    """Take three steps and get stuck; what it says goes to a file."""
    said = (run_dir / f"said_{rank}").open("w", buffering=1)
    with contextlib.redirect_stderr(said):
        watch = HangWatch(run_dir, LIMIT_SECONDS, rank, ranks)
        with watch.watching():
            for step in (1, 2, 3):
                time.sleep(LIMIT_SECONDS * 0.7)  # longer in all than the limit
                watch.beat(f"step {step}")
            read_a_batch_for_ever()


def test_every_rank_leaves_its_stack_and_one_of_them_a_line(tmp_path: Path) -> None:
    """Three ranks hang, of which one is stopped and cannot write."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=stuck_rank, args=(tmp_path, rank, 3)) for rank in range(3)]
    for process in ranks:
        process.start()
    time.sleep(LIMIT_SECONDS)
    os.kill(ranks[2].pid or 0, signal.SIGSTOP)
    for process in ranks[:2]:
        process.join(20)
    ranks[2].kill()

    assert [process.exitcode for process in ranks[:2]] == [1, 1]
    for rank in (0, 1):
        stack = (tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert f"rank {rank} on {os.uname().nodename}, process {ranks[rank].pid}" in stack
        assert "in read_a_batch_for_ever" in stack
    said = [(tmp_path / f"said_{rank}").read_text() for rank in (0, 1)]
    assert sorted(text.count("\n") for text in said) == [0, 1]
    line = "".join(said)
    assert "no progress for 0.00666667 minutes (train.timeout_minutes) after step 3: rank 0 on" in line
    assert "is in read_a_batch_for_ever (" in line
    assert "rank 2 does not answer (stopped, killed or its node lost)" in line


def beats_job(config: Config) -> list[str]:
    """Train; returns what this rank told its watch."""
    beats: list[str] = []
    pretrain_job(config, prepare=lambda run: setattr(run, "beat", beats.append))
    return beats


def test_a_step_a_validation_and_a_save_have_the_limit_each(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "evaluation": {"batches": 1, "policies": []},
        "checkpoint": {"interval": 1, "asynchronous": False},
    }
    config = run_config(small_data, tmp_path, train={"steps": 2}, **sections)

    for beats in worker_pool.run(2, beats_job, config):
        assert beats == [
            *("step 1", "the save of step 1"),
            *("step 2", "a batch of the validation at step 2", "the save of step 2"),
        ]


def test_a_run_that_gets_on_is_left_alone(tmp_path: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        watch = HangWatch(tmp_path, LIMIT_SECONDS, rank=0, ranks=1)
        with watch.watching():
            for step in range(8):
                time.sleep(LIMIT_SECONDS / 4)
                watch.beat(f"step {step}")
        time.sleep(2 * LIMIT_SECONDS)

    assert said.getvalue() == ""
    assert not (tmp_path / "stacks").exists()
