"""Training from an imported model: its first losses are the model's own, under any layout."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints_tools.import_hf import import_model
from dsmoe_megatron.config import Config
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from tests.models_to_import import save_model
from tests.pretrain_job import SmallData, pretrain_job, refused_job, run_config, training_lines
from tests.worker_pool import WorkerPool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_data: SmallData) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model", small_data.tokenizer)


def first_batch(config: Config, steps: int) -> list[dict[str, Tensor]]:
    """The samples of each of the first steps, on one process."""
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.data import build_datasets, global_batches
    from dsmoe_megatron.training.loop import open_data

    tokenizer = open_data(config)
    with model_parallel_groups(config.parallel, config.train.seed):
        train_data, _ = build_datasets(config, tokenizer, Path(config.train.run_dir) / "cache")
        batches = global_batches(train_data, config, 0, 1)
        steps_of_batches = [next(batches) for _ in range(steps)]
        return [
            {key: torch.cat([batch[key] for batch in micro_batches]) for key in ("tokens", "labels")}
            for micro_batches in steps_of_batches
        ]


@pytest.fixture(scope="module")
def imported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_model(model, step := tmp_path_factory.mktemp("imported") / "step")
    return step


def start_config(small_data: SmallData, run_dir: Path, imported: Path, /, **sections: dict[str, Any]) -> Config:
    """Two steps with hardly any learning from the imported weights."""
    steps = {"steps": 2, **sections.pop("train", {})}
    options: dict[str, Any] = {"optimizer": {"lr": 1e-7}, "checkpoint": {"load": str(imported)}}
    return run_config(small_data, run_dir, **options, train=steps, **sections)


@pytest.fixture(scope="module")
def losses(
    worker_pool: WorkerPool, small_data: SmallData, model: Path, imported: Path, tmp_path_factory: Any
) -> list[float]:
    """What transformers computes on the batches of the first two steps."""
    config = start_config(small_data, tmp_path_factory.mktemp("batches"), imported)
    batches = worker_pool.run(1, first_batch, config, 2)[0]
    reference = DSMoEForCausalLM.from_pretrained(model).eval()
    reference.set_policy("dense")
    with torch.no_grad():
        return [
            float(F.cross_entropy(reference(batch["tokens"]).logits.flatten(0, 1).double(), batch["labels"].flatten()))
            for batch in batches
        ]


@pytest.fixture(scope="module")
def started(worker_pool: WorkerPool, small_data: SmallData, imported: Path, tmp_path_factory: Any) -> Path:
    """A run of two steps on one process."""
    run_dir: Path = tmp_path_factory.mktemp("started") / "run"
    worker_pool.run(1, pretrain_job, start_config(small_data, run_dir, imported))
    return run_dir


def first_losses(run_dir: Path) -> list[float]:
    lines = training_lines(run_dir)
    assert list(lines) == [1, 2]
    return [lines[step]["lm_loss"] for step in (1, 2)]


def test_the_first_loss_is_that_of_the_imported_model(started: Path, losses: list[float]) -> None:
    assert losses[0] > 8.0  # nothing that an untrained model would have: log 500 is 6.2
    # the second step shows that the first one's update went out from the imported weights
    assert first_losses(started) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "parallel", "precision"),
    [
        (2, {"tensor": 2}, "fp32"),
        (4, {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "expert_tensor": 1}, "fp32"),
        (2, {}, "bf16"),
    ],
    ids=["TP2", "TP2+SP, PP2, EP2", "DP2 in bf16"],
)
def test_an_imported_model_starts_under_any_layout(
    worker_pool: WorkerPool,
    small_data: SmallData,
    imported: Path,
    losses: list[float],
    tmp_path: Path,
    world_size: int,
    parallel: dict[str, Any],
    precision: str,
) -> None:
    config = start_config(small_data, tmp_path, imported, parallel=parallel, train={"precision": precision})

    printed = worker_pool.run(world_size, pretrain_job, config)[0]

    assert f"started from {imported}: weights alone, so the optimizer is fresh and this is step 0" in printed
    assert first_losses(tmp_path) == pytest.approx(losses, rel=1e-5 if precision == "fp32" else 0.02)


def test_a_run_that_started_so_resumes_as_any_other(
    worker_pool: WorkerPool, small_data: SmallData, imported: Path, started: Path, tmp_path: Path
) -> None:
    shutil.copytree(started, tmp_path / "run")

    longer = start_config(small_data, tmp_path / "run", imported, train={"steps": 3})
    printed = worker_pool.run(1, pretrain_job, longer)[0]

    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / 'step_00000002'}" in printed


def test_a_step_folder_is_no_run_folder(
    worker_pool: WorkerPool, small_data: SmallData, imported: Path, tmp_path: Path
) -> None:
    """A run in it would write its checkpoints there and never find them again."""
    shutil.copytree(imported, tmp_path / "step")

    text = worker_pool.run(1, refused_job, run_config(small_data, tmp_path / "step"))[0]

    assert "is a step folder, not a run's: name another, and give this one as checkpoint.load" in text
