"""Every layout trains to the same numbers as the single process: losses, gradient norms, gradients, weights."""

from typing import Any

import pytest

from tests.layout_cases import STEPS, TOLERANCE, Case, Runs, cases, differences
from tests.training_jobs import run_layout, tiny_config
from tests.worker_pool import WorkerPool


@pytest.fixture(scope="module")
def runs(worker_pool: WorkerPool) -> Runs:
    return Runs(worker_pool)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_equals_the_single_process(runs: Runs, case: Case) -> None:
    found, limits = runs.differences(case), runs.limits(case)

    assert {name: value for name, value in found if not value <= limits[name]} == {}, found
    initial, expected = (runs.trace(each).initial_weights for each in (case, case.single_process()))
    assert [key for key, weight in expected.items() if not initial[key].equal(weight)] == []


def test_a_run_repeats_bit_for_bit(worker_pool: WorkerPool, runs: Runs) -> None:
    single = cases()[0].single_process()
    expected = runs.trace(single)

    again = Runs(worker_pool).trace(single)

    assert again.lm_losses == expected.lm_losses
    assert again.grad_norms == expected.grad_norms
    assert all(again.weights[key].equal(weight) for key, weight in expected.weights.items())


def test_gradient_accumulation_keeps_loss_and_gradient(worker_pool: WorkerPool) -> None:
    without_mi = {"mi_alpha_attention": 0.0, "mi_alpha_mlp": 0.0}
    whole = run_layout(worker_pool, tiny_config(without_mi, micro_batch_size=8), 1, 1)
    split = run_layout(worker_pool, tiny_config(without_mi, micro_batch_size=2), 1, 1)

    assert split.lm_losses == pytest.approx(whole.lm_losses, rel=TOLERANCE)
    assert split.grad_norms == pytest.approx(whole.grad_norms, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [
        (2, {}),
        (4, {"tensor": 2, "sequence": True}),
        (4, {"context": 2}),
        (4, {"expert": 2, "pipeline": 2}),
    ],
    ids=["DP2", "TP2+SP x DP2", "CP2 x DP2", "PP2 x EP2 over DP2"],
)
def test_data_parallel_scope_depends_only_on_the_tokens_averaged_over(
    worker_pool: WorkerPool, processes: int, parallel: dict[str, Any]
) -> None:
    """Two ranks of 2 samples are as one rank of 4, in every layout."""
    strong = {"mi_alpha_attention": 1.0, "mi_alpha_mlp": 1.0, "mi_scope": "data_parallel"}
    one_rank = run_layout(worker_pool, tiny_config(strong, micro_batch_size=4), 1, STEPS)

    two_ranks = run_layout(worker_pool, tiny_config(strong, parallel, micro_batch_size=2), processes, STEPS)

    found = differences(two_ranks, one_rank)
    assert {name: value for name, value in found if not value <= TOLERANCE} == {}, found
