"""What the tools say of a checkpoint without loading it, and how they name what is damaged."""

import json
import shutil
from pathlib import Path

import pytest

from checkpoints_tools import inspect_checkpoint, verify
from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.planning.parameters import count_parameters
from tests.checkpoints_tools.conftest import Run
from tests.made_up_runs import ARCHITECTURE, make_run
from tests.training_jobs import checkpoint_job, tiny_config
from tests.worker_pool import WorkerPool

MODEL = {"vocab_size": 250, "router_type": "mlp", "norm_type": "layernorm"}


@pytest.fixture(scope="module")
def saved(worker_pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, saved under TP2 x DP2."""
    folder = tmp_path_factory.mktemp("inspected") / "run"
    folder.mkdir()
    worker_pool.run(4, checkpoint_job, tiny_config(MODEL, {"tensor": 2}, run_dir=str(folder)), 1)
    return folder


def test_what_is_inside(saved: Path, command: Run) -> None:
    code, output, _ = command(inspect_checkpoint.main, saved, "--json")
    found = json.loads(output)
    count = count_parameters(ModelConfig(**found["config"]["model"]))
    folder = saved / "checkpoints" / "step_00000007"

    assert code == 0
    assert found["folder"] == str(folder)
    assert (found["step"], found["consumed_samples"], found["tokens"]) == (7, 56, 1792)
    assert {name: found["layout"][name] for name in ("processes", "data", "tensor", "pipeline")} == {
        "processes": 4,
        "data": 2,
        "tensor": 2,
        "pipeline": 1,
    }
    assert found["parameters"] == {
        "MLP": count.mlp_experts,
        "attention": count.attention_experts + count.key_value,
        "embeddings": count.embeddings,
        "norms": count.norms,
        "routers": count.mlp_routers + count.attention_routers,
        "total": count.total,
    }
    assert found["dtype"] == "float32"
    assert found["has_optimizer_state"] is True
    # master copies and two moments
    assert found["bytes"]["optimizer"] == 3 * found["bytes"]["weights"] == 3 * 4 * (count.total or 0)
    assert found["bytes"]["files"] == sum(path.stat().st_size for path in folder.iterdir())
    assert found["manifest"]["missing_or_of_another_size"] == []
    assert found["config"]["model"]["num_experts"] == 6


def test_the_text_says_the_same(saved: Path, command: Run) -> None:
    code, output, _ = command(inspect_checkpoint.main, saved / "checkpoints" / "step_00000007")

    assert code == 0
    for part in ("step 7, 1,792 tokens", "4 processes, data 2, tensor 2", "optimizer state: yes", "num_experts: 6"):
        assert part in output
    assert "files, all there, in full size" in output


def test_a_file_cut_short_is_seen_without_reading(saved: Path, command: Run, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    shard = tmp_path / "run" / "checkpoints" / "step_00000007" / "__3_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])

    _, output, _ = command(inspect_checkpoint.main, tmp_path / "run")

    assert "DAMAGED: missing or of another size: __3_0.distcp" in output


def test_an_older_checkpoint_is_read_too(command: Run, tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)

    code, output, _ = command(inspect_checkpoint.main, run.folder, "--json")

    found = json.loads(output)
    assert code == 0
    assert found["manifest"] is None
    assert found["layout"]["processes"] is None


def test_what_is_no_checkpoint_is_one_line(command: Run, tmp_path: Path) -> None:
    code, output, errors = command(inspect_checkpoint.main, tmp_path)

    assert (code, output) == (1, "")
    assert errors.count("\n") == 1
    assert "neither a run folder with a checkpoint nor a step folder" in errors


def test_verify_holds_every_checkpoint_of_a_run_against_its_manifest(saved: Path, command: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    shutil.copytree(run / "checkpoints" / "step_00000007", run / "checkpoints" / "step_00000005")

    whole, output, _ = command(verify.main, "--checkpoint", run)
    older = run / "checkpoints" / "step_00000005" / "__2_1.distcp"
    content = bytearray(older.read_bytes())
    content[len(content) // 3] ^= 64
    older.write_bytes(content)
    damaged, faults, errors = command(verify.main, "--checkpoint", run)
    only_newest, _, _ = command(verify.main, "--checkpoint", run / "checkpoints" / "step_00000007")

    assert whole == 0
    assert output.count("files as they were written") == 2
    assert damaged == 1
    assert f"  {older}: damaged: its checksum is not the manifest's" in faults
    assert f"{run} is damaged: 1 fault" in errors
    assert only_newest == 0
