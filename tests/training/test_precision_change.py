"""A bf16 run goes on in float32 from its float32 master weights, in every layout and under both engines."""

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint
from dsmoe_megatron.config import Config
from tests.layout_cases import MODELS
from tests.training_jobs import checkpoint_job, tiny_config
from tests.worker_pool import WorkerPool

MODEL = {**MODELS["SwiGLU, mlp router, tied"], "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def bf16_checkpoint(worker_pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("bf16")
    worker_pool.run(2, checkpoint_job, tiny_config(MODEL, precision="bf16", run_dir=str(run_dir)), 1)
    return run_dir / "checkpoints" / "step_00000007"


def loaded_weights_job(config: Config, checkpoint: Path) -> list[tuple[str, Any, torch.Tensor]]:
    """This rank's weights after a load: name, place in the global tensor and values of each."""
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.checkpoint import load_checkpoint, sharded_tensors
    from dsmoe_megatron.training.engines.choice import build_engine

    with model_parallel_groups(config.parallel, config.train.seed):
        engine = build_engine(config, torch.device("cpu"))
        load_checkpoint(engine, config, checkpoint)
        shards = sharded_tensors(engine.sharded_weights())
        return [
            (shard.key, shard.global_slice(), shard.data.detach().clone()) for shard in shards if shard.data.numel()
        ]


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(1, {}), (2, {}), (2, {"overlap": True}), (2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2})],
    ids=["one process", "DP2", "DP2, overlap", "TP2+SP", "PP2"],
)
def test_float32_weights_are_the_masters(
    worker_pool: WorkerPool, bf16_checkpoint: Path, processes: int, parallel: dict[str, Any]
) -> None:
    config = tiny_config(MODEL, parallel)

    check_weights(worker_pool.run(processes, loaded_weights_job, config, bf16_checkpoint), bf16_checkpoint)


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize("stage", [1, 3])
def test_float32_weights_are_the_masters_under_zero(worker_pool: WorkerPool, bf16_checkpoint: Path, stage: int) -> None:
    config = tiny_config(MODEL)
    config.engine.name, config.engine.zero_stage = "deepspeed", stage

    check_weights(worker_pool.run(2, loaded_weights_job, config, bf16_checkpoint), bf16_checkpoint)


def check_weights(ranks: list[list[tuple[str, Any, torch.Tensor]]], checkpoint: Path) -> None:
    saved = DistributedCheckpoint(checkpoint)
    names = {name for name in saved.tensor_shapes if not name.startswith("optimizer.")}
    weights, masters = (
        {name: saved.read(prefix + name) for name in names} for prefix in ("", "optimizer.state.param.")
    )
    assert any(not masters[name].equal(weights[name].float()) for name in names)
    assert {name for shards in ranks for name, _, _ in shards} == names
    for rank, shards in enumerate(ranks):
        for name, place, values in shards:
            expected = masters[name][place].view_as(values)
            assert values.equal(expected), f"rank {rank}: {name}: {int((values != expected).sum())} values differ"
