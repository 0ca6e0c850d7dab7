"""Every layout trains to the same numbers as the single process: losses, gradient norms, gradients, weights."""

from typing import Any

import pytest

from tests.training_jobs import Trace, run_layout, tiny_config
from tests.worker_pool import WorkerPool

DSMOE: dict[str, Any] = {}
SWIGLU_MLP_ROUTER = {
    "hidden_act": "silu",
    "gated_mlp": True,
    "router_type": "mlp",
    "tie_word_embeddings": True,
    "vocab_size": 250,
}
GQA = {"attention_type": "gqa", "norm_type": "layernorm"}
DENSE = {"attention_type": "gqa", "num_experts": 1, "moe_intermediate_size": 96}
SPARSE = {"attention_type": "gqa", "num_experts": 4, "num_experts_per_tok": 4, "expert_training": "sparse"}

TENSOR = {"tensor": 2}
SEQUENCE = {"tensor": 2, "sequence": True}
PIPELINE = {"pipeline": 2}
EXPERT = {"expert": 2}
ALL_THREE = {**SEQUENCE, **EXPERT}

CASES: list[tuple[str, dict[str, Any], int, dict[str, Any]]] = [
    ("DS-MoE, TP2", DSMOE, 2, TENSOR),
    ("DS-MoE, TP2+SP", DSMOE, 2, SEQUENCE),
    ("DS-MoE, PP2", DSMOE, 2, PIPELINE),
    ("DS-MoE, DP2", DSMOE, 2, {}),
    ("DS-MoE, EP2", DSMOE, 2, EXPERT),
    ("DS-MoE, TP2 x PP2", DSMOE, 4, {**TENSOR, **PIPELINE}),
    ("DS-MoE, TP2+SP+EP2", DSMOE, 4, ALL_THREE),
    ("DS-MoE, TP4 above the key/value heads", DSMOE, 4, {"tensor": 4}),
    ("DS-MoE, interleaved PP2 x DP2 with overlap", DSMOE, 4, {**PIPELINE, "virtual_pipeline": 2, "overlap": True}),
    ("DS-MoE, CP2 x EP2", DSMOE, 2, {"context": 2, **EXPERT}),
    ("DS-MoE, CP2 x TP2+SP", DSMOE, 4, {"context": 2, **SEQUENCE}),
    ("DS-MoE, TP2+SP with whole experts (ETP1)", DSMOE, 2, {**SEQUENCE, "expert_tensor": 1}),
    ("SwiGLU, mlp router, tied, TP2", SWIGLU_MLP_ROUTER, 2, TENSOR),
    ("SwiGLU, mlp router, tied, PP2", SWIGLU_MLP_ROUTER, 2, PIPELINE),
    ("SwiGLU, mlp router, tied, DP2 with overlap", SWIGLU_MLP_ROUTER, 2, {"overlap": True}),
    ("SwiGLU, mlp router, tied, TP2+SP+EP2", SWIGLU_MLP_ROUTER, 4, ALL_THREE),
    ("GQA, TP2+SP", GQA, 2, SEQUENCE),
    ("GQA, TP2 x PP2", GQA, 4, {**TENSOR, **PIPELINE}),
    ("dense baseline, TP2+SP", DENSE, 2, SEQUENCE),
    ("dense baseline, PP2", DENSE, 2, PIPELINE),
    ("sparse baseline, EP2", SPARSE, 2, EXPERT),
    ("sparse baseline, PP2", SPARSE, 2, PIPELINE),
]
STEPS = 10
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def single_process(worker_pool: WorkerPool) -> Any:
    """Trains a model on one process; once for each model."""
    traces: dict[str, Trace] = {}

    def trace(model: dict[str, Any]) -> Trace:
        key = repr(model)
        if key not in traces:
            traces[key] = run_layout(worker_pool, tiny_config(model), 1, STEPS)
        return traces[key]

    return trace


@pytest.mark.parametrize(("model", "world_size", "parallel"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_equals_the_single_process(
    worker_pool: WorkerPool, single_process: Any, model: dict[str, Any], world_size: int, parallel: dict[str, Any]
) -> None:
    expected: Trace = single_process(model)

    actual = run_layout(worker_pool, tiny_config(model, parallel), world_size, STEPS)

    assert actual.lm_losses == pytest.approx(expected.lm_losses, rel=TOLERANCE)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    for mi_actual, mi_expected in zip(actual.mi_losses, expected.mi_losses, strict=True):
        assert mi_actual == pytest.approx(mi_expected, rel=TOLERANCE, abs=1e-6)
    assert actual.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        difference = float((actual.gradients[key] - gradient).abs().max() / gradient.abs().max())
        assert difference < TOLERANCE, f"gradient of {key} is off by {difference:.1e}"
        assert actual.initial_weights[key].equal(expected.initial_weights[key]), f"{key} starts differently"


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(worker_pool: WorkerPool, single_process: Any, recompute: str) -> None:
    expected: Trace = single_process(DSMOE)

    actual = run_layout(worker_pool, tiny_config(DSMOE, recompute=recompute), 1, STEPS)

    assert actual.lm_losses == pytest.approx(expected.lm_losses, rel=TOLERANCE)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=TOLERANCE)
    assert actual.mi_losses[-1] == pytest.approx(expected.mi_losses[-1], rel=TOLERANCE, abs=1e-6)


def test_a_run_repeats_bit_for_bit(worker_pool: WorkerPool, single_process: Any) -> None:
    expected: Trace = single_process(DSMOE)

    again = run_layout(worker_pool, tiny_config(DSMOE), 1, STEPS)

    assert again.lm_losses == expected.lm_losses
    assert again.grad_norms == expected.grad_norms
    assert all(again.weights[key].equal(weight) for key, weight in expected.weights.items())


def test_gradient_accumulation_keeps_loss_and_gradient(worker_pool: WorkerPool) -> None:
    without_mi = {"mi_alpha_attention": 0.0, "mi_alpha_mlp": 0.0}
    whole = run_layout(worker_pool, tiny_config(without_mi, micro_batch_size=8), 1, 1)
    split = run_layout(worker_pool, tiny_config(without_mi, micro_batch_size=2), 1, 1)

    assert split.lm_losses == pytest.approx(whole.lm_losses, rel=TOLERANCE)
    assert split.grad_norms == pytest.approx(whole.grad_norms, rel=TOLERANCE)


def test_data_parallel_scope_depends_only_on_the_tokens_averaged_over(worker_pool: WorkerPool) -> None:
    strong = {"mi_alpha_attention": 1.0, "mi_alpha_mlp": 1.0, "mi_scope": "data_parallel"}
    one_rank = run_layout(worker_pool, tiny_config(strong, micro_batch_size=4), 1, 1)
    two_ranks = run_layout(worker_pool, tiny_config(strong, micro_batch_size=2), 2, 1)

    assert two_ranks.mi_losses[0] == pytest.approx(one_rank.mi_losses[0], rel=TOLERANCE)
    assert two_ranks.grad_norms == pytest.approx(one_rank.grad_norms, rel=TOLERANCE)
