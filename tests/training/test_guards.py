"""Updates that would spoil the weights are left out, on every rank alike, and a resumed run judges as before."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.checkpoint_equality import compared_tensors, find_differences
from dsmoe_megatron.config import TrainConfig
from dsmoe_megatron.training.guards import Guards, Verdict
from tests.pretrain_job import (
    SmallData,
    damaged_job,
    pretrain_job,
    refused_damaged_job,
    run_config,
    training_lines,
)
from tests.worker_pool import WorkerPool


def test_an_update_with_nan_gradients_on_one_rank_changes_nothing(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"train": {"steps": 4}, "checkpoint": {"interval": 1, "keep_last": 0}}
    config = run_config(small_data, tmp_path / "damaged", **sections)

    printed = worker_pool.run(2, damaged_job, config, {3: "nan gradient"})[0]

    folders = [tmp_path / "damaged" / "checkpoints" / f"step_{step:08d}" for step in (2, 3, 4)]
    assert compared_tensors(*folders[:2]) > 30
    assert list(find_differences(*folders[:2])) == []
    assert len(list(find_differences(*folders[1:]))) > 30
    lines = training_lines(tmp_path / "damaged")
    assert [lines[step]["skipped_updates"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert lines[3]["grad_norm"] is None
    assert "step 3: update left out, 1 in a row: not finite: lm_loss" in printed
    # schedule and data have moved on
    progress = [json.loads((folder / "progress.json").read_text()) for folder in folders]
    assert [each["consumed_samples"] for each in progress] == [16, 24, 32]
    rates = [lines[step]["learning_rate"] for step in (1, 2, 3, 4)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 4


def test_guards_resume_exactly(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    """The spikes at 6 and 7 are seen only by who remembers steps before 5, where the second run begins."""
    sections: dict[str, Any] = {
        "train": {"steps": 8, "spike_deviations": 20.0, "spike_window": 8, "stop_after_skipped": 3},
        "checkpoint": {"interval": 5, "keep_last": 0},
    }
    damages = {4: "infinite gradient", 6: "large gradient", 7: "large loss"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    worker_pool.run(2, damaged_job, run_config(small_data, whole, **sections), damages)
    sections["checkpoint"]["load"] = str(whole / "checkpoints" / "step_00000005")

    worker_pool.run(2, damaged_job, run_config(small_data, resumed, **sections), damages)

    lines = training_lines(whole)
    assert [lines[step]["skipped_updates"] for step in range(1, 9)] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert training_lines(resumed) == {step: lines[step] for step in (6, 7, 8)}


def test_a_checkpoint_from_before_the_first_update_is_resumed_too(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    """It holds weights alone, as an imported model does, but its run has come further."""
    sections: dict[str, Any] = {"train": {"steps": 4}, "checkpoint": {"interval": 2, "keep_last": 0}}
    damages = {1: "nan loss", 2: "nan gradient"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    worker_pool.run(1, damaged_job, run_config(small_data, whole, **sections), damages)
    folder = whole / "checkpoints" / "step_00000002"
    sections["checkpoint"]["load"] = str(folder)

    (printed,) = worker_pool.run(1, damaged_job, run_config(small_data, resumed, **sections), damages)

    lines = training_lines(whole)
    assert [lines[step]["skipped_updates"] for step in range(1, 5)] == [1, 2, 2, 2]
    assert f"resumed from {folder}: no update was applied up to step 2" in printed
    assert training_lines(resumed) == {step: lines[step] for step in (3, 4)}


@pytest.mark.parametrize("first", [1, 4])
def test_many_in_a_row_stop_the_run(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path, first: int) -> None:
    sections: dict[str, Any] = {"train": {"steps": 8, "stop_after_skipped": 2}}
    config = run_config(small_data, tmp_path, **sections)

    damages = {first: "nan loss", first + 1: "nan gradient"}
    texts = worker_pool.run(2, refused_damaged_job, config, damages)

    assert len(set(texts)) == 1
    assert f"TrainingError: steps {first} to {first + 1}: 2 updates in a row were left out" in texts[0]
    assert texts[0].endswith("the samples of these steps: look at them, or lower optimizer.lr")
    assert "\n" not in texts[0]
    batches = json.loads((tmp_path / "post_mortem" / "batches.json").read_text())
    assert [batch["step"] for batch in batches] == [first, first + 1]
    samples = [sample for batch in batches for sample in batch["samples"]]
    assert [sample["index"] for sample in samples] == list(range((first - 1) * 8, (first + 1) * 8))
    assert {sample["dataset"] for sample in samples} == {small_data.train, small_data.validation}
    # a resume begins with the run's own checkpoint, before the bad steps, and without the damage goes through
    assert (tmp_path / "latest").exists() == (first > 3)
    worker_pool.run(2, pretrain_job, config)
    assert list(training_lines(tmp_path)) == list(range(1, 9))
    assert training_lines(tmp_path)[8]["skipped_updates"] == 0


def judged(section: TrainConfig, values: list[float]) -> list[str]:
    guards, verdicts = Guards(section, {}), []
    for step, value in enumerate(values, 1):
        verdict = guards.judge(3.0, value)
        guards.remember(verdict, step, range(8), 3.0, value)
        verdicts.append(verdict.name)
    return verdicts


def test_a_spike_is_measured_by_what_was_applied() -> None:
    """Means and deviations by hand: over 1, 2, 1, 2 they are 1.5 and 0.5."""
    section = TrainConfig(spike_deviations=3.0, spike_window=4)

    assert judged(section, [1.0, 2.0, 1.0, 2.0, 2.99, 3.01])[4:] == ["APPLIED", "APPLIED"]
    assert judged(section, [1.0, 2.0, 1.0, 2.0, 3.01, 3.01])[4:] == ["SPIKE", "SPIKE"]
    assert judged(TrainConfig(), [1.0, 2.0, 1.0, 2.0, 1000.0])[4] == "APPLIED"


def test_where_ranks_differ_the_worst_verdict_holds() -> None:
    assert max(Verdict.APPLIED, Verdict.SPIKE, Verdict.NOT_FINITE) is Verdict.NOT_FINITE
