"""Jobs for the worker pool: train a tiny model on real text under a layout, and return what must not depend on it."""

import dataclasses
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe_megatron.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig

SEQUENCE_LENGTH = 32
BYTES = 256
END_OF_DOCUMENT = ord(" ")


def tiny_config(
    model: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    """A model of some 150,000 parameters over bytes, with mutual-information losses large enough to be seen.

    Args:
        model, parallel, data, train: values that differ from the tiny model's; alphas of absent routers become 0.
    """
    model_section: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_attention_experts": 4,
        "head_dim": 16,
        "num_experts": 6,
        "moe_intermediate_size": 16,
        "router_hidden_size": 32,
        "mi_alpha_attention": 0.05,
        "mi_alpha_mlp": 0.08,
        "vocab_size": BYTES,
        "initializer_range": 0.1,
        **(model or {}),
    }
    if model_section.get("attention_type") == "gqa":
        model_section |= {"num_attention_experts": 1, "mi_alpha_attention": 0.0}
    if model_section["num_experts"] == 1 or model_section.get("expert_training") == "sparse":
        model_section["mi_alpha_mlp"] = 0.0
    train_section: dict[str, Any] = {
        "steps": 10,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "sequence_length": SEQUENCE_LENGTH,
        **train,
    }
    return Config(
        model=ModelConfig(**model_section),
        parallel=ParallelConfig(**(parallel or {})),
        data=DataConfig(**(data or {})),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=1.0),
        train=TrainConfig(**train_section),
    )


def text_batch(step: int, samples: int) -> Tensor:
    """Bytes of the standard library's argparse module, [samples, sequence + 1]."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    size = SEQUENCE_LENGTH + 1
    return data[step * samples * size : (step + 1) * samples * size].view(samples, size)


def positions_in_documents(tokens_S: Tensor) -> Tensor:
    """Each word is a document; the space after it belongs to it."""
    begins = torch.cat([torch.tensor([True]), tokens_S[:-1] == END_OF_DOCUMENT])
    places = torch.arange(len(tokens_S))
    return places - torch.where(begins, places, 0).cummax(0).values


def micro_batches(config: Config, step: int, rank: int, ranks: int) -> list[dict[str, Tensor]]:
    """This data-parallel rank's micro-batches of a step."""
    from dsmoe_megatron.training.data import global_batches

    class Samples:
        def __init__(self) -> None:
            self.samples = text_batch(step, config.train.global_batch_size)

        def __len__(self) -> int:
            return len(self.samples)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            tokens, labels = self.samples[index][:-1], self.samples[index][1:]
            positions, counts = torch.arange(SEQUENCE_LENGTH), torch.ones(SEQUENCE_LENGTH)
            if config.data.separate_documents:
                positions, counts = positions_in_documents(tokens), (tokens != END_OF_DOCUMENT).float()
            return {"tokens": tokens, "labels": labels, "loss_mask": counts, "position_ids": positions}

    return next(global_batches(Samples(), config, rank, ranks))


def checkpoint_job(config: Config, steps: int, load: Path | None = None) -> None:
    """Save a checkpoint of step 7 after `steps` steps of training, on top of one that may be of another layout."""
    from megatron.core import parallel_state

    from dsmoe_megatron.run_folder import Progress
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.checkpoint import load_checkpoint
    from dsmoe_megatron.training.engines.choice import build_engine
    from dsmoe_megatron.training.saving import CheckpointSaver

    with model_parallel_groups(config.parallel, config.train.seed):
        engine = build_engine(config, torch.device("cpu"))
        if load is not None:
            load_checkpoint(engine, config, load)
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for step in range(steps):
            engine.train_step(micro_batches(config, step, rank, ranks))
        saver = CheckpointSaver(engine, config, Path(config.train.run_dir), print)
        saver.start(Progress(step=7, consumed_samples=56, tokens=1792))
        saver.finish()


@dataclass
class Trace:
    """What a run leaves behind.

    Attributes:
        lm_losses: of each step [nats per token].
        grad_norms: of each step, before clipping.
        mi_losses: of each step, one value per router over the whole model [nats].
        gradients: global tensors of step 1, under megatron-core's checkpoint names.
        weights: global tensors after the last step.
        initial_weights: global tensors before the first.
        logits: of the first batch with the initial weights, [B, S, V], where one rank has them all.
    """

    lm_losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    mi_losses: list[dict[tuple[int, str], float]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    initial_weights: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


def train(config: Config, steps: int) -> tuple[Trace, dict[str, list[Any]]]:
    """Train `steps` steps; returns the trace without tensors, and this rank's shards of gradients and weights."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.choice import build_engine
    from dsmoe_megatron.training.expert_use import mutual_information_losses

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    with model_parallel_groups(config.parallel, config.train.seed):
        engine = build_engine(config, torch.device("cpu"))
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        alone = ranks == config.parallel.tensor == 1 and config.engine.name == "megatron"
        trace = Trace(logits=_logits(engine, config) if alone else None)
        shards = {"initial_weights": _shards(engine.sharded_weights(), "")}
        for step in range(steps):
            for router in engine.routers:
                router.control.statistics.reset()
            result = engine.train_step(micro_batches(config, step, rank, ranks))
            trace.lm_losses.append(result.lm_loss)
            trace.grad_norms.append(result.grad_norm)
            trace.mi_losses.append(mutual_information_losses(engine.routers, config))
            if step == 0:
                shards["gradients"] = _optimizer_shards(engine, "exp_avg", result.grad_norm)
        shards["weights"] = _shards(engine.sharded_weights(), "")
        return trace, shards


@torch.no_grad()
def _logits(engine: Any, config: Config) -> Tensor | None:
    if config.parallel.pipeline > 1 or config.parallel.context > 1:
        return None
    tokens = text_batch(0, config.train.global_batch_size)[:, :-1]
    engine.chunks[0].eval()
    logits: Tensor = engine.chunks[0](tokens, torch.arange(SEQUENCE_LENGTH).expand_as(tokens), None)
    return logits


def _optimizer_shards(engine: Any, moment: str, grad_norm: float) -> list[Any]:
    """After one step the first moment is (1 - beta1) x the clipped gradient, reduced over every group."""
    section = engine.config.optimizer
    clipped = min(1.0, section.clip_grad / (grad_norm + 1e-6)) if section.clip_grad else 1.0
    factor = 1.0 / ((1 - section.beta1) * clipped)
    return _shards(engine.sharded_state(), f"optimizer.state.{moment}.", factor)


def _shards(state: dict[str, Any], prefix: str, factor: float = 1.0) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    apply_factories(state)
    return [
        (shard.key.removeprefix(prefix), shard.global_shape, shard.global_slice(), shard.data.detach().clone() * factor)
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor) and shard.data is not None and shard.data.numel()
        if (shard.key.startswith(prefix) if prefix else not shard.key.startswith("optimizer."))
    ]


def assemble(parts: list[list[Any]]) -> dict[str, Tensor]:
    """Global tensors from every rank's shards; every element must be covered, and replicas must agree."""
    whole: dict[str, Tensor] = {}
    for key, shape, where, data in (shard for rank in parts for shard in rank):
        target = whole.setdefault(key, torch.full(tuple(shape), float("nan"), dtype=data.dtype))
        region = target[where]
        data = data.view_as(region)
        known = ~region.isnan()
        torch.testing.assert_close(data[known], region[known], rtol=1e-4, atol=1e-6, msg=f"replicas of {key} differ")
        target[where] = data
    for key, tensor in whole.items():
        assert not tensor.isnan().any(), f"{key} is not covered"
    return whole


def run_layout(pool: Any, config: Config, world_size: int, steps: int = 10) -> Trace:
    """Train under the layout of `config` and gather what all ranks know."""
    from dsmoe_megatron.config_rules import check_config

    check_config(config, world_size)
    results = pool.run(world_size, train, config, steps)
    trace: Trace = results[0][0]
    for other, _ in results[1:]:
        assert other.lm_losses == trace.lm_losses, "ranks report different losses"
        assert other.grad_norms == trace.grad_norms, "ranks report different gradient norms"
    return dataclasses.replace(
        trace,
        gradients=assemble([shards["gradients"] for _, shards in results]),
        weights=assemble([shards["weights"] for _, shards in results]),
        initial_weights=assemble([shards["initial_weights"] for _, shards in results]),
    )
