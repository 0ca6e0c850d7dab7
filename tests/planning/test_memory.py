"""The planned bytes of a rank are those that its tensors have at the peak of a real training step, on a CPU."""

from dataclasses import dataclass
from typing import Any

import pytest

from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.planning.memory import rank_memory
from dsmoe_megatron.runtime.live_memory import LiveBytes
from tests.worker_pool import WorkerPool

TOLERANCE = 0.1

GQA = {"attention_type": "gqa", "num_attention_experts": 1, "mi_alpha_attention": 0.0}
DENSE = {**GQA, "num_experts": 1, "moe_intermediate_size": 320, "mi_alpha_mlp": 0.0}
SPARSE = {**GQA, "expert_training": "sparse", "mi_alpha_mlp": 0.0}
SWIGLU = {"gated_mlp": True, "hidden_act": "silu"}
MANY_HEADS = {"num_attention_heads": 16, "moe_intermediate_size": 8}
SHORT = {"sequence_length": 32, "micro_batch_size": 1, "global_batch_size": 1}
LONG = {"sequence_length": 1024, "micro_batch_size": 1, "global_batch_size": 1}
BF16 = {"precision": "bf16"}
FOUR_SAMPLES, EIGHT_SAMPLES = {"global_batch_size": 4}, {"global_batch_size": 8}
SEQUENCE = {"tensor": 2, "sequence": True}


def config_of(model: dict[str, Any], train: dict[str, Any], parallel: dict[str, Any]) -> Config:
    model_section: dict[str, Any] = {
        "hidden_size": 64,
        "head_dim": 16,
        "moe_intermediate_size": 40,
        "vocab_size": 384,
        "mi_alpha_attention": 1e-3,
        "mi_alpha_mlp": 1e-3,
        **model,
    }
    train_section: dict[str, Any] = {"micro_batch_size": 2, "global_batch_size": 2, "sequence_length": 256, **train}
    return Config(
        model=ModelConfig(**model_section), train=TrainConfig(**train_section), parallel=ParallelConfig(**parallel)
    )


# name: (processes, model, train, parallel)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "DS-MoE": (1, {}, {}, {}),
    "narrow and long": (1, {"hidden_size": 32}, LONG, {}),
    # its peak is the reduction of the experts' gradients, which are nearly all: when gloo's thread lets go of the copy
    # of the others is chance
    "wide and short": (1, {"hidden_size": 256, "moe_intermediate_size": 512, "vocab_size": 128}, SHORT, {}),
    "large vocabulary": (1, {"vocab_size": 2048, "num_hidden_layers": 1}, {}, {}),
    "many heads": (1, {**MANY_HEADS, "num_attention_experts": 8}, {}, {}),
    "SwiGLU": (1, SWIGLU, {}, {}),
    "mlp router, LayerNorm": (1, {"router_type": "mlp", "router_hidden_size": 64, "norm_type": "layernorm"}, {}, {}),
    "GQA with many heads": (1, {**MANY_HEADS, **GQA}, {}, {}),
    "dense baseline, SwiGLU": (1, {**DENSE, **SWIGLU}, {}, {}),
    "sparse baseline": (1, SPARSE, {}, {}),
    "sparse baseline, MoA": (1, {"expert_training": "sparse", "mi_alpha_mlp": 0.0}, {}, {}),
    "bf16": (1, {}, BF16, {}),
    "bf16, SwiGLU": (1, SWIGLU, BF16, {}),
    "bf16, large vocabulary": (1, {"vocab_size": 2048, "num_hidden_layers": 1}, BF16, {}),
    "selective recompute": (1, {}, {"recompute": "selective"}, {}),
    "full recompute": (1, {}, {"recompute": "full"}, {}),
    "full recompute, bf16": (1, {}, {"recompute": "full", **BF16}, {}),
    "accumulation": (1, {}, EIGHT_SAMPLES, {}),
    "DP2": (2, {}, FOUR_SAMPLES, {}),
    "TP2": (2, {}, {}, {"tensor": 2}),
    "TP4 above the key/value heads": (4, {}, {}, {"tensor": 4}),
    "TP2+SP, bf16": (2, {}, BF16, SEQUENCE),
    "EP2": (2, {}, FOUR_SAMPLES, {"expert": 2}),
    "TP2+SP x EP2": (4, {}, FOUR_SAMPLES, {**SEQUENCE, "expert": 2}),
    "CP2": (2, {}, {}, {"context": 2}),
    "PP2, 1+3 layers, full recompute": (
        2,
        {},
        {"recompute": "full", **EIGHT_SAMPLES},
        {"pipeline": 2, "first_stage_layers": 1},
    ),
    "PP4": (4, {}, {"global_batch_size": 16}, {"pipeline": 4}),
    "PP2, interleaved": (2, {}, EIGHT_SAMPLES, {"pipeline": 2, "virtual_pipeline": 2}),
}


@dataclass(frozen=True)
class Measured:
    stage: int
    live: LiveBytes


def measure(config: Config) -> Measured:
    """The job: the live bytes of this rank's second training step."""
    import torch
    from megatron.core import parallel_state

    from benchmarks.measuring import training_step
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.runtime.live_memory import live_bytes

    with model_parallel_groups(config.parallel, seed=1):
        live = live_bytes(lambda: training_step(config, torch.device("cpu")), torch.device("cpu"))
        return Measured(parallel_state.get_pipeline_model_parallel_rank(), live)


@pytest.mark.parametrize("name", CASES)
def test_peak_of_live_bytes(worker_pool: WorkerPool, name: str) -> None:
    processes, *sections = CASES[name]
    config = config_of(*sections)
    check_config(config, processes)

    measured: list[Measured] = worker_pool.run(processes, measure, config)

    for stage, live in ((rank.stage, rank.live) for rank in measured):
        planned = rank_memory(config, processes, stage, device="cpu")
        own = planned.activations + planned.logits
        assert planned.total == pytest.approx(live.peak, rel=TOLERANCE), f"stage {stage}: {planned}, {live}"
        assert own == pytest.approx(live.own_peak, rel=TOLERANCE), f"stage {stage}: {planned}, {live}"


def test_training_state_is_there_before_the_step(worker_pool: WorkerPool) -> None:
    config = config_of({"hidden_size": 256}, {**SHORT, **BF16}, {})
    planned = rank_memory(config, 1, 0)

    (measured,) = worker_pool.run(1, measure, config)

    # and the ends of buffers, the batch, AdamW's step counts
    assert planned.weights + planned.gradients + planned.optimizer == pytest.approx(measured.live.before, rel=0.005)
