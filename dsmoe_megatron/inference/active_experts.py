"""The MLPs of the active experts: what no gate opens is not computed.

Shape suffixes: T tokens, N experts, P active (token, expert) pairs, H hidden size, F units of one expert, U = F or,
with gated experts, 2F.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}
Linear = Callable[[Tensor], Tensor]
"""Rows times one expert's weight, [rows, I] -> [rows, O]."""


def active_experts_mlp(
    hidden_TH: Tensor, gates_TN: Tensor, up: Sequence[Linear], down: Sequence[Linear], activation: str, gated: bool
) -> Tensor:
    """The sum over each token's active experts of gate x expert output (equation 1).

    Args:
        hidden_TH: input of the experts.
        gates_TN: scores of the active experts, float32, zero for all others.
        up: first projections, [rows, H] -> [rows, U]; with gated experts the gate's units stand before the up units.
        down: second projections, [rows, F] -> [rows, H].
        activation: a key of ACTIVATIONS.
        gated: act(gate) * up in the place of act(up).

    Returns:
        [T, H] in the dtype of the input.
    """
    # pairs in the order of the experts: each expert's rows lie together
    expert_P, token_P = gates_TN.t().nonzero(as_tuple=True)
    if not len(token_P):  # a rank may hold none of a small batch's experts
        return torch.zeros_like(hidden_TH)
    counts = torch.bincount(expert_P, minlength=gates_TN.shape[1]).tolist()
    projected_PU = grouped_linear(hidden_TH.index_select(0, token_P), up, counts)
    if gated:
        gate_PF, up_PF = projected_PU.chunk(2, dim=-1)
        units_PF = ACTIVATIONS[activation](gate_PF) * up_PF
    else:
        units_PF = ACTIVATIONS[activation](projected_PU)
    units_PF = (units_PF * gates_TN[token_P, expert_P].unsqueeze(-1)).to(hidden_TH.dtype)
    return sum_of_pairs(grouped_linear(units_PF, down, counts), token_P, hidden_TH)


def grouped_linear(rows_PI: Tensor, linears: Sequence[Linear], counts: Sequence[int]) -> Tensor:
    """Rows, in the order of the experts and one at least, times their expert's weight, [P, O]; idle experts rest."""
    groups = zip(linears, rows_PI.split(list(counts)), strict=True)
    return torch.cat([linear(rows) for linear, rows in groups if len(rows)])


def sum_of_pairs(output_PH: Tensor, token_P: Tensor, hidden_TH: Tensor) -> Tensor:
    """The sum over each token's pairs, in float32 because a token may have many, shaped and typed as the input."""
    sum_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    return sum_TH.index_add_(0, token_P, output_PH.float()).to(hidden_TH.dtype)
