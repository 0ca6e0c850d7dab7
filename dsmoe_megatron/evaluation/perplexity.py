"""Perplexity and active parameters under several expert policies, in one pass over the data.

Every batch is read once and goes through the model once per policy. From the first layer with fewer active experts on,
each policy has a residual stream of its own, on which all later routers decide, so the passes share no more than that.

Shape suffixes: B batch, S sequence, T tokens (B x S flattened), N experts, H hidden size.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_megatron.evaluation.loading import LoadedModel
from dsmoe_megatron.evaluation.windows import NOT_SCORED, Batch, BatchTensors
from dsmoe_megatron.inference.policy import ExpertPolicy, RouterKind, active_experts
from dsmoe_megatron.perplexity import perplexity_of
from dsmoe_megatron.planning.parameters import active_parameters, active_share

LOGITS_AT_ONCE = 2**26  # float32 logits in memory: 256 MB

Router = tuple[int, RouterKind]
"""A router's place: layer from 0, and kind."""


@dataclass
class RouterCounts:
    """What one router saw and chose.

    Attributes:
        histogram: tokens by number of active experts, 0 to N, [N + 1].
        score_sum: sum of the probabilities over the tokens, [N].
        entropy_sum: sum of the tokens' entropies [nats].
    """

    histogram: Tensor
    score_sum: Tensor
    entropy_sum: Tensor

    @property
    def tokens(self) -> int:
        return int(self.histogram.sum())

    @property
    def mean_active(self) -> float:
        """Active experts per token."""
        experts = torch.arange(len(self.histogram), dtype=torch.float64, device=self.histogram.device)
        return float((self.histogram * experts).sum() / self.histogram.sum())

    def as_dict(self) -> dict[str, Any]:
        """Names and units as in a run's expert_use.jsonl; tokens_by_active_experts are shares of 0 to N active."""
        share_N = self.score_sum / self.tokens
        return {
            "active_experts": self.mean_active,
            "tokens_by_active_experts": (self.histogram / self.tokens).tolist(),
            "share": share_N.tolist(),
            "marginal_entropy": float(-torch.special.xlogy(share_N, share_N).sum()),
            "conditional_entropy": float(self.entropy_sum) / self.tokens,
        }


@dataclass
class Measurement:
    """Sums over the batches that a policy has seen.

    Attributes:
        policy: that chose the experts.
        losses: stream -> sum of the scored tokens' cross-entropies [nats].
        scored: stream -> scored tokens.
        routers: per router of the model.
        fed: tokens that went through the model.
        seconds: that this took.
    """

    policy: ExpertPolicy
    losses: dict[str, float] = field(default_factory=dict)
    scored: dict[str, int] = field(default_factory=dict)
    routers: dict[Router, RouterCounts] = field(default_factory=dict)
    fed: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean over all scored tokens [nats per token]."""
        return sum(self.losses.values()) / sum(self.scored.values())

    @property
    def perplexity(self) -> float:
        """Infinite where the loss is too large for a float's exponential."""
        return perplexity_of(self.loss)

    def mean_active(self, kind: RouterKind, layers: int) -> list[float]:
        """Active experts per token of every layer; 1 where there is no router."""
        return [
            self.routers[layer, kind].mean_active if (layer, kind) in self.routers else 1.0 for layer in range(layers)
        ]

    def active(self, loaded: LoadedModel) -> tuple[float, float]:
        """Active parameters per token without embeddings, and their share of all."""
        model = loaded.architecture
        experts = [self.mean_active(kind, model.num_hidden_layers) for kind in ("mlp", "attention")]
        return active_parameters(model, *experts), active_share(model, *experts)


def sweep(
    loaded: LoadedModel,
    policies: Mapping[str, ExpertPolicy],
    batches: Sequence[Batch],
    advance: Callable[[int], object] = lambda _tokens: None,
) -> dict[str, Measurement]:
    """Measure the model under each policy on the same data.

    Args:
        loaded: the model.
        policies: by name.
        batches: the data.
        advance: is told the number of tokens after each pass.

    Returns:
        By name. The router statistics of `share` and entropies are those of the policy's own pass.
    """
    measured = {name: Measurement(policy) for name, policy in policies.items()}
    for batch in batches:
        tensors = batch.read(loaded)
        for measurement in measured.values():
            measure(loaded, tensors, batch.stream.name, measurement)
            advance(tensors.input_ids.numel())
    return measured


@torch.no_grad()
def measure(loaded: LoadedModel, tensors: BatchTensors, stream: str, into: Measurement, **inputs: Tensor) -> None:
    """One forward pass under the measurement's policy, added to it; `inputs` as in final_hidden_states."""
    loaded.set_policy(into.policy)
    started = time.perf_counter()
    with counting(loaded, into):
        hidden_BSH = final_hidden_states(loaded, tensors, **inputs)
        loss = cross_entropy_sum(loaded, hidden_BSH, tensors.labels)
    into.seconds += time.perf_counter() - started
    into.fed += tensors.input_ids.numel()
    into.losses[stream] = into.losses.get(stream, 0.0) + loss
    into.scored[stream] = into.scored.get(stream, 0) + int((tensors.labels != NOT_SCORED).sum())


def final_hidden_states(loaded: LoadedModel, tensors: BatchTensors, **inputs: Tensor) -> Tensor:
    """What the output layer takes, [B, S, H]; `inputs` may give inputs_embeds in the tokens' place."""
    source = inputs or {"input_ids": tensors.input_ids}
    # positions that begin anew, without a mask or a cache, are how transformers is told of separate documents
    output = loaded.model.model(**source, position_ids=tensors.position_ids, use_cache=False)
    hidden_BSH: Tensor = output.last_hidden_state
    return hidden_BSH


def cross_entropy_sum(loaded: LoadedModel, hidden_BSH: Tensor, labels_BS: Tensor) -> float:
    """Summed cross-entropy of the scored tokens [nats]; all logits at once would be the largest tensor by far."""
    scored = labels_BS != NOT_SCORED
    hidden_TH, labels_T = hidden_BSH[scored], labels_BS[scored]
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(labels_T), step := max(1, LOGITS_AT_ONCE // loaded.vocab_size)):
        logits = loaded.model.lm_head(hidden_TH[start : start + step]).float()
        losses_T = F.cross_entropy(logits, labels_T[start : start + step], reduction="none")
        total += losses_T.double().sum().cpu()
    return float(total)


@contextmanager
def counting(loaded: LoadedModel, into: Measurement) -> Iterator[None]:
    """Within, what the routers of the model see and choose is counted."""
    hooks = [
        module.register_forward_hook(_CountingHook(place, into)) for place, module in router_modules(loaded).items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def router_modules(loaded: LoadedModel) -> dict[Router, torch.nn.Module]:
    """The routers of the model by place; a Llama has none."""
    model = loaded.architecture
    found: dict[Router, torch.nn.Module] = {}
    for layer in loaded.model.model.layers:
        if model.has_attention_router:
            found[layer.self_attn.layer_idx, "attention"] = layer.self_attn.router
        if model.has_mlp_router:
            found[layer.mlp.layer_idx, "mlp"] = layer.mlp.gate
    return found


class _CountingHook:
    """Takes a router's logits and scores, [T, N], and chooses once more as its layer will."""

    def __init__(self, place: Router, into: Measurement) -> None:
        self.place, self.into = place, into

    def __call__(self, _module: torch.nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        _, scores_TN = outputs
        layer, kind = self.place
        experts = scores_TN.shape[-1]
        active_TN = active_experts(scores_TN, self.into.policy, layer, kind)
        counts = self.into.routers.get(self.place)
        if counts is None:
            shapes = ((experts + 1,), (experts,), ())
            zeros = [torch.zeros(shape, dtype=torch.float64, device=scores_TN.device) for shape in shapes]
            counts = self.into.routers[self.place] = RouterCounts(*zeros)
        counts.histogram += torch.bincount(active_TN.sum(dim=-1), minlength=experts + 1)
        scores_TN = scores_TN.double()
        counts.score_sum += scores_TN.sum(dim=0)
        counts.entropy_sum -= torch.special.xlogy(scores_TN, scores_TN).sum()
