"""The router of a densely trained MoE layer, its mutual-information loss, and the gate that applies its scores.

Source: arXiv 2404.05567, equations 1 and 3-8.
Shape suffixes: S sequence, B micro-batch, T tokens (S x B flattened), E experts, H hidden size, R router width,
U units (MLP hidden units or attention channels), G gated blocks of units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RouterKind = Literal["attention", "mlp"]
# (scores [T, E], layer index from 0, kind) -> mask [T, E], True where the expert is active
ExpertChoice = Callable[[Tensor, int, RouterKind], Tensor]


@dataclass(frozen=True)
class RouterOptions:
    """What a layer specification hands to its router.

    Attributes:
        kind: which of a layer's two routers it is.
        num_experts: E.
        router_type: `linear` [E, H], or `mlp` [R, H] -> GeLU -> [E, R].
        router_hidden_size: R, for `mlp`.
        mi_alpha: weight of this router's mutual-information loss.
        mi_scope: `micro_batch`, or `data_parallel`: the mean score is taken over that micro-batch on all
            data-parallel ranks.
    """

    kind: RouterKind
    num_experts: int
    router_type: Literal["linear", "mlp"] = "linear"
    router_hidden_size: int = 512
    mi_alpha: float = 0.0
    mi_scope: Literal["micro_batch", "data_parallel"] = "micro_batch"


@dataclass(frozen=True)
class RouterGroups:
    """Process groups of a router.

    Attributes:
        tensor: tensor-parallel group; under sequence parallelism its ranks hold different tokens.
        context: context-parallel group; its ranks hold different tokens.
        data: data-parallel group, without the context-parallel ranks.
        gate: ranks over which the gated units are split: `tensor`, or for an expert-parallel MLP the
            (expert-tensor x expert) group.
    """

    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    gate: dist.ProcessGroup


@dataclass
class RouterStatistics:
    """What a router saw since the last `reset`, summed over forward passes; all on the device, nothing synchronised.

    Attributes:
        passes: forward passes.
        mi_loss: sum over passes of this rank's share of the mutual-information loss (without alpha) [nats].
        tokens: tokens seen by this rank.
        score_sum_E: sum of the scores.
        entropy_sum: sum of the scores' entropies [nats].
        active_sum: number of (token, expert) pairs with E x score above `threshold`, the best expert always.
    """

    passes: int = 0
    mi_loss: Tensor | float = 0.0
    tokens: int = 0
    score_sum_E: Tensor | float = 0.0
    entropy_sum: Tensor | float = 0.0
    active_sum: Tensor | float = 0.0

    def reset(self) -> None:
        self.passes = self.tokens = 0
        self.mi_loss = self.score_sum_E = self.entropy_sum = self.active_sum = 0.0


@dataclass
class RouterControl:
    """What a run sets on a router between passes.

    Attributes:
        choose_experts: chooses the experts that fire outside training; None fires all of them.
        threshold: eps of RouterStatistics.active_sum; None collects no expert-use statistics.
    """

    choose_experts: ExpertChoice | None = None
    threshold: float | None = None
    statistics: RouterStatistics = field(default_factory=RouterStatistics)


class _Float32Linear(nn.Linear):
    """Computes in float32 whatever the dtype of its input and weight, and keeps neither in float32 for the gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return router_gating_linear(input, self.weight, None, torch.float32)


class Router(MegatronModule):
    """Scores every expert for every token; replicated over the tensor-parallel ranks.

    Args:
        config: megatron-core's configuration: hidden size, dtype, sequence parallelism.
        options: this router's own.
        groups: its process groups.
        layer_number: from 1, over the whole model; 0 until the layer that owns the router knows it.
    """

    def __init__(
        self, config: TransformerConfig, options: RouterOptions, groups: RouterGroups, layer_number: int = 0
    ) -> None:
        super().__init__(config=config)
        self.options, self.groups, self.layer_number = options, groups, layer_number
        self.control = RouterControl()
        width = options.router_hidden_size
        if options.router_type == "mlp":
            self.fc1 = _Float32Linear(config.hidden_size, width, bias=False, dtype=config.params_dtype)
            self.fc2 = _Float32Linear(width, options.num_experts, bias=False, dtype=config.params_dtype)
        else:
            self.weight = nn.Parameter(torch.empty(options.num_experts, config.hidden_size, dtype=config.params_dtype))
        self.to(torch.cuda.current_device())
        self.tokens_are_split = config.sequence_parallel and groups.tensor.size() > 1
        for parameter in self.parameters():
            # each rank sees its own tokens: megatron-core sums the gradient over the tensor-parallel ranks
            parameter.sequence_parallel = self.tokens_are_split
        self.mi_groups = [groups.tensor] if self.tokens_are_split else []
        if groups.context.size() > 1:
            self.mi_groups.append(groups.context)
        self.mi_weight = options.mi_alpha
        if options.mi_scope == "data_parallel" and groups.data.size() > 1:
            self.mi_groups.append(groups.data)
            # one loss over all data-parallel ranks, whose gradients megatron-core averages: undo the average
            self.mi_weight *= groups.data.size()

    def logits(self, hidden_SBH: Tensor) -> Tensor:
        """Router logits, float32, [S, B, E]: bf16 would tie experts and blur the probabilities that thresholds read."""
        if self.options.router_type == "linear":
            return router_gating_linear(hidden_SBH, self.weight, None, torch.float32)
        logits_SBE: Tensor = self.fc2(F.gelu(self.fc1(hidden_SBH)))
        return logits_SBE

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        """Log-probabilities of the experts for the tokens that the gated units see.

        Args:
            hidden_SBH: normalised input of the layer; under sequence parallelism this rank's tokens.

        Returns:
            float32 [S', B, E]; S' is the sequence gathered over the gate group where tokens are split over it. In the
            backward pass each rank's part of the gradient (that of its own experts or heads) is summed.
        """
        # under autocast or in a bf16 model the softmax stays in float32
        log_scores_SBE = F.log_softmax(self.logits(hidden_SBH), dim=-1)
        if self.training:
            if torch.is_grad_enabled():
                log_scores_SBE = self._attach_mutual_information_loss(log_scores_SBE)
        elif self.control.choose_experts is not None:
            active_TE = self.control.choose_experts(
                log_scores_SBE.flatten(0, 1).exp(), self.layer_number - 1, self.options.kind
            )
            log_scores_SBE = log_scores_SBE.masked_fill(~active_TE.view_as(log_scores_SBE), float("-inf"))
        return self._to_gate_ranks(log_scores_SBE)

    def _to_gate_ranks(self, log_scores_SBE: Tensor) -> Tensor:
        if self.groups.gate is not self.groups.tensor or self.tokens_are_split:
            return gather_from_sequence_parallel_region(log_scores_SBE, group=self.groups.gate)
        return copy_to_tensor_model_parallel_region(log_scores_SBE, group=self.groups.tensor)

    def _attach_mutual_information_loss(self, log_scores_SBE: Tensor) -> Tensor:
        log_scores_TE = log_scores_SBE.flatten(0, 1)
        loss = mutual_information_loss(log_scores_TE, self.mi_groups)
        self._record(log_scores_TE.detach(), loss.detach())
        if self.mi_weight == 0.0:
            return log_scores_SBE
        # the schedule supplies 1 / micro-batches and the context-parallel size; see MoEAuxLossAutoScaler's callers
        return MoEAuxLossAutoScaler.apply(log_scores_SBE, self.mi_weight * loss)

    def _record(self, log_scores_TE: Tensor, mi_loss: Tensor) -> None:
        statistics = self.control.statistics
        statistics.passes += 1
        statistics.mi_loss = statistics.mi_loss + mi_loss
        if self.control.threshold is None:
            return
        scores_TE = log_scores_TE.exp()
        statistics.tokens += scores_TE.shape[0]
        statistics.score_sum_E = statistics.score_sum_E + scores_TE.sum(dim=0)
        statistics.entropy_sum = statistics.entropy_sum - (scores_TE * log_scores_TE).sum()
        above_TE = scores_TE * self.options.num_experts > self.control.threshold
        statistics.active_sum = statistics.active_sum + above_TE.sum(dim=-1).clamp(min=1).sum()


def mutual_information_loss(
    log_scores_TE: Tensor, groups: Sequence[dist.ProcessGroup] = (), token_mask_T: Tensor | None = None
) -> Tensor:
    """This rank's share of -I(expert; token) in nats: -H(mean score) + mean H(score), in [-log E, 0].

    The value is computed as -mean KL(score || mean score), which is the same and does not subtract two nearly
    equal entropies. The mean score needs no gradient: the loss is stationary in it (its derivative is the same
    constant for every expert, and the scores sum to one), so no communication is needed in the backward pass.
    The gradient is exact along scores that sum to one, as those of a softmax do.

    Args:
        log_scores_TE: log-probabilities of the tokens of this rank.
        groups: process groups that hold the other tokens of the averaging set, one after the other (the
            sequence-parallel group, the context-parallel group, for `data_parallel` scope the data-parallel group).
            The sum of the returned shares over these groups is the loss.
        token_mask_T: True for tokens that count; padding is False. None counts all.

    Returns:
        Scalar, float32.
    """
    weight_T = log_scores_TE.new_ones(len(log_scores_TE)) if token_mask_T is None else token_mask_T.to(log_scores_TE)
    loss: Tensor = _MutualInformation.apply(log_scores_TE, weight_T, groups)
    return loss


class _MutualInformation(torch.autograd.Function):
    """-sum_t w_t KL(score_t || mean score) / sum of w; of the tokens' size only the log-scores are kept.

    With the mean fixed, d loss / d log score_te = -w_t score_te (log score_te - log mean_e + 1) / sum of w. The 1 is
    left out: scores that sum to one have no part in its direction, and beside it the rest would lose its last digits.
    """

    @staticmethod
    def forward(ctx: Any, log_scores_TE: Tensor, weight_T: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
        scores_TE = log_scores_TE.exp()
        sums = torch.cat([weight_T @ scores_TE, weight_T.sum()[None]])  # [E + 1]: summed scores, token count
        for group in groups:
            dist.all_reduce(sums, group=group)
        count = sums[-1].clamp(min=1.0)
        share_T = weight_T / count
        log_mean_E = (sums[:-1] / count).clamp(min=torch.finfo(torch.float32).tiny).log()
        divergence_T = scores_TE.mul_(log_scores_TE - log_mean_E).sum(dim=-1)
        ctx.save_for_backward(log_scores_TE, log_mean_E, share_T)
        return -(share_T @ divergence_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        log_scores_TE, log_mean_E, share_T = ctx.saved_tensors
        gradient_TE = (log_scores_TE - log_mean_E).mul_(log_scores_TE.exp())
        return gradient_TE.mul_((-gradient * share_T).unsqueeze(-1)), None, None


class _ScaleBlocks(torch.autograd.Function):
    """y = score * value, block by block, without a tensor of the activations' size beyond what the dense layer has.

    d loss / d log score = score * d loss / d score = sum over the block of (d loss / d y) * y, so the backward pass
    needs y, which the next product keeps anyway, and not the unscaled values. It is also the last to need y and
    overwrites it: a second backward pass through the same graph raises autograd's error of a modified saved tensor.
    """

    @staticmethod
    def forward(ctx: Any, values_SBU: Tensor, log_scores_SBG: Tensor, repeats: int, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(values_SBU)
        scaled_SBU = values_SBU if in_place else torch.empty_like(values_SBU)
        gates_SB1G1 = log_scores_SBG.exp()[..., None, :, None]
        # `out` rounds once, from float32 scores to the dtype of the values, without a float32 copy of the values
        torch.mul(
            _blocks(values_SBU, log_scores_SBG, repeats),
            gates_SB1G1,
            out=_blocks(scaled_SBU, log_scores_SBG, repeats),
        )
        ctx.save_for_backward(scaled_SBU, log_scores_SBG)
        ctx.repeats = repeats
        return scaled_SBU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SBU: Tensor) -> tuple[Tensor, Tensor, None, None]:
        scaled_SBU, log_scores_SBG = ctx.saved_tensors
        gradient_SBRGU = _blocks(gradient_SBU, log_scores_SBG, ctx.repeats)
        # holds y, then (d loss / d y) * y, then the gradient of the values
        buffer_SBU = scaled_SBU.detach()
        buffer_SBRGU = _blocks(buffer_SBU, log_scores_SBG, ctx.repeats).mul_(gradient_SBRGU)
        log_score_gradient_SBG = buffer_SBRGU.sum(dim=(-3, -1), dtype=log_scores_SBG.dtype)
        torch.mul(gradient_SBRGU, log_scores_SBG.exp()[..., None, :, None], out=buffer_SBRGU)
        return buffer_SBU, log_score_gradient_SBG, None, None


def _blocks(units_SBU: Tensor, log_scores_SBG: Tensor, repeats: int) -> Tensor:
    """A view [S, B, R, G, U / (R * G)]."""
    return units_SBU.unflatten(-1, (repeats, log_scores_SBG.shape[-1], -1))


def scale_blocks(values_SBU: Tensor, log_scores_SBG: Tensor, repeats: int = 1) -> Tensor:
    """Scale equal blocks of units by their experts' scores (equations 3 and 7).

    Args:
        values_SBU: U units in R * G consecutive blocks of U / (R * G).
        log_scores_SBG: logarithm of the scores; -inf switches a block off.
        repeats: R, how often the scores repeat over the blocks: block r * G + g is scaled by score g.

    Returns:
        [S, B, U] in the dtype of the values.
    """
    scaled_SBU: Tensor = _ScaleBlocks.apply(values_SBU, log_scores_SBG, repeats, False)
    return scaled_SBU


def scale_blocks_(values_SBU: Tensor, log_scores_SBG: Tensor, repeats: int = 1) -> Tensor:
    """`scale_blocks` in the memory of the values, which whatever computed them must not need for its own gradient."""
    scaled_SBU: Tensor = _ScaleBlocks.apply(values_SBU, log_scores_SBG, repeats, True)
    return scaled_SBU
