"""The experts' activation against its equation in float64: in place on a CPU, and as the compiler fuses it for a GPU.

Where there is no GPU the compiler makes code for the CPU, from the same graph.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_megatron.model.expert_activation import activate_and_scale, compiled

UNITS, EXPERTS = 24, 4
Function = Callable[..., Tensor]


def by_the_equation(units: Tensor, log_scores: Tensor, activation: Function, gated: bool) -> Tensor:
    values = activation(units[..., :UNITS]) * (units[..., UNITS:] if gated else 1.0)
    return values * log_scores.exp().repeat_interleave(UNITS // EXPERTS, dim=-1)


@pytest.mark.parametrize(("activation", "gated"), [(F.gelu, False), (F.silu, True)])
@pytest.mark.parametrize("implementation", ["in place", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(
    activation: Function, gated: bool, implementation: str, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    on_gpu = implementation == "compiled" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    units = torch.randn(5, 2, UNITS * (2 if gated else 1)).to(device, dtype)
    log_scores = torch.randn(5, 2, EXPERTS).log_softmax(-1).to(device)
    log_scores[0, 0, 1] = float("-inf")  # switched off
    weights = torch.randn(5, 2, UNITS).to(device, dtype)
    function = activate_and_scale if implementation == "in place" else compiled()

    inputs = [units.requires_grad_(), log_scores.requires_grad_()]
    # as the first product gives them: not a leaf
    found = function(inputs[0].clone(), inputs[1], activation, gated)
    values = found.detach().clone()  # in place, the backward pass writes over them
    gradients = torch.autograd.grad((found * weights).sum(), inputs)

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = by_the_equation(exact[0], exact[1], activation, gated)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), exact)
    for actual, right in zip((values, *gradients), (expected, *expected_gradients), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance)
    assert values.dtype == dtype
    assert values[0, 0, 6:12].eq(0).all()
