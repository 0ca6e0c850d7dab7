"""`pretrain --check`: it says what a run would meet, and touches none."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_megatron.config import Config, DatasetSource
from dsmoe_megatron.config_parsing import save_config
from dsmoe_megatron.runtime.distributed import deterministic_algorithms
from tests.pretrain_job import SmallData, pretrain_job, run_config, training_lines
from tests.worker_pool import WorkerPool

ROOT = Path(__file__).resolve().parents[2]


def check(config: Config, processes: int) -> "subprocess.CompletedProcess[str]":
    recipe = Path(config.train.run_dir).parent / "recipe.yaml"
    save_config(config, recipe)
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [*launcher, "dsmoe_megatron", "pretrain", "--check", "--config", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(1, {}), (4, {"tensor": 2, "sequence": True, "pipeline": 2})],
    ids=["one process", "TP2+SP x PP2"],
)
def test_a_recipe_that_runs(small_data: SmallData, tmp_path: Path, processes: int, parallel: dict[str, Any]) -> None:
    """The data is there on one process, and not there on four."""
    config = run_config(small_data, tmp_path / "run", parallel=parallel, train={"deterministic": True})
    if processes > 1:
        config.data.train = [DatasetSource(str(tmp_path / "elsewhere"))]
        config.data.validation = []
        config.model.vocab_size = 500
    (tmp_path / "run").mkdir()

    done = check(config, processes)

    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert set(rows) == {"data", "parameters", "processes", "first step", "second step", "memory", "checkpoint"}
    assert ("not there" in rows["data"]) == (processes > 1)
    assert list((tmp_path / "run").iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]


def test_what_stands_in_the_way_is_one_line(small_data: SmallData, tmp_path: Path) -> None:
    config = run_config(small_data, tmp_path / "run")
    config.data.train = [DatasetSource(str(tmp_path / "half"))]
    (tmp_path / "half.bin").write_bytes(bytes(100))

    done = check(config, 1)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("half.idx: no such file; the prefix is the path without .bin/.idx")
    assert "Traceback" not in done.stderr


def deterministic_job(config: Config) -> str:
    with deterministic_algorithms(config.train.deterministic):
        return pretrain_job(config)


def test_the_deterministic_mode_changes_nothing_on_a_cpu(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    """Every operation of a step has an algorithm that repeats: torch would refuse the others."""
    for name, wanted in (("plain", False), ("deterministic", True)):
        train = {"steps": 2, "deterministic": wanted}
        worker_pool.run(2, deterministic_job, run_config(small_data, tmp_path / name, train=train))

    assert training_lines(tmp_path / "plain") == training_lines(tmp_path / "deterministic")


def test_the_deterministic_mode_refuses_what_does_not_repeat() -> None:
    def put_twice() -> torch.Tensor:
        return torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    with deterministic_algorithms(True), pytest.raises(RuntimeError, match="deterministic"):
        put_twice()
    put_twice()
