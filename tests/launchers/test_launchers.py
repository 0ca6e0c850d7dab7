"""One file for bash, sbatch and torchrun: what each reader makes of it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "launchers"
SIZES = ("1b", "3b", "6b")


def run(command: list[str], folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run with SLURM's and our own variables taken from `environment` alone."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DSMOE_"))}
    environment = {**inherited, "DSMOE_PYTHON": sys.executable, "DSMOE_SITE": os.devnull, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def dry_run(launcher: Path, *arguments: str, folder: Path = ROOT, **environment: str) -> list[str]:
    """Words of the command that the launcher would run."""
    finished = run(["bash", str(launcher), *arguments], folder, DSMOE_DRY_RUN="1", **environment)
    assert finished.returncode == 0, finished.stderr
    return shlex.split(finished.stdout)


@pytest.fixture
def slurm_commands(tmp_path: Path) -> Path:
    """A folder with a scontrol that answers as SLURM does for a job of two nodes, submitted from elsewhere."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scontrol = folder / "scontrol"
    scontrol.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ "$*" == "show hostnames gpu[3-4]" ]]; then printf "gpu3\\ngpu4\\n"; fi\n'
        'if [[ "$*" == "show job 12345" ]]; then\n'
        f'  printf "JobId=12345 JobName=x\\n   Command={LAUNCHERS}/pretrain_3b.sh --train.steps 2\\n   WorkDir=/\\n"\n'
        "fi\n"
    )
    scontrol.chmod(0o755)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_bash_and_python_both_read_the_file(size: str) -> None:
    launcher = LAUNCHERS / f"pretrain_{size}.sh"

    assert run(["bash", "-n", str(launcher)]).stderr == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a backslash of the bash half would be an escape to Python
        compile(launcher.read_text(), str(launcher), "exec")


def test_the_launchers_differ_in_recipe_and_resources_alone() -> None:
    def shared_lines(size: str) -> list[str]:
        lines = (LAUNCHERS / f"pretrain_{size}.sh").read_text().replace(f"dsmoe_{size}", "RECIPE").splitlines()
        return [line for line in lines if not line.startswith("#")]

    assert shared_lines("1b") == shared_lines("3b") == shared_lines("6b")


def test_bash_starts_torchrun_on_this_machine(tmp_path: Path) -> None:
    words = dry_run(LAUNCHERS / "pretrain_1b.sh", "--train.steps", "2", "--train.run_dir", "a b", folder=tmp_path)

    recipe = str(LAUNCHERS / "recipes" / "dsmoe_1b.yaml")
    assert words == [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "auto", "--standalone"),
        *("-m", "dsmoe_megatron", "pretrain", "--config", recipe, "--train.steps", "2", "--train.run_dir", "a b"),
    ]


def test_sbatch_finds_the_repository_above_the_folder_of_submission(tmp_path: Path) -> None:
    spooled = tmp_path / "slurm_script"
    shutil.copy(LAUNCHERS / "pretrain_6b.sh", spooled)

    words = dry_run(
        spooled, folder=tmp_path, SLURM_JOB_ID="7", SLURM_NNODES="1", SLURM_SUBMIT_DIR=f"{LAUNCHERS}/recipes"
    )

    assert str(LAUNCHERS / "recipes" / "dsmoe_6b.yaml") in words


def test_sbatch_takes_the_repository_of_the_file_not_of_the_folder_of_submission(
    tmp_path: Path, slurm_commands: Path
) -> None:
    other = tmp_path / "other" / "launchers"
    other.mkdir(parents=True)
    (other / "launch.sh").write_text("echo the code of another clone\n")
    spooled = tmp_path / "slurm_script"
    shutil.copy(LAUNCHERS / "pretrain_3b.sh", spooled)

    words = dry_run(
        spooled,
        folder=tmp_path,
        PATH=f"{slurm_commands}:{os.environ['PATH']}",
        SLURM_JOB_ID="12345",
        SLURM_SUBMIT_DIR=str(other),
    )

    assert str(LAUNCHERS / "recipes" / "dsmoe_3b.yaml") in words


def test_sbatch_starts_one_torchrun_on_each_node(tmp_path: Path, slurm_commands: Path) -> None:
    spooled = tmp_path / "slurm_script"
    shutil.copy(LAUNCHERS / "pretrain_3b.sh", spooled)

    words = dry_run(
        spooled,
        *("--train.steps", "2"),
        folder=tmp_path,
        DSMOE_PROCESSES_PER_NODE="8",
        PATH=f"{slurm_commands}:{os.environ['PATH']}",
        SLURM_JOB_ID="12345",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="gpu[3-4]",
        SLURM_SUBMIT_DIR="/",
        SLURM_CPUS_PER_TASK="16",
    )

    assert words[:12] == [
        *("srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1", "--kill-on-bad-exit=1"),
        *("--cpus-per-task", "16"),
        *("bash", str(LAUNCHERS / "on_node.sh")),
    ]
    torchrun = words[words.index("torch.distributed.run") + 1 : words.index("dsmoe_megatron")]
    assert torchrun == [
        *("--nproc-per-node", "8", "--nnodes", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu3:22345", "--rdzv-id", "12345.0", "-m"),
    ]
    assert words[-2:] == ["--train.steps", "2"]


def test_the_starts_of_a_batch_job_do_not_meet(tmp_path: Path, slurm_commands: Path) -> None:
    words = dry_run(
        LAUNCHERS / "pretrain_3b.sh",
        folder=tmp_path,
        PATH=f"{slurm_commands}:{os.environ['PATH']}",
        SLURM_JOB_ID="12345",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="gpu[3-4]",
        SLURM_RESTART_COUNT="2",
        ENVIRONMENT="BATCH",
    )

    assert words[words.index("--rdzv-endpoint") : words.index("--rdzv-id") + 2] == [
        *("--rdzv-endpoint", "gpu3:24363", "--rdzv-id", "12345.2"),
    ]


def test_a_batch_job_of_one_node_has_a_step_too(tmp_path: Path) -> None:
    options = ("--checkpoint.interval", "200")  # is no --check
    words = dry_run(LAUNCHERS / "pretrain_1b.sh", *options, folder=tmp_path, SLURM_JOB_ID="7", ENVIRONMENT="BATCH")

    assert words[:3] == ["srun", "--nodes", "1"]
    assert "--standalone" in words


@pytest.mark.parametrize(("step", "first"), [({}, "srun"), ({"SLURM_STEP_ID": "0"}, sys.executable)])
def test_an_allocation_of_one_node_trains_on_that_node(tmp_path: Path, step: dict[str, str], first: str) -> None:
    words = dry_run(LAUNCHERS / "pretrain_1b.sh", folder=tmp_path, SLURM_JOB_ID="7", SLURM_NNODES="1", **step)

    assert words[0] == first  # the shell of salloc is elsewhere, that of a step is there
    assert "--standalone" in words


def test_a_check_in_a_batch_job_is_not_what_the_job_is_for(tmp_path: Path) -> None:
    words = dry_run(LAUNCHERS / "pretrain_1b.sh", "--check", folder=tmp_path, SLURM_JOB_ID="7", ENVIRONMENT="BATCH")

    assert words[0] == sys.executable


def test_the_site_file_sets_interpreter_and_container(tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text(f"export DSMOE_CONTAINER='env MARK=1'\nexport DSMOE_PYTHON={sys.executable}\n")

    words = dry_run(LAUNCHERS / "pretrain_1b.sh", folder=tmp_path, DSMOE_SITE=str(site))

    assert words[:4] == ["env", "MARK=1", sys.executable, "-m"]


def test_a_site_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    finished = run(["bash", str(LAUNCHERS / "pretrain_1b.sh")], tmp_path, DSMOE_SITE="/nowhere")

    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "error: DSMOE_SITE = /nowhere: no such file\n"


def test_the_example_of_a_site_file_changes_nothing_as_it_stands(tmp_path: Path) -> None:
    example = str(LAUNCHERS / "site.env.example")

    launcher = LAUNCHERS / "pretrain_1b.sh"
    assert dry_run(launcher, folder=tmp_path, DSMOE_SITE=example) == dry_run(launcher, folder=tmp_path)


def test_a_lost_repository_is_said(tmp_path: Path) -> None:
    spooled = tmp_path / "slurm_script"
    shutil.copy(LAUNCHERS / "pretrain_1b.sh", spooled)

    finished = run(["bash", str(spooled)], tmp_path, DSMOE_ROOT="/nowhere")

    assert finished.returncode == 2
    assert finished.stderr == "error: no launchers/launch.sh in /nowhere; set DSMOE_ROOT to the repository\n"


def test_a_wrong_key_is_said_once_and_starts_nothing() -> None:
    finished = run(["bash", str(LAUNCHERS / "pretrain_1b.sh"), "--train.stepz", "2"])

    assert finished.returncode == 2
    assert finished.stdout == ""
    assert re.fullmatch(r".*error: train\.stepz = '2': unknown key; did you mean train\.steps\?\n", finished.stderr)


def test_python_runs_the_same_recipe_from_anywhere(tmp_path: Path) -> None:
    launcher = LAUNCHERS / "pretrain_6b.sh"

    finished = run([sys.executable, str(launcher), "--print_config", "--train.steps", "2"], tmp_path)

    printed = yaml.safe_load(finished.stdout)
    assert (printed["model"]["hidden_size"], printed["train"]["steps"]) == (4096, 2)


def test_torchrun_takes_the_launcher_for_its_script() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

    finished = run([*torchrun, "launchers/pretrain_6b.sh", "--print_config"], OMP_NUM_THREADS="1")

    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("hidden_size: 4096") == 2
