"""Traces of chosen steps, and a profiler that fails."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config, ProfileConfig
from tests.pretrain_job import SmallData, pretrain_job, run_config, training_lines
from tests.worker_pool import WorkerPool


def profiled(small_data: SmallData, run_dir: Path, steps: int, **profile: Any) -> Config:
    logging = {"profile": ProfileConfig(**profile), "tensorboard": False}
    return run_config(small_data, run_dir, train={"steps": steps}, logging=logging)


def events_of(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace, "rt") as file:
        return list(json.load(file)["traceEvents"])


def test_chosen_steps_of_every_rank_are_recorded(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    config = profiled(small_data, tmp_path, 4, first_step=2, last_step=3, every_rank=True, memory=True)

    printed = worker_pool.run(2, pretrain_job, config)

    traces = sorted((tmp_path / "profile").iterdir())
    assert [path.name for path in traces] == [f"steps_00000002_to_00000003_rank_0000{rank}.json.gz" for rank in (0, 1)]
    steps = [event for event in events_of(traces[1]) if str(event.get("name", "")).startswith("Optimizer.step")]
    assert len(steps) == 2 * 2  # there is an optimizer of the experts and one of the rest
    for text in printed:
        peak = re.search(r"held ([\d.]+) MiB", text)
        assert peak is not None
        assert 0.1 < float(peak[1]) < 100


def test_a_run_that_ends_early_leaves_what_it_has(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    worker_pool.run(2, pretrain_job, profiled(small_data, tmp_path, 2, first_step=2))

    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_00000002_to_00000002_rank_00000.json.gz"


def test_a_profiler_that_fails_does_not_end_the_run(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    (tmp_path / "profile").write_text("a file, not a folder")

    printed = worker_pool.run(1, pretrain_job, profiled(small_data, tmp_path, 3, first_step=1, last_step=1))[0]

    assert printed.count("the profiler is off, the run goes on without it: FileExistsError") == 1
    assert list(training_lines(tmp_path)) == [1, 2, 3]
