"""The emulated cluster is a cluster: jobs span its nodes, a lost node is noticed, and nothing of it stays."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import ClusterError, SlurmCluster

ROOT = Path(__file__).resolve().parents[2]


def batch_script(folder: Path, *lines: str) -> Path:
    script = folder / "job.sh"
    script.write_text("\n".join(("#!/usr/bin/env bash", *lines, "")))
    return script


def poll_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not met after {timeout} s"
        time.sleep(0.05)


def processes_of(cluster: Path) -> list[str]:
    """Names of this machine's processes that belong to the cluster in a folder."""
    return processes_with(f"SLURM_CONF={cluster}/")


def processes_with(mark: str) -> list[str]:
    """Names of this machine's processes that have `mark` in their environment."""
    names = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                names.append((process / "comm").read_text().strip())
        except OSError:  # it ended meanwhile
            continue
    return sorted(names)


def test_a_job_of_two_nodes_runs_a_task_on_each(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    task = "echo $SLURM_PROCID $SLURM_NODEID $(hostname) $CUDA_VISIBLE_DEVICES"
    script = batch_script(tmp_path, f"srun bash -c '{task}'")

    job = slurm_cluster.submit(
        script, options=["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--output=out"], cwd=tmp_path
    )
    slurm_cluster.wait(job)

    assert sorted((tmp_path / "out").read_text().splitlines()) == ["0 0 n1 0,1", "1 1 n2 0,1"]


def test_scancel_ends_a_job(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    job = slurm_cluster.submit(batch_script(tmp_path, "sleep infinity"), options=["--output=out"], cwd=tmp_path)
    slurm_cluster.wait(job, until="RUNNING")

    assert slurm_cluster.run(["scancel", str(job)]).returncode == 0

    slurm_cluster.wait(job, until="CANCELLED")


def test_a_failed_job_is_told_with_what_it_and_slurm_said(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    job = slurm_cluster.submit(batch_script(tmp_path, "echo no such luck", "exit 3"), cwd=tmp_path)

    with pytest.raises(ClusterError, match=rf"^job {job} ended in state FAILED, not COMPLETED\n") as caught:
        slurm_cluster.wait(job)

    for part in ("slurmctld.log", "slurmd.n1.log", "slurmd.n2.log", "ExitCode=3:0", "no such luck"):
        assert part in str(caught.value)


def test_a_command_has_its_folder_environment_and_files(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    ask = "import os, sys; print(os.getcwd(), os.environ['COLOUR'], os.environ.get('HOME')); sys.exit(5)"

    finished = slurm_cluster.run([sys.executable, "-c", ask], tmp_path, {"COLOUR": "red", "PATH": os.environ["PATH"]})

    assert (finished.returncode, finished.stdout, finished.stderr) == (5, f"{tmp_path} red None\n", "")


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(slurm_cluster: SlurmCluster) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        slurm_cluster.run(["bash", "-c", "sleep infinity & wait"], env={**os.environ, "IS_LATE": "yes"}, timeout=0.5)

    poll_until(lambda: processes_with("IS_LATE=yes") == [])


def test_a_cut_link_is_cut_and_mended(slurm_cluster: SlurmCluster) -> None:
    def answers() -> bool:
        return slurm_cluster.run(["timeout", "1", "bash", "-c", "< /dev/tcp/n2/6818"]).returncode == 0

    assert answers()
    slurm_cluster.set_link("n2", up=False)
    assert not answers()
    slurm_cluster.set_link("n2", up=True)
    poll_until(answers)


@pytest.mark.usefixtures("slurm_programs")
def test_the_job_of_a_killed_node_runs_again_elsewhere(tmp_path: Path) -> None:
    script = batch_script(
        tmp_path, "echo $(hostname) ${SLURM_RESTART_COUNT:-0} >> runs", "((SLURM_RESTART_COUNT)) || sleep infinity"
    )
    runs = tmp_path / "runs"
    with SlurmCluster(node_timeout=4) as cluster:
        job = cluster.submit(script, cwd=tmp_path)
        poll_until(lambda: runs.exists() and runs.read_text() == "n1 0\n")
        cluster.kill_node("n1")
        cluster.wait_for_node("n1", ("down", "down*"))
        cluster.wait(job)
        assert runs.read_text() == "n1 0\nn2 1\n"

        cluster.start_node("n1")
        cluster.wait_for_node("n1", ("idle",))


@pytest.mark.usefixtures("slurm_programs")
def test_nothing_stays_of_a_cluster_that_is_left_by_an_error(tmp_path: Path) -> None:
    cluster = SlurmCluster()
    programs = {"munged", "slurmctld", "slurmd", "slurmstepd", "sleep"}

    def use_and_fail() -> None:
        with cluster:
            cluster.submit(batch_script(tmp_path, "sleep infinity"), cwd=tmp_path)
            poll_until(lambda: programs <= set(processes_of(cluster.folder)))
            raise LookupError("of the test")

    with pytest.raises(LookupError, match="of the test"):
        use_and_fail()

    assert processes_of(cluster.folder) == []
    assert not cluster.folder.exists()


@pytest.mark.usefixtures("slurm_programs")
def test_nothing_stays_of_a_cluster_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "slurmd"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cluster = SlurmCluster()

    with pytest.raises(ClusterError, match=r"^slurmd on n1: exit 1: out of order\n(?s:.*)slurmctld\.log"), cluster:
        pass

    assert processes_of(cluster.folder) == []
    assert not cluster.folder.exists()


@pytest.mark.usefixtures("slurm_programs")
def test_no_process_stays_when_the_test_run_is_killed() -> None:
    program = (
        "import signal\n"
        "from tests.slurm.cluster import SlurmCluster\n"
        "with SlurmCluster() as cluster:\n"
        "    print(cluster.folder, flush=True)\n"
        "    signal.pause()\n"
    )
    test_run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert test_run.stdout is not None
    folder = Path(test_run.stdout.readline().strip())
    assert "slurmd" in processes_of(folder)

    test_run.send_signal(signal.SIGKILL)
    test_run.communicate()

    poll_until(lambda: processes_of(folder) == [])
    shutil.rmtree(folder)
