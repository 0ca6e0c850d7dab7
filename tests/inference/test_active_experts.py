"""The active experts' MLPs against the equation, and that it computes nothing else."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dsmoe_megatron.inference.active_experts import ACTIVATIONS, Linear, active_experts_mlp

TOKENS, EXPERTS, HIDDEN, UNITS = 11, 6, 8, 5


def example(gated: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gates = torch.rand(TOKENS, EXPERTS, generator=generator)
    gates = gates * (torch.rand(TOKENS, EXPERTS, generator=generator) < 0.4)
    gates[:, 2] = 0.0  # no token wants this expert
    gates[3] = 0.0  # and this token none
    rows = 2 * UNITS if gated else UNITS
    return random(TOKENS, HIDDEN), gates, random(EXPERTS, rows, HIDDEN), random(EXPERTS, HIDDEN, UNITS)


def linears(weights: torch.Tensor) -> list[Linear]:
    return [partial(F.linear, weight=weight) for weight in weights]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sum_is_that_of_the_equation(activation: str, gated: bool) -> None:
    hidden, gates, up, down = example(gated)

    actual = active_experts_mlp(hidden, gates, linears(up), linears(down), activation, gated)

    projected = torch.einsum("th,nuh->tnu", hidden.double(), up.double())
    if gated:
        units = ACTIVATIONS[activation](projected[..., :UNITS]) * projected[..., UNITS:]
    else:
        units = ACTIVATIONS[activation](projected)
    expected = torch.einsum("tn,tnf,nhf->th", gates.double(), units, down.double())
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def test_experts_that_no_token_wants_are_not_read() -> None:
    hidden, gates, up, down = example(gated=True)
    expected = active_experts_mlp(hidden, gates, linears(up), linears(down), "silu", True)
    up[2], down[2] = torch.nan, torch.nan

    assert torch.equal(active_experts_mlp(hidden, gates, linears(up), linears(down), "silu", True), expected)


def test_tokens_without_any_expert_get_zeros() -> None:
    hidden, gates, up, down = example(gated=False)

    output = active_experts_mlp(hidden, torch.zeros_like(gates), linears(up), linears(down), "gelu", False)

    assert torch.equal(output, torch.zeros_like(hidden))
