"""sbatch takes a launcher: torchrun starts on every node and its ranks meet at one place."""

import json
import os
import sys
from pathlib import Path

from tests.slurm.cluster import SlurmCluster

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "pretrain_1b.sh"
# Stands in for the training system where torchrun is the real one.
RANK = """
import json, os, pathlib, socket, sys
if "--print_config" not in sys.argv:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    seen = {"host": socket.gethostname(), "arguments": sys.argv[1:], **{name: os.environ[name] for name in names}}
    pathlib.Path(f"rank_{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def python_with_stand_in(folder: Path) -> Path:
    """An interpreter to which RANK is the package dsmoe_megatron."""
    (folder / "stand_in" / "dsmoe_megatron").mkdir(parents=True)
    (folder / "stand_in" / "dsmoe_megatron" / "__init__.py").touch()
    (folder / "stand_in" / "dsmoe_megatron" / "__main__.py").write_text(RANK)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/stand_in:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_sbatch_starts_the_ranks_of_two_nodes_at_one_rendezvous(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "DSMOE_"))},
        "DSMOE_PYTHON": str(python_with_stand_in(tmp_path)),
        "DSMOE_PROCESSES_PER_NODE": "2",
    }

    job = slurm_cluster.submit(
        LAUNCHER,
        *("--train.steps", "2"),
        options=["--nodes=2", "--gpus-per-node=2"],
        cwd=tmp_path,
        env=environment,
    )
    slurm_cluster.wait(job)

    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(4)]
    assert [(rank["RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [(str(number), "4") for number in range(4)]
    assert sorted((rank["host"], rank["LOCAL_RANK"]) for rank in ranks) == [
        *(("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")),
    ]
    assert len({(rank["MASTER_ADDR"], rank["MASTER_PORT"]) for rank in ranks}) == 1
    assert {rank["TORCHELASTIC_RUN_ID"] for rank in ranks} == {str(job)}
    assert all(rank["arguments"][-2:] == ["--train.steps", "2"] for rank in ranks)
