"""Counted operations against torch's own counter on the built model."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.planning.flops import inference_flops, training_flops
from tests.training_jobs import SEQUENCE_LENGTH, micro_batches, tiny_config
from tests.worker_pool import WorkerPool

MODELS: dict[str, dict[str, Any]] = {
    "DS-MoE": {},
    "SwiGLU, mlp router": {"hidden_act": "silu", "gated_mlp": True, "router_type": "mlp", "vocab_size": 250},
    "GQA": {"attention_type": "gqa"},
    "dense baseline": {"attention_type": "gqa", "num_experts": 1, "moe_intermediate_size": 96},
    "sparse baseline": {"attention_type": "gqa", "expert_training": "sparse", "num_experts_per_tok": 2},
    "sparse baseline, MoA": {"expert_training": "sparse", "num_experts_per_tok": 2},
}


def counted_flops(model: dict[str, Any], recompute: str) -> tuple[int, int]:
    """(operations of matrix products, of core attention with all S x S scores) of one micro-batch."""
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    def attention(*shapes: Any, **unused: Any) -> int:  # query, key, value, ...
        del unused
        return sdpa_flop_count(*shapes[:3])

    def attention_backward(*shapes: Any, **unused: Any) -> int:  # gradient, query, key, value, ...
        del unused
        return 5 * sdpa_flop_count(*shapes[1:4]) // 2  # four products, and the scores once more

    aten = torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    config = tiny_config(model, micro_batch_size=2, global_batch_size=2, recompute=recompute)
    with model_parallel_groups(config.parallel, 1):
        engine = MegatronEngine(config, torch.device("cpu"))
        counter = FlopCounterMode(display=False, custom_mapping={flash: attention, flash_backward: attention_backward})
        with counter:
            engine.forward_backward(micro_batches(config, 0, 0, 1))
    counts = counter.get_flop_counts()["Global"]
    attention_flops = counts.pop(flash) + counts.pop(flash_backward)
    return sum(counts.values()), attention_flops


def scored_experts(model: ModelConfig) -> int:
    """Experts of all routers that have a mutual-information loss."""
    of_mlp = model.num_experts if model.has_mlp_router and model.expert_training == "dense" else 0
    return model.num_hidden_layers * (of_mlp + model.num_attention_experts * model.has_attention_router)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_training_step_computes_what_is_counted(
    worker_pool: WorkerPool, model: dict[str, Any], recompute: str
) -> None:
    config = tiny_config(model, recompute=recompute)
    [(products, attention)] = worker_pool.run(1, counted_flops, model, recompute)
    tokens = 2 * SEQUENCE_LENGTH

    flops = training_flops(config)

    parts = (flops.forward, flops.backward, flops.recompute)
    planned = sum(part.total - part.attention_scores for part in parts) * tokens
    # torch sees one product more: the mean score of the mutual-information loss, a vector times [tokens, experts]
    assert planned + 2 * tokens * scored_experts(config.model) == products
    # torch counts S keys for each of S tokens, of which the causal mask leaves (S + 1) / 2
    causal = (SEQUENCE_LENGTH + 1) / (2 * SEQUENCE_LENGTH)
    assert sum(part.attention_scores for part in parts) * tokens == pytest.approx(attention * causal, rel=1e-12)


def test_sparse_inference_computes_the_active_experts_alone() -> None:
    model = tiny_config().model
    keys = 10
    every_expert = inference_flops(model, keys, model.num_experts, model.num_attention_experts)

    sparse = inference_flops(model, keys, 2, 1)

    # by hand, per layer: two matrices of 2 experts x 16 units; one expert's query head per key/value head; k and v
    assert sparse.mlp == 4 * 2 * (2 * 64 * 2 * 16)
    assert sparse.attention_projections == 4 * 2 * (64 * 2 * 16 * (1 + 1) + 64 * 2 * 2 * 16)
    assert sparse.attention_scores == 4 * 2 * (2 * 2 * 16 * keys)
    assert (sparse.routers, sparse.logits) == (every_expert.routers, every_expert.logits)
    assert sparse.routers == 4 * 2 * 64 * (4 + 6)
    assert sparse.logits == 2 * 64 * 256


def test_full_recompute_costs_one_forward_pass_of_the_layers() -> None:
    none, full = (training_flops(tiny_config(recompute=recompute)) for recompute in ("none", "full"))

    assert full.machine - none.machine == pytest.approx(full.forward.layers)
    assert full.model == none.model
