"""Whole runs under DeepSpeed: growing batches, resuming, switching engine and layout, updates left out, a kill."""

import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint
from dsmoe_megatron.config import Config, PolicyConfig, RampUpConfig
from tests.deepspeed_cases import SMALL_PIECES
from tests.pretrain_job import SmallData, pretrain_job, read_lines, run_config, training_lines
from tests.training.test_check import check
from tests.training_jobs import micro_batches, tiny_config
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.usefixtures("with_deepspeed")

MEGATRON: dict[str, Any] = {}
SIZES = [4, 4, 8, 12, 12, 12]


def zero(stage: int, **values: Any) -> dict[str, Any]:
    """An engine section."""
    return {"name": "deepspeed", "zero_stage": stage, **values}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DeepSpeed configuration that cuts up all there is."""
    file = tmp_path_factory.mktemp("settings") / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": SMALL_PIECES}))
    return str(file)


def ramped(small_data: SmallData, run_dir: Path, engine: dict[str, Any], **sections: Any) -> Config:
    """Six steps whose batches grow; a checkpoint after every second one, validation in the end."""
    checkpoint = {"interval": 2, "keep_last": 0, **sections.pop("checkpoint", {})}
    model = {"num_hidden_layers": 1}
    evaluation = {"batches": 1, "policies": [PolicyConfig("topk", num_experts_per_tok=2)]}
    train = {"global_batch_size": 12, "ramp_up": RampUpConfig(4, 4, 15)}
    return run_config(
        small_data,
        run_dir,
        engine=engine,
        checkpoint=checkpoint,
        model=model,
        train=train,
        evaluation=evaluation,
        **sections,
    )


def figures(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Training lines by step, the last with the validation's figures."""
    lines = training_lines(run_dir)
    (validation,) = (line for line in read_lines(run_dir) if "validation_loss" in line)
    for name, policy in validation["policies"].items():
        lines[6] |= {f"{name} {key}": value for key, value in policy.items()}
    return lines


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def megatron_run(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "megatron"
    worker_pool.run(2, pretrain_job, ramped(small_data, run_dir, MEGATRON))
    return run_dir


@pytest.fixture(scope="module")
def zero_run(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "zero"
    worker_pool.run(2, pretrain_job, ramped(small_data, run_dir, zero(2)))
    return run_dir


def test_a_run_with_growing_batches_is_that_of_megatron_core(megatron_run: Path, zero_run: Path) -> None:
    expected, actual = figures(megatron_run), figures(zero_run)

    assert [line["batch_size"] for line in actual.values()] == SIZES
    for step, line in expected.items():
        assert actual[step] == pytest.approx(line, rel=1e-5)


def test_checkpoints_of_both_engines_hold_the_same_tensors(megatron_run: Path, zero_run: Path) -> None:
    expected, actual = (DistributedCheckpoint(step_folder(run, 2)) for run in (megatron_run, zero_run))

    assert actual.tensor_shapes == expected.tensor_shapes
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in actual.tensor_shapes)


@dataclass(frozen=True)
class Continuation:
    """A run that goes on from another one's step 2.

    Attributes:
        begun_by: `megatron` or `zero` (stage 2), on two processes.
        stage: of ZeRO; 0 is megatron-core's engine.
        processes, tensor: of the second run.
        offload: of the second run.
    """

    begun_by: str
    stage: int
    processes: int = 1
    tensor: int = 1
    offload: bool = False

    def __str__(self) -> str:
        engine = f"ZeRO-{self.stage}{' offload' * self.offload}" if self.stage else "megatron"
        return f"{self.begun_by} to {engine} on {self.processes}, tensor {self.tensor}"

    def engine(self, pieces: str) -> dict[str, Any]:
        if not self.stage:
            return MEGATRON
        return zero(self.stage, offload_optimizer=self.offload, deepspeed_config=pieces)


@pytest.mark.parametrize(
    "continuation",
    [
        Continuation("zero", 0),
        Continuation("zero", 1, 2, tensor=2),
        Continuation("megatron", 2, offload=True),
        Continuation("megatron", 3, 2),
    ],
    ids=str,
)
def test_engine_stage_and_layout_may_change_at_a_checkpoint(
    worker_pool: WorkerPool,
    small_data: SmallData,
    megatron_run: Path,
    zero_run: Path,
    pieces: str,
    tmp_path: Path,
    continuation: Continuation,
) -> None:
    begun = {"megatron": megatron_run, "zero": zero_run}[continuation.begun_by]
    config = ramped(
        small_data,
        tmp_path,
        continuation.engine(pieces),
        parallel={"tensor": continuation.tensor},
        checkpoint={"load": str(step_folder(begun, 2))},
    )

    worker_pool.run(continuation.processes, pretrain_job, config)

    expected, actual = figures(begun), figures(tmp_path)
    assert list(actual) == [3, 4, 5, 6]
    for step, line in actual.items():
        assert line == pytest.approx(expected[step], rel=1e-5)


def test_stage_2_resumes_bit_for_bit(
    worker_pool: WorkerPool, small_data: SmallData, zero_run: Path, tmp_path: Path
) -> None:
    load = {"load": str(step_folder(zero_run, 4))}

    worker_pool.run(2, pretrain_job, ramped(small_data, tmp_path, zero(2), checkpoint=load))

    whole = figures(zero_run)
    assert figures(tmp_path) == {step: whole[step] for step in (5, 6)}


def kill_the_last_rank_after_step_3(run: Any) -> None:
    """Without a word, as the kernel does it where memory runs out."""
    beat = run.beat

    def beat_or_die(what: str) -> None:
        beat(what)
        if what == "step 3" and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.beat = beat_or_die


def killed_job(config: Config) -> str:
    return pretrain_job(config, prepare=kill_the_last_rank_after_step_3)


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    worker_pool: WorkerPool, small_data: SmallData, pieces: str, tmp_path: Path
) -> None:
    checkpoint = {"asynchronous": False}
    engine = zero(3, deepspeed_config=pieces)
    whole = ramped(small_data, tmp_path / "whole", engine, checkpoint=checkpoint)
    killed = ramped(small_data, tmp_path / "killed", engine, checkpoint=checkpoint)

    worker_pool.run(2, pretrain_job, whole)
    with pytest.raises(RuntimeError, match="the worker ended"):
        worker_pool.run(2, killed_job, killed)
    assert list(training_lines(tmp_path / "killed"))[-1] <= 3
    worker_pool.run(2, pretrain_job, killed)

    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")


@dataclass
class Vetoes:
    """What a run with updates left out was like.

    Attributes:
        losses, norms: of each step.
        applied: whether its update was made.
        changed: whether any weight or optimizer state was another after it.
    """

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    changed: list[bool]


def vetoed_job(configs: list[Config]) -> list[Vetoes]:
    """Train with each; step 2 has a gradient that is not finite on the last rank, step 4 is refused as it is."""
    return [_with_vetoes(config) for config in configs]


def _with_vetoes(config: Config) -> Vetoes:
    from megatron.core import parallel_state

    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.checkpoint import sharded_tensors
    from dsmoe_megatron.training.engines.choice import build_engine

    found, step = Vetoes([], [], [], []), 0

    def damaged(gradient: Tensor) -> Tensor:
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        return gradient * math.nan if step == 2 and last else gradient

    def accepts(loss: float, norm: float) -> bool:
        return math.isfinite(loss + norm) and step != 4

    def state(engine: Any) -> list[Tensor]:
        return [shard.data.clone() for shard in sharded_tensors(engine.sharded_state()) if shard.data is not None]

    with model_parallel_groups(config.parallel, config.train.seed):
        engine: Any = build_engine(config, torch.device("cpu"))
        engine.routers[-1].weight.register_hook(damaged)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for step in range(1, 6):
            before = state(engine)
            result = engine.train_step(micro_batches(config, step, rank, ranks), accepts)
            found.losses.append(result.lm_loss)
            found.norms.append(result.grad_norm)
            found.applied.append(result.applied)
            after = state(engine)
            found.changed.append(len(after) > len(before) or any(map(_differ, before, after)))
    return found


def _differ(one: Tensor, other: Tensor) -> bool:
    return not one.equal(other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_that_is_refused_changes_nothing(worker_pool: WorkerPool, pieces: str, precision: str) -> None:
    engines = [MEGATRON, zero(1), zero(2), zero(3, deepspeed_config=pieces), zero(2, offload_optimizer=True)]
    configs = []
    for engine in engines:
        config = tiny_config({"num_hidden_layers": 1}, precision=precision)
        for key, value in engine.items():
            setattr(config.engine, key, value)
        configs.append(config)

    expected, *found = worker_pool.run(2, vetoed_job, configs)[0]

    relative = {"fp32": 1e-5, "bf16": 1e-3}[precision]
    for actual in (expected, *found):
        assert actual.applied == actual.changed == [True, False, True, False, True]
        assert not math.isfinite(actual.norms.pop(1))
        assert actual.losses == pytest.approx(expected.losses, rel=relative)
        assert actual.norms == pytest.approx(expected.norms[-4:], rel=relative)


def weights_alone_job(giver: Config, takers: list[Config], run_dir: Path) -> list[tuple[float, float]]:
    """Save the giver's initial weights; each taker's loss with them, and the next loss after one small update."""
    from megatron.core import parallel_state

    from dsmoe_megatron.run_folder import Progress
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.checkpoint import load_weights
    from dsmoe_megatron.training.engines.choice import build_engine
    from dsmoe_megatron.training.saving import CheckpointSaver

    losses = []
    with model_parallel_groups(giver.parallel, giver.train.seed):
        saver = CheckpointSaver(build_engine(giver, torch.device("cpu")), giver, run_dir, print)
        saver.start(Progress())
        saver.finish()
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for taker in takers:
            engine = build_engine(taker, torch.device("cpu"))
            batch = micro_batches(taker, 0, rank, ranks)
            engine.evaluate(batch)  # from now on stage 3 keeps small weights whole
            load_weights(engine, taker, step_folder(run_dir, 0), step=0)
            losses.append((engine.train_step(batch).lm_loss, engine.evaluate(batch)))
    return losses


def test_weights_alone_begin_a_run(worker_pool: WorkerPool, pieces: str, tmp_path: Path) -> None:
    """Given by stage 3, taken by megatron-core's engine and by all stages, with other initial weights."""
    configs: list[Config] = []
    for engine in (zero(3), MEGATRON, zero(1), zero(3, deepspeed_config=pieces), zero(3)):
        config = tiny_config({"num_hidden_layers": 1}, precision="bf16", seed=len(configs))
        for key, value in engine.items():
            setattr(config.engine, key, value)
        configs.append(config)

    first, *others = worker_pool.run(2, weights_alone_job, configs[0], configs[1:], tmp_path)[0]

    assert first[1] < first[0]
    for other in others:
        assert other == pytest.approx(first, rel=1e-3)


def test_the_check_says_what_a_run_would_meet_and_nothing_else(small_data: SmallData, tmp_path: Path) -> None:
    config = run_config(small_data, tmp_path / "run", engine=zero(3), model={"num_hidden_layers": 2})

    done = check(config, 1)

    assert done.returncode == 0, done.stderr
    assert "second step" in done.stdout
    assert "saved in" in done.stdout
    assert "DeepSpeed" not in done.stdout + done.stderr


def test_a_build_that_was_killed_is_named(
    small_data: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 1200, time.time() - 1200))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))

    done = check(run_config(small_data, tmp_path / "run", engine=zero(2, offload_optimizer=True)), 1)

    assert done.returncode == 1
    assert f"{lock} is 20 minutes old" in done.stderr
    assert "Traceback" not in done.stderr
