"""The active experts' MLPs as one operator: what no gate opens is not computed.

The operator is opaque to torch.compile, because how many rows an expert gets is known only from the scores.
Shape suffixes: T tokens, N experts, P active (token, expert) pairs, H hidden size, F units of one expert, U = F or,
with gated experts, 2F.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}


@torch.library.custom_op("dsmoe::active_experts", mutates_args=())
def active_experts_mlp(
    hidden_TH: Tensor, gates_TN: Tensor, up_NUH: Tensor, down_NHF: Tensor, activation: str, gated: bool
) -> Tensor:
    """The sum over each token's active experts of gate x expert output (equation 1).

    Args:
        hidden_TH: input of the experts.
        gates_TN: scores of the active experts, float32, zero for all others.
        up_NUH: first projections; with gated experts each one's gate rows stand before its up rows.
        down_NHF: second projections.
        activation: a key of ACTIVATIONS.
        gated: act(gate) * up in the place of act(up).

    Returns:
        [T, H] in the dtype of the input.
    """
    # pairs in the order of the experts: each expert's rows lie together
    expert_P, token_P = gates_TN.t().nonzero(as_tuple=True)
    counts = torch.bincount(expert_P, minlength=gates_TN.shape[1]).tolist()
    projected_PU = grouped_linear(hidden_TH.index_select(0, token_P), up_NUH, counts)
    if gated:
        gate_PF, up_PF = projected_PU.chunk(2, dim=-1)
        units_PF = ACTIVATIONS[activation](gate_PF) * up_PF
    else:
        units_PF = ACTIVATIONS[activation](projected_PU)
    units_PF = (units_PF * gates_TN[token_P, expert_P].unsqueeze(-1)).to(hidden_TH.dtype)
    output_PH = grouped_linear(units_PF, down_NHF, counts)
    # summed in float32: a token may have many experts
    sum_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    return sum_TH.index_add_(0, token_P, output_PH.float()).to(hidden_TH.dtype)


@active_experts_mlp.register_fake
def _(
    hidden_TH: Tensor, gates_TN: Tensor, up_NUH: Tensor, down_NHF: Tensor, activation: str, gated: bool
) -> Tensor:
    return torch.empty_like(hidden_TH)


def grouped_linear(rows_PI: Tensor, weight_NOI: Tensor, counts: list[int]) -> Tensor:
    """Rows times their expert's weight, one matrix product per expert that has rows.

    Args:
        rows_PI: in the order of the experts.
        weight_NOI: one [O, I] per expert.
        counts: rows of each expert.

    Returns:
        [P, O].
    """
    output_PO = rows_PI.new_empty(rows_PI.shape[0], weight_NOI.shape[1])
    start = 0
    for weight_OI, count in zip(weight_NOI.unbind(), counts, strict=True):
        if count:
            torch.mm(rows_PI[start : start + count], weight_OI.t(), out=output_PO[start : start + count])
            start += count
    return output_PO
