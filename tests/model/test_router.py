"""Mutual-information loss, block gate and core attention against their equations, in float64 where they allow it."""

import math

import pytest
import torch
from torch import Tensor

from dsmoe_megatron.model.router import mutual_information_loss, scale_blocks


def entropies_loss(scores_TE: Tensor) -> Tensor:
    """Equations 4 and 5 as they are written, differentiated through both entropies."""
    mean_E = scores_TE.mean(dim=0)
    marginal_entropy = -torch.special.xlogy(mean_E, mean_E).sum()
    conditional_entropy = -torch.special.xlogy(scores_TE, scores_TE).sum(dim=-1).mean()
    return -marginal_entropy + conditional_entropy


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 20.0])
def test_mutual_information_equals_the_equations(sharpness: float) -> None:
    torch.manual_seed(0)
    logits_TE = (sharpness * torch.randn(64, 6, dtype=torch.float64)).requires_grad_()

    loss = mutual_information_loss(logits_TE.log_softmax(dim=-1))
    expected = entropies_loss(logits_TE.softmax(dim=-1))

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits_TE)
    (expected_gradient,) = torch.autograd.grad(expected, logits_TE)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-12)


def test_mutual_information_reaches_its_bounds() -> None:
    one_expert_each_TE = torch.eye(4).clamp(min=1e-30).log()
    uniform_TE = torch.full((8, 4), -math.log(4))

    assert mutual_information_loss(one_expert_each_TE).item() == pytest.approx(-math.log(4), rel=1e-6)
    assert mutual_information_loss(uniform_TE).item() == pytest.approx(0.0, abs=1e-7)


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    log_scores_TE = torch.randn(10, 5).log_softmax(dim=-1)
    mask_T = torch.arange(10) < 7

    masked = mutual_information_loss(log_scores_TE, token_mask_T=mask_T)

    torch.testing.assert_close(masked, mutual_information_loss(log_scores_TE[:7]))


def test_block_gate_and_its_gradients() -> None:
    torch.manual_seed(0)
    values_SBU = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    log_scores_SBG = torch.randn(3, 2, 4, dtype=torch.float64).log_softmax(-1).requires_grad_()
    weights_SBU = torch.randn(3, 2, 12, dtype=torch.float64)

    gated = scale_blocks(values_SBU, log_scores_SBG)
    expected = values_SBU * log_scores_SBG.exp().repeat_interleave(3, dim=-1)

    torch.testing.assert_close(gated, expected)
    inputs = (values_SBU, log_scores_SBG)
    expected_gradients = torch.autograd.grad((expected * weights_SBU).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((gated * weights_SBU).sum(), inputs), expected_gradients)


def test_block_gate_stays_exact_where_a_score_vanishes() -> None:
    """d loss / d logit must be right even when dividing by the score would overflow."""
    logits_SBG = torch.tensor([[[0.0, -100.0]]], dtype=torch.float64, requires_grad=True)
    values_SBU = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)

    (gradient,) = torch.autograd.grad(scale_blocks(values_SBU, logits_SBG.log_softmax(-1)).sum(), logits_SBG)

    scores = logits_SBG.detach().softmax(-1)
    block_sums = torch.tensor([[[3.0, 7.0]]], dtype=torch.float64)
    expected = scores * (block_sums - (scores * block_sums).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0.0)
    assert gradient[0, 0, 1] > 0


def test_block_gate_switches_off() -> None:
    log_scores_SBG = torch.tensor([[[0.5, 0.5]]]).log()
    log_scores_SBG[..., 1] = float("-inf")

    gated = scale_blocks(torch.ones(1, 1, 4), log_scores_SBG)

    assert gated.flatten().tolist() == [0.5, 0.5, 0.0, 0.0]


def test_block_gate_keeps_less_than_a_product_would() -> None:
    """Of the tensors of the activations' size, only the output is kept for the backward pass."""
    values_SBU = torch.randn(4, 2, 32, requires_grad=True)
    log_scores_SBG = torch.randn(4, 2, 8).log_softmax(-1).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gated = scale_blocks(values_SBU, log_scores_SBG)

    large = [tensor for tensor in kept if tensor.numel() == values_SBU.numel()]
    assert [tensor.data_ptr() for tensor in large] == [gated.data_ptr()]
