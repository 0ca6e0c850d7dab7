"""What is prepared is what training looks for; what is missing, damaged or wrong is one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare_cache import main
from dsmoe_megatron.config_parsing import save_config
from tests.pretrain_job import SmallData, pretrain_job, run_config
from tests.worker_pool import WorkerPool

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "prepare_cache.py"
TWO_WAYS: dict[str, Any] = {"tensor": 2, "sequence": True}


def write_recipe(path: Path, small_data: SmallData, run_dir: Path, /, **sections: dict[str, Any]) -> str:
    save_config(run_config(small_data, run_dir, **sections), path)
    return str(path)


def identities(cache_dir: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of everything in a cache."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache_dir.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str]:
    """Exit status and the one line of a call that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("prepare_cache: error: ")
    assert error.count("\n") == 1
    return raised.value.code, error


@pytest.mark.parametrize("where", ["run folder", "cache_dir"])
def test_training_builds_nothing_after_it(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path, where: str
) -> None:
    """On one process, for a layout of two; for the run folder by the script."""
    run_dir, shared = tmp_path / "run", tmp_path / "shared"
    data = {"cache_dir": str(shared)} if where == "cache_dir" else {}
    recipe = write_recipe(tmp_path / "recipe.yaml", small_data, run_dir, parallel=TWO_WAYS, data=data)
    arguments = ["--config", recipe, "--train.steps", "4"]

    if where == "run folder":
        command = [sys.executable, str(SCRIPT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    else:
        main(arguments)

    cache_dir = shared if where == "cache_dir" else run_dir / "cache"
    prepared = identities(cache_dir)
    assert any(name.endswith("shuffle_index.npy") for name in prepared)
    config = run_config(small_data, run_dir, parallel=TWO_WAYS, data=data, train={"steps": 4})
    printed = worker_pool.run(2, pretrain_job, config)[0]
    assert "sample indices" not in printed
    assert "step 4" in printed.replace("/", " ")
    assert identities(cache_dir) == prepared
    assert not (run_dir / "cache").exists() or where == "run folder"


def test_it_tells_what_the_run_reads(small_data: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """700 of 1,000 samples of one dataset, and the same again when nothing is left to build."""
    train = {"steps": 125, "global_batch_size": 8}
    recipe = write_recipe(tmp_path / "recipe.yaml", small_data, tmp_path / "run", train=train)
    tokens = Path(f"{small_data.train}.bin").stat().st_size // 2

    main(["--config", recipe])
    first = capsys.readouterr().out.splitlines()
    main(["--config", recipe])
    again = capsys.readouterr().out.splitlines()

    assert f"  {small_data.train}: 700 samples, {700 * 32 / tokens:.4g} epochs" in first
    assert [line.split(": ")[1] for line in first if "1,000 samples" in line] == ["built"]
    assert [line.split(": ")[1] for line in again if "1,000 samples" in line] == ["there and whole"]
    assert not [line for line in again if "building" in line]
    assert [line for line in first if line.startswith("  ")] == [line for line in again if line.startswith("  ")]


def test_check_finds_what_is_missing_or_damaged_and_builds_nothing(
    small_data: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", small_data, tmp_path / "run")
    cache_dir = tmp_path / "run" / "cache"

    code, error = refused(capsys, "--config", recipe, "--check")
    assert code == 1
    assert f"{cache_dir}/train-" in error
    assert "not there" in error
    assert not cache_dir.exists()

    main(["--config", recipe])
    before = identities(cache_dir)
    main(["--check", "--config", recipe])
    assert capsys.readouterr().out.count(": whole: ") == 2

    (array,) = cache_dir.glob("valid-*/*-document_index.npy")
    array.write_bytes(array.read_bytes()[:-8] + b"\xff" * 8)
    code, error = refused(capsys, "--config", recipe, "--check")
    assert code == 1
    assert f"{array.name} is damaged" in error
    assert {name: inode for name, (inode, _) in identities(cache_dir).items()} == {
        name: inode for name, (inode, _) in before.items()
    }

    main(["--config", recipe])
    assert f"{array.name} is damaged" in capsys.readouterr().out
    main(["--check", "--config", recipe])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.step", "3"], "did you mean train.steps?"),
        (["--train.steps", "many"], "train.steps"),
        (["--train.micro_batch_size", "3"], "train.global_batch_size"),
        (["--parallel.tensor", "3"], "parallel.tensor"),
        (["--data.train", "[]"], "data.train"),
        (["--data.tokenizer", "null"], "data.tokenizer"),
        (["--model.vocab_size", "512"], "model.vocab_size"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["--chekc"], "chekc"),
    ],
)
def test_wrong_recipes_are_refused(
    small_data: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", small_data, tmp_path / "run")

    code, error = refused(capsys, "--config", recipe, *arguments)

    assert code == 2
    assert message in error
    assert not (tmp_path / "run").exists()


def test_missing_data_and_folders_that_cannot_be_written_are_refused(
    small_data: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", small_data, tmp_path / "run")
    nowhere = '[{"prefix": "nowhere/text"}]'

    assert refused(capsys, "--config", recipe, "--data.train", nowhere)[0] == 1
    assert refused(capsys, "--config", recipe, "--data.tokenizer", str(tmp_path / "no.model"))[0] == 1
    code, error = refused(capsys, "--config", recipe, "--data.cache_dir", recipe)
    assert code == 1
    assert f"{recipe}: sample indices cannot be written" in error
