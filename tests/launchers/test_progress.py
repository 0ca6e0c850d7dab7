"""What the launcher asks a run folder, and what a failing run leaves for it."""

import json
from pathlib import Path

import pytest

from dsmoe_megatron.__main__ import main

RECIPE = str(Path(__file__).resolve().parents[2] / "launchers" / "recipes" / "quickstart.yaml")


def arguments(run_dir: Path) -> list[str]:
    return ["--config", RECIPE, "--train.run_dir", str(run_dir), "--train.steps", "9", "--optimizer.warmup_steps", "1"]


def test_a_run_that_has_not_begun_is_at_step_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["progress", *arguments(tmp_path / "a run")]) == 0

    assert capsys.readouterr().out == f"step 0 of 9 in {tmp_path}/a run\n"
    assert not (tmp_path / "a run").exists()


def test_the_newest_checkpoint_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (3, 6, 7):  # the last one is not whole yet
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps({"step": step}))
    (tmp_path / "latest").write_text("step_00000006\n")

    assert main(["progress", *arguments(tmp_path)]) == 0

    assert capsys.readouterr().out == f"step 6 of 9 in {tmp_path}\n"


def test_where_the_newest_is_gone_the_one_before_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latest").write_text("step_00000006\n")
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000006.unfinished").mkdir()

    assert main(["progress", *arguments(tmp_path)]) == 0

    assert capsys.readouterr().out == f"step 3 of 9 in {tmp_path}\n"


def test_where_the_pointer_is_damaged_the_newest_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latest").write_bytes(b"step_000000\xb6\n")
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)

    assert main(["progress", *arguments(tmp_path)]) == 0

    assert capsys.readouterr().out == f"step 3 of 9 in {tmp_path}\n"


def test_a_recipe_that_cannot_run_on_any_number_of_processes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["progress", *arguments(tmp_path), "--parallel.tensor", "3"])

    assert "parallel.tensor = 3: must divide the 2 key/value heads" in capsys.readouterr().err


def test_a_fault_that_the_user_must_mend_is_left_to_the_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSMOE_FAULT_FILE", str(tmp_path / "fault"))

    with pytest.raises(SystemExit):
        main(["pretrain", *arguments(tmp_path), "--model.num_experts", "0"])

    fault = (tmp_path / "fault").read_text()
    assert "model.num_experts = 0" in fault
    assert capsys.readouterr().err == f"dsmoe-megatron: error: {fault}"
