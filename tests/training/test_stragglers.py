"""A rank that is slow is named; ranks that are not, are not."""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import Config
from dsmoe_megatron.training.stragglers import named_now, ratios_to_median
from tests.pretrain_job import SmallData, read_lines, run_config
from tests.worker_pool import WorkerPool


class SlowData:
    """A dataset on a slow disk."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.3)
        return self.dataset[index]


def slow_job(config: Config, slow_rank: int) -> str:
    """Train with one rank whose data comes slowly; returns what the run printed on this rank."""
    import torch
    import torch.distributed as dist

    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.runtime.processes import StopSignals
    from dsmoe_megatron.training.loop import TrainingRun, open_data

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        tokenizer = open_data(config)
        Path(config.train.run_dir).mkdir(exist_ok=True)
        with model_parallel_groups(config.parallel, config.train.seed):
            run = TrainingRun(config, torch.device("cpu"), tokenizer, Path(config.train.run_dir), StopSignals())
            if dist.get_rank() == slow_rank:
                run.train_data = SlowData(run.train_data)
            run.train()
    return printed.getvalue()


def test_a_slow_rank_is_named_once(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = run_config(small_data, run_dir, train={"steps": 4}, logging={"interval": 1, "tensorboard": False})

    printed = worker_pool.run(2, slow_job, config, 1)[0]

    lines = [line for line in read_lines(run_dir) if "lm_loss" in line]
    assert [line["slowest_rank"] for line in lines] == [1, 1, 1, 1]
    # 4 samples on each rank; the steps of both last equally long, since the first waits for the second
    assert all(line["rank_time_max_s"] > 4 * 0.3 for line in lines)
    assert all(line["rank_time_median_s"] < line["rank_time_max_s"] for line in lines)
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: rank 1 on ")


def test_stages_are_compared_among_themselves() -> None:
    seconds, stages = [1.0, 1.0, 1.2, 3.0, 2.0, 3.0], [0, 0, 0, 1, 1, 1]

    assert ratios_to_median(seconds, stages) == pytest.approx([1, 1, 1.2, 1, 2 / 3, 1])
    assert ratios_to_median([1.0, 2.0], [0, 0]) == [1, 2]


def test_a_rank_must_be_slow_for_three_reports_in_a_row() -> None:
    counts: dict[int, int] = {}
    slow, even = [1.0, 1.5, 1.0], [1.0, 1.2, 1.0]

    reports = [slow, slow, even, slow, slow, slow, slow, even, slow, slow, slow]

    assert [named_now(report, counts) for report in reports] == [[], [], [], [], [], [1], [], [], [], [], [1]]
