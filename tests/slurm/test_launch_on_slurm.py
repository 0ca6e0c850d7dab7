"""sbatch takes a launcher: torchrun starts on every node, its ranks meet, and the job ends or is requeued as it should.

The training system has a stand-in here, which takes no seconds to load; SLURM, launcher and torchrun are the real ones.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.test_cluster import batch_script, poll_until

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "pretrain_1b.sh"
# RANK_DOES: finish, fail, or wait for a signal to stop. The run has finished when the file `finished` is there.
RANK = """
import json, os, pathlib, signal, socket, sys
if sys.argv[1] == "progress":
    print("step", 2 if pathlib.Path("finished").exists() else 0, "of 2 in a run")
    sys.exit()
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SITE", "CONTAINER")
seen = {"host": socket.gethostname(), "arguments": sys.argv[1:], **{name: os.environ.get(name) for name in names}}
signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
pathlib.Path(f"rank_{seen['TORCHELASTIC_RUN_ID']}_{os.environ['RANK']}.json").write_text(json.dumps(seen))
if os.environ["RANK_DOES"] == "fail":
    sys.exit(3)
if os.environ["RANK_DOES"] == "wait" and not pathlib.Path("go_on").exists():
    signal.pause()
pathlib.Path("finished").touch()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a job whose interpreter takes RANK for the package dsmoe_megatron, with two processes on each node."""
    (tmp_path / "stand_in" / "dsmoe_megatron").mkdir(parents=True)
    (tmp_path / "stand_in" / "dsmoe_megatron" / "__init__.py").touch()
    (tmp_path / "stand_in" / "dsmoe_megatron" / "__main__.py").write_text(RANK)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/stand_in:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    others = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "DSMOE_"))}
    ours = {"DSMOE_PYTHON": str(python), "DSMOE_PROCESSES_PER_NODE": "2", "DSMOE_SITE": os.devnull}
    return {**others, **ours, "RANK_DOES": "finish"}


def submit(cluster: SlurmCluster, folder: Path, environment: Mapping[str, str]) -> int:
    options = ["--nodes=2", "--gpus-per-node=2", "--output=log"]
    return cluster.submit(LAUNCHER, "--train.steps", "2", options=options, cwd=folder, env=environment)


def test_sbatch_starts_the_ranks_of_two_nodes_at_one_rendezvous(
    slurm_cluster: SlurmCluster, tmp_path: Path, environment: dict[str, str]
) -> None:
    site = tmp_path / "site.env"
    site.write_text("export SITE=$(hostname)\nexport DSMOE_CONTAINER='env CONTAINER=yes'\nfalse\n")

    job = submit(slurm_cluster, tmp_path, {**environment, "DSMOE_SITE": str(site)})
    slurm_cluster.wait(job)

    ranks = [json.loads((tmp_path / f"rank_{job}.0_{rank}.json").read_text()) for rank in range(4)]
    assert [(rank["RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [(str(number), "4") for number in range(4)]
    assert sorted((rank["host"], rank["LOCAL_RANK"]) for rank in ranks) == [
        *(("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")),
    ]
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1
    assert all((rank["SITE"], rank["CONTAINER"]) == (rank["host"], "yes") for rank in ranks)
    assert all(rank["arguments"][-2:] == ["--train.steps", "2"] for rank in ranks)


def test_a_job_that_fails_without_getting_on_is_not_requeued_for_ever(
    slurm_cluster: SlurmCluster, tmp_path: Path, environment: dict[str, str]
) -> None:
    job = submit(slurm_cluster, tmp_path, {**environment, "RANK_DOES": "fail", "DSMOE_RESTARTS_WITHOUT_PROGRESS": "1"})
    slurm_cluster.wait(job, until="FAILED")

    # srun's code is that of a failed torchrun or of one that it has killed, whichever comes first
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("launch.sh:")]
    assert [line for line in said if "srun ended with exit code" not in line] == [
        f"launch.sh: job {job}: requeued at step 0 of 2",
        f"launch.sh: job {job}: no checkpoint after step 0 in 2 starts in a row; not requeued",
    ]
    assert len(said) == 4
    # a rendezvous of its own for each start
    ids = {path.name.split("_")[1] for path in tmp_path.glob("rank_*.json")}
    assert ids == {f"{job}.0", f"{job}.1"}


def test_an_interrupt_to_the_batch_script_saves_and_ends_the_job(
    slurm_cluster: SlurmCluster, tmp_path: Path, environment: dict[str, str]
) -> None:
    job = submit(slurm_cluster, tmp_path, {**environment, "RANK_DOES": "wait"})
    poll_until(lambda: len(list(tmp_path.glob("rank_*.json"))) == 4)
    assert slurm_cluster.run(["scancel", "--batch", "--signal=INT", str(job)]).returncode == 0

    slurm_cluster.wait(job)

    assert f"job {job}: stopped at step 0 of 2 by SIGINT; not requeued" in (tmp_path / "log").read_text()


def test_a_preempted_job_runs_again(slurm_cluster: SlurmCluster, tmp_path: Path, environment: dict[str, str]) -> None:
    job = submit(slurm_cluster, tmp_path, {**environment, "RANK_DOES": "wait"})
    poll_until(lambda: len(list(tmp_path.glob("rank_*.json"))) == 4)
    (tmp_path / "go_on").touch()

    urgent = slurm_cluster.submit(
        batch_script(tmp_path, "exit"), options=["--partition=urgent", "--nodes=2", "--output=/dev/null"], cwd=tmp_path
    )
    slurm_cluster.wait(urgent)
    slurm_cluster.wait(job)

    assert (tmp_path / "log").read_text().splitlines()[-1] == f"launch.sh: job {job}: finished: 2 steps"
    assert len(list(tmp_path.glob(f"rank_{job}.1_*.json"))) == 4
