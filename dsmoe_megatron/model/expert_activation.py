"""The experts' activation and its scaling by the scores: the part of the MLP between its two products.

Source: arXiv 2404.05567, equation 3. Shape suffixes: S sequence, B batch, U hidden units of this rank (V where gate and
up projection lie side by side: V = 2 U), G gates of U / G units each.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsmoe_megatron.model.router import scale_blocks_

Activation = Callable[[Tensor], Tensor]


def activate_and_scale(units_SBV: Tensor, log_scores_SBG: Tensor, activation: Activation, gated: bool) -> Tensor:
    """score * act(units), or score * act(gate) * up, block by block.

    On CUDA one kernel forward and one backward, which reads the units again instead of keeping what lies between; on a
    CPU in place, with the same values.

    Args:
        units_SBV: of the first product; V is U, or 2 U where `gated`.
        log_scores_SBG: float32 logarithms of the scores; -inf switches a block off.
        activation: of the experts.
        gated: whether the units are a gate's followed by those of an up projection.
    """
    if units_SBV.is_cuda:
        return compiled()(units_SBV, log_scores_SBG, activation, gated)
    # in place: the activations' gradients are computed from their inputs
    return scale_blocks_(_activate(units_SBV, activation, gated), log_scores_SBG)


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """`composed` as torch's compiler fuses it; it compiles at the first call of a shape."""
    function: Callable[..., Tensor] = torch.compile(composed, fullgraph=True)
    return function


def composed(units_SBV: Tensor, log_scores_SBG: Tensor, activation: Any, gated: bool) -> Tensor:
    """The same of plain operations, for the compiler to fuse."""
    values_SBU = _activate(units_SBV, activation, gated)
    blocks_SBGX = values_SBU.unflatten(-1, (log_scores_SBG.shape[-1], -1))
    # rounded once, from float32 scores
    return (blocks_SBGX * log_scores_SBG.exp().unsqueeze(-1)).to(units_SBV.dtype).flatten(-2)


def _activate(units_SBV: Tensor, activation: Activation, gated: bool) -> Tensor:
    if not gated:
        return activation(units_SBV)
    gate_SBU, up_SBU = units_SBV.chunk(2, dim=-1)
    return activation(gate_SBU) * up_SBU
