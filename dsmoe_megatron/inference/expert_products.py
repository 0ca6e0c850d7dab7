"""One matrix product per active expert: the fast way on a CPU. It travels with the export: torch and transformers only.

transformers' `grouped_mm` takes transposed weights and the rows of all pairs at once; here weights are read where they
lie, and the pairs of a prompt go through in batches that fit the cache.
Shape suffixes: T tokens, K active experts of a token, P active (token, expert) pairs, N experts, H hidden size, F units
of one expert, O and I a weight's rows and columns.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_mm, grouped_mm_experts_forward

PER_EXPERT = "per_expert"
"""Name of this implementation among transformers' own: `set_experts_implementation("per_expert")`."""

FEW_ROWS, FEW_BFLOAT16_ROWS = 64, 4
PAIRS_OF_A_BATCH = 1024


def per_expert_forward(experts: Any, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The sum over each token's K experts of weight x output, as an implementation of transformers' experts interface.

    Compiled, on other devices, and where the experts are spread over processes, transformers' `grouped_mm` computes it.

    Args:
        experts: module with up_weight(), activate() and down_proj.
        hidden_TH: input.
        index_TK: experts of each token.
        weight_TK: their weights.
    """
    if not takes_pairs(experts, hidden_TH):
        return grouped_mm_experts_forward(experts, hidden_TH, index_TK, weight_TK)
    token_P = torch.arange(len(hidden_TH)).repeat_interleave(index_TK.shape[-1])
    return sum_over_pairs(experts, hidden_TH, token_P, index_TK.flatten(), weight_TK.flatten())


def takes_pairs(experts: Any, hidden_TH: Tensor) -> bool:
    """Whether `sum_over_pairs` is this module's way here."""
    return (
        experts.config._experts_implementation == PER_EXPERT
        and hidden_TH.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not getattr(experts, "_is_expert_parallel", False)
    )


def sum_over_pairs(experts: Any, hidden_TH: Tensor, token_P: Tensor, expert_P: Tensor, weight_P: Tensor) -> Tensor:
    """For every token the sum over its pairs of weight x expert's output, [T, H].

    Args:
        experts: module with up_weight(), activate() and down_proj.
        hidden_TH: input.
        token_P: token of each pair.
        expert_P: expert of each pair.
        weight_P: weight of each pair.
    """
    if len(hidden_TH) == 1:
        return _sum_of_one_token(experts, hidden_TH, expert_P, weight_P)
    up_NFH, down_NHF = experts.up_weight(), experts.down_proj
    # float32 sums: a token may have many experts
    output_TH = torch.zeros_like(hidden_TH, dtype=torch.promote_types(hidden_TH.dtype, torch.float32))
    order_P, counts_N = by_expert(expert_P, len(up_NFH))
    token_P, weight_P = token_P[order_P], weight_P[order_P].unsqueeze(-1)
    for chosen, pairs in batches_of_experts(counts_N):
        counts = [counts_N[expert] for expert in chosen]
        inputs = hidden_TH.index_select(0, token_P[pairs]).split(counts)
        projected_P = torch.cat([linear(rows, up_NFH[expert]) for expert, rows in zip(chosen, inputs, strict=True)])
        units = (experts.activate(projected_P) * weight_P[pairs]).to(hidden_TH.dtype).split(counts)
        output_PH = torch.cat([linear(rows, down_NHF[expert]) for expert, rows in zip(chosen, units, strict=True)])
        output_TH.index_add_(0, token_P[pairs], output_PH.to(output_TH.dtype))
    return output_TH.to(hidden_TH.dtype)


def _sum_of_one_token(experts: Any, hidden_1H: Tensor, expert_P: Tensor, weight_P: Tensor) -> Tensor:
    """A decoding step has nothing to sort or to share out, and each call less is felt."""
    up_NFH, down_NHF, chosen = experts.up_weight(), experts.down_proj, expert_P.tolist()
    if not chosen:
        return torch.zeros_like(hidden_1H)
    projected_PU = torch.cat([F.linear(hidden_1H, up_NFH[expert]) for expert in chosen])
    units_PF = (experts.activate(projected_PU) * weight_P.unsqueeze(-1)).to(hidden_1H.dtype)
    output_PH = torch.cat(
        [F.linear(units_1F, down_NHF[expert]) for expert, units_1F in zip(chosen, units_PF.split(1), strict=True)]
    )
    wide = torch.promote_types(hidden_1H.dtype, torch.float32)
    return output_PH.sum(dim=0, keepdim=True, dtype=wide).to(hidden_1H.dtype)


def batches_of_experts(counts_N: Sequence[int]) -> Iterator[tuple[list[int], slice]]:
    """Experts that have pairs, in batches of at most PAIRS_OF_A_BATCH pairs or one expert, each with its pairs' place.

    What is not a product is done once a batch: for the single rows of a decoding step such calls cost more than the
    products, while a whole prompt's pairs at once would leave the cache.
    """
    chosen: list[int] = []
    start = end = 0
    for expert, count in enumerate(counts_N):
        if chosen and end - start + count > PAIRS_OF_A_BATCH:
            yield chosen, slice(start, end)
            chosen, start = [], end
        if count:
            chosen.append(expert)
            end += count
    if chosen:
        yield chosen, slice(start, end)


def sum_of_all(units_TNF: Tensor, weight_NHF: Tensor) -> Tensor:
    """The sum over all experts of units x weight, [T, H], in the units' dtype."""
    if units_TNF.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(units_TNF.flatten(1), weight_NHF.transpose(0, 1).flatten(1))
    # expert by expert: as one product it would need a copy of the weights, with the hidden size in front
    wide = torch.promote_types(units_TNF.dtype, torch.float32)
    output_TH = units_TNF.new_zeros(len(units_TNF), weight_NHF.shape[1], dtype=wide)
    for units_TF, weight_HF in zip(units_TNF.unbind(1), weight_NHF, strict=True):
        if units_TNF.dtype == wide and len(units_TF) > FEW_ROWS:
            output_TH.addmm_(units_TF, weight_HF.t())
        else:
            output_TH += linear(units_TF, weight_HF)
    return output_TH.to(units_TNF.dtype)


def linear(rows: Tensor, weight_OI: Tensor) -> Tensor:
    """F.linear of rows [..., I], by the form of the product that a CPU computes fastest.

    Of a few rows, weight x rows is up to twice as fast as rows x weight (MKL on AVX2). bfloat16 on a CPU without its
    instructions is seven times as fast in float32 as in torch's own loop, except for single rows.
    """
    count = rows.numel() // rows.shape[-1]
    if rows.device.type != "cpu" or count < 2 or torch.compiler.is_compiling():
        return F.linear(rows, weight_OI)
    if rows.dtype == torch.bfloat16:
        if count <= FEW_BFLOAT16_ROWS or has_bfloat16_products():
            return F.linear(rows, weight_OI)
        return linear(rows.float(), weight_OI.float()).to(rows.dtype)
    if count <= FEW_ROWS:
        return torch.mm(weight_OI, rows.reshape(-1, rows.shape[-1]).t()).t().unflatten(0, rows.shape[:-1])
    return F.linear(rows, weight_OI)


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions of its own."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def by_expert(expert_P: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The order that puts the pairs of each expert together, and how many each expert has."""
    return expert_P.argsort(stable=True), expert_P.bincount(minlength=num_experts).tolist()


def grouped_linear(rows: Tensor, weight_NOI: Tensor, expert: Tensor) -> Tensor:
    """Each row times the weight of its own expert; only experts that have rows are computed.

    Args:
        rows: [..., I].
        weight_NOI: one [O, I] per expert.
        expert: index of each row's expert, [...].

    Returns:
        [..., O].
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        sorted_P, order_P = expert.flatten().sort(stable=True)
        ends_N = torch.searchsorted(sorted_P, torch.arange(1, len(weight_NOI) + 1, device=rows.device), out_int32=True)
        output_PO = _grouped_mm(rows.flatten(0, -2)[order_P], weight_NOI.transpose(1, 2), ends_N)
    else:
        order_P, counts_N = by_expert(expert.flatten(), len(weight_NOI))
        groups = rows.flatten(0, -2)[order_P].split(counts_N)
        outputs = [linear(group, weight) for group, weight in zip(groups, weight_NOI, strict=True) if len(group)]
        output_PO = torch.cat(outputs)
    return torch.empty_like(output_PO).index_copy(0, order_P, output_PO).unflatten(0, expert.shape)


ALL_EXPERTS_FUNCTIONS.register(PER_EXPERT, per_expert_forward)
