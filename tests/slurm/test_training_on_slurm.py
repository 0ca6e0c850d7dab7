"""Real training through a launcher on a real cluster: whatever ends a job, its run goes on as if nothing had been.

Ranks are frozen (SIGSTOP) while a test waits for SLURM, so that a run of few steps is in its middle whenever that acts.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from dsmoe_megatron.config_parsing import save_config
from tests.pretrain_job import SmallData, read_lines, run_config, training_lines
from tests.slurm.cluster import SlurmCluster
from tests.slurm.test_cluster import poll_until

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "pretrain_1b.sh"
STEPS, SAVED_EVERY = 12, 4
SLOW = 240.0  # seconds for what takes ten on an idle machine


@pytest.fixture(scope="module")
def cluster(slurm_programs: None) -> Iterator[SlurmCluster]:  # noqa: ARG001
    """Three nodes, so that a job of two has a place when one is lost."""
    with SlurmCluster(nodes=3, cpus_per_node=4, gpus_per_node=2) as started:
        yield started


@dataclass
class Run:
    """A run folder and the jobs that train in it."""

    cluster: SlurmCluster
    recipe: Path
    run_dir: Path

    def submit(self, nodes: int = 2) -> "Job":
        others = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "DSMOE_"))
        }
        number = self.cluster.submit(
            LAUNCHER,
            *("--config", str(self.recipe)),
            options=[f"--nodes={nodes}", "--gpus-per-node=2", "--time=10", "--output=%j.log"],
            cwd=self.run_dir.parent,
            env={**others, "DSMOE_PYTHON": sys.executable, "DSMOE_PROCESSES_PER_NODE": "2", "DSMOE_SITE": os.devnull},
        )
        return Job(self, number)

    def last_step(self) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return max(training_lines(self.run_dir), default=0)
        return 0

    def checkpoint(self) -> int:
        """Step of the newest checkpoint."""
        latest = self.run_dir / "latest"
        return int(latest.read_text().removeprefix("step_")) if latest.is_file() else 0


@dataclass
class Job:
    run: Run
    number: int

    def log(self) -> str:
        path = self.run.run_dir.parent / f"{self.number}.log"
        return path.read_text() if path.is_file() else ""

    def ranks(self) -> dict[int, psutil.Process]:
        """Its ranks' processes, on whichever node."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "torch.distributed.run" in process.cmdline() or "pretrain" not in process.cmdline():
                    continue
                environment = process.environ()
                if environment.get("SLURM_JOB_ID") == str(self.number) and "RANK" in environment:
                    found[int(environment["RANK"])] = process
        return found

    def signal_ranks(self, number: signal.Signals) -> None:
        for process in self.ranks().values():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    @contextlib.contextmanager
    def frozen(self, when: Callable[[], object]) -> Iterator[None]:
        """Its ranks stand still in the block, which begins in the middle of the run."""
        poll_until(lambda: bool(when()) or self.state() not in ("PENDING", "CONFIGURING", "RUNNING"), SLOW)
        self.signal_ranks(signal.SIGSTOP)
        try:
            assert 0 < self.run.last_step() < STEPS, self.log()
            yield
        finally:
            self.signal_ranks(signal.SIGCONT)

    def state(self) -> str:
        return self.run.cluster.state(self.number)

    def says(self, text: str) -> None:
        poll_until(lambda: text in self.log(), SLOW)

    def wait(self, until: str = "COMPLETED") -> None:
        self.run.cluster.wait(self.number, until, SLOW)


@pytest.fixture(scope="module")
def run_of(
    cluster: SlurmCluster, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Run:
        sections: dict[str, dict[str, Any]] = {
            "parallel": {"tensor": 2},
            "train": {"steps": STEPS},
            "checkpoint": {"interval": SAVED_EVERY},
            "evaluation": {"interval": 6, "batches": 1},
        }
        config = run_config(small_data, folder / name, **sections)
        recipe = folder / f"{name}.yaml"
        save_config(config, recipe)
        return Run(cluster, recipe, folder / name)

    return make


@pytest.fixture(scope="module")
def whole_run(run_of: Callable[[str], Run]) -> Path:
    """A run without disturbance, but that another job tries to train in its folder."""
    run = run_of("whole")
    first = run.submit()
    with first.frozen(lambda: run.last_step() >= 2):
        second = run.submit(nodes=1)
        second.wait("FAILED")
    first.wait()
    refusals = [line for line in second.log().splitlines() if "another job trains in this folder" in line]
    assert len(refusals) == 1
    assert f"job {first.number}" in refusals[0]
    assert "not requeued" in second.log()
    return run.run_dir


def assert_trained_as(run_dir: Path, whole_run: Path) -> None:
    """The same digits in every line, training and validation."""
    assert training_lines(run_dir) == training_lines(whole_run)
    assert [line["step"] for line in read_lines(run_dir) if "lm_loss" in line] == [*range(1, STEPS + 1)]
    validations = [[line for line in read_lines(run) if "policies" in line] for run in (run_dir, whole_run)]
    assert validations[0] == validations[1]


def test_two_nodes_train_and_a_second_job_is_kept_out(whole_run: Path) -> None:
    assert [*training_lines(whole_run)] == [*range(1, STEPS + 1)]
    assert (whole_run / "latest").read_text().strip() == f"step_{STEPS:08d}"
    assert list(whole_run.glob("slurm_*")) == []


def test_the_time_limit_saves_and_requeues(run_of: Callable[[str], Run], whole_run: Path) -> None:
    run = run_of("limited")
    job = run.submit()
    with job.frozen(lambda: run.last_step() >= 2):
        # the launcher asks for a signal 300 s before the end; SLURM looks at limits twice a minute
        changed = run.cluster.run(["scontrol", "update", f"JobId={job.number}", "TimeLimit=3"])
        assert changed.returncode == 0, changed.stderr
        poll_until(lambda: all(signal.SIGUSR1 in pending(rank) for rank in job.ranks().values()), SLOW)
        stopped_after = run.last_step()
        run.cluster.run(["scontrol", "update", f"JobId={job.number}", "TimeLimit=10"])
    job.says("requeued at step")
    assert stopped_after <= run.checkpoint() <= stopped_after + 2
    job.wait()

    assert "SIGUSR1: stops after step" in job.log()
    assert "ChildFailedError" not in job.log()  # every rank ended with code 0
    assert_trained_as(run.run_dir, whole_run)


def test_a_killed_rank_is_made_up_for(run_of: Callable[[str], Run], whole_run: Path) -> None:
    run = run_of("killed")
    job = run.submit()
    with job.frozen(run.checkpoint):
        job.ranks()[3].kill()
    job.wait()

    assert "srun ended with exit code" in job.log()
    assert "requeued at step" in job.log()
    assert_trained_as(run.run_dir, whole_run)


def test_a_lost_node_is_replaced(run_of: Callable[[str], Run], whole_run: Path) -> None:
    run = run_of("lost")
    job = run.submit()
    with job.frozen(run.checkpoint):
        run.cluster.kill_node("n2")
    try:
        job.wait()
        assert run.cluster.node_state("n2") in ("down", "down*")
    finally:
        run.cluster.start_node("n2")
        run.cluster.wait_for_node("n2", ["idle"])

    assert_trained_as(run.run_dir, whole_run)


def test_scancel_saves_and_does_not_requeue(run_of: Callable[[str], Run]) -> None:
    run = run_of("cancelled")
    job = run.submit()
    with job.frozen(lambda: run.last_step() >= 2):
        run.cluster.run(["scancel", str(job.number)])
    job.wait("CANCELLED")

    assert "stops after step" in job.log()  # at SIGTERM from SLURM or SIGUSR1 from the launcher, whichever is first
    assert 2 <= run.checkpoint() < STEPS
    assert "requeued at step" not in job.log()


def pending(process: psutil.Process) -> set[int]:
    """Signals that a process has been sent and not taken yet."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("ShdPnd:"):
                mask = int(line.split()[1], 16)
                return {number for number in range(1, 65) if mask >> (number - 1) & 1}
    return set()
