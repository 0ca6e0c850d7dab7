"""Learning rates, against their formulas written out."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsmoe_megatron.config import OptimizerConfig
from dsmoe_megatron.training.optimizer import build_schedule

PEAK, LEAST = 1e-3, 1e-5
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "exponential": lambda x: 2 * 0.5**x - 1,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def learning_rates(steps: int, more: int = 0, **section: Any) -> list[float]:
    """Of steps 1 to `steps` + `more` of a run of `steps` steps."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = build_schedule(OptimizerConfig(lr=PEAK, min_lr=LEAST, **section), steps, optimizer)
    rates = []
    for _ in range(steps + more):
        schedule.step(increment=1)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def fallen(share: float) -> float:
    return LEAST + (PEAK - LEAST) * share


def test_cosine() -> None:
    rates = learning_rates(50, more=3, warmup_steps=10)

    expected = [PEAK * step / 10 for step in range(1, 11)]
    expected += [fallen((1 + math.cos(math.pi * (step - 10) / 40)) / 2) for step in range(11, 51)]
    assert rates == pytest.approx([*expected, LEAST, LEAST, LEAST])


@pytest.mark.parametrize("shape", FALLS)
def test_wsd_warms_up_holds_and_decays(shape: str) -> None:
    rates = learning_rates(50, more=2, schedule="wsd", warmup_steps=10, wsd_decay_steps=16, wsd_decay_shape=shape)

    expected = [PEAK * step / 10 for step in range(1, 11)] + [PEAK] * 24
    expected += [fallen(FALLS[shape](step / 16)) for step in range(1, 17)]
    assert rates == pytest.approx([*expected, LEAST, LEAST])


def test_wsd_decays_over_a_tenth_by_default() -> None:
    rates = learning_rates(100, schedule="wsd", decay_steps=80)

    assert rates[:72] == [PEAK] * 72
    assert rates[72:80] == sorted(rates[72:80], reverse=True)
    assert max(rates[72:80]) < PEAK
    assert rates[79:] == pytest.approx([LEAST] * 21)
    assert learning_rates(3, schedule="wsd")[:2] == [PEAK] * 2
