"""What the loss gains and the parameters cost when one router alone gets another limit.

The residual stream above a layer does not depend on that layer's limits. So a batch goes through the model once under
the limits at hand, which keeps the input of each layer, and each alternative of a router in layer l needs the layers
from l on only.

Shape suffixes: B batch, S sequence, T tokens, N experts, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsmoe_megatron.evaluation.loading import LoadedModel
from dsmoe_megatron.evaluation.perplexity import (
    Measurement,
    Router,
    final_hidden_states,
    measure,
    router_modules,
)
from dsmoe_megatron.evaluation.windows import Batch, BatchTensors
from dsmoe_megatron.inference.policy import ExpertPolicy

Rule = Literal["threshold", "topk"]
Limits = Mapping[Router, float]
"""eps or K of every router."""

SAMPLED_SCORES = 2**20  # normalised probabilities kept of each router
COUNT_FACTORS = (0.5, 0.7, 0.85, 1.2, 1.45, 1.8)  # alternatives, in active experts of the limit at hand
TOP_K_STEPS = (-2, -1, 1, 2)


@dataclass(frozen=True)
class Effect:
    """What a limit of one router changes.

    Attributes:
        limit: eps or K.
        loss: added to the mean loss [nats per token].
        parameters: added to the active parameters per token.
    """

    limit: float
    loss: float
    parameters: float


def policy_of(rule: Rule, limits: Limits, layers: int) -> ExpertPolicy:
    """The policy with a limit per router."""
    name = "eps" if rule == "threshold" else "k"
    entries: list[dict[str, dict[str, Any]]] = [{} for _ in range(layers)]
    for (layer, kind), limit in limits.items():
        entries[layer][kind] = {name: limit}
    return ExpertPolicy(rule, expert_policy_layers=entries)


@torch.no_grad()
def effects(
    loaded: LoadedModel,
    batches: Sequence[Batch],
    rule: Rule,
    limits: Limits,
    advance: Callable[[int], object],
) -> dict[Router, list[Effect]]:
    """The effect of each alternative limit of each router, the limit at hand among them.

    Args:
        loaded: the model.
        batches: to measure on; the same for all, so that differences are paired.
        rule: of the limits.
        limits: at hand.
        advance: is told of each pass.
    """
    layers = loaded.architecture.num_hidden_layers
    base = Measurement(policy_of(rule, limits, layers))
    candidates = _alternatives(loaded, batches, rule, limits)
    trials = {
        (router, limit): Measurement(policy_of(rule, {**limits, router: limit}, layers))
        for router, values in candidates.items()
        for limit in values
    }
    for batch in batches:
        tensors = batch.read(loaded)
        inputs_LBSH = _measure_keeping_inputs(loaded, tensors, batch.stream.name, base)
        for (router, _), trial in trials.items():
            with _starting_at(loaded, router[0]):
                measure(loaded, tensors, batch.stream.name, trial, inputs_embeds=inputs_LBSH[router[0]])
            advance(1)
    for trial in trials.values():  # the layers before saw what they saw in the base's pass
        trial.routers = base.routers | trial.routers
    base_parameters, _ = base.active(loaded)
    found = {router: [Effect(limit, 0.0, 0.0)] for router, limit in limits.items()}
    for (router, limit), trial in trials.items():
        parameters, _ = trial.active(loaded)
        found[router].append(Effect(limit, trial.loss - base.loss, parameters - base_parameters))
    return found


def _alternatives(
    loaded: LoadedModel, batches: Sequence[Batch], rule: Rule, limits: Limits
) -> dict[Router, list[float]]:
    """Limits below and above each router's own."""
    if rule == "topk":
        experts = {"mlp": loaded.architecture.num_experts, "attention": loaded.architecture.num_attention_experts}
        return {
            (layer, kind): [top_k + step for step in TOP_K_STEPS if 1 <= top_k + step <= experts[kind]]
            for (layer, kind), top_k in limits.items()
        }
    scores = _normalised_probabilities(loaded, batches, policy_of(rule, limits, loaded.architecture.num_hidden_layers))
    return {router: _thresholds_around(scores[router], eps) for router, eps in limits.items()}


def _thresholds_around(probabilities_TN: Tensor, eps: float) -> list[float]:
    """eps at which COUNT_FACTORS times as many experts are active as at `eps`."""
    experts = probabilities_TN.shape[-1]
    active = float((probabilities_TN > eps).double().sum(dim=-1).clamp(min=1).mean())
    counts = [min(factor * active, experts) for factor in COUNT_FACTORS]
    ordered = probabilities_TN.flatten().sort(descending=True).values
    # between the last probability that is above and the next one
    places = [min(round(count / experts * len(ordered)), len(ordered) - 1) for count in counts if count >= 1]
    found = {round(float(ordered[place]), 4) for place in places}
    return sorted(found - {eps})


@torch.no_grad()
def _normalised_probabilities(
    loaded: LoadedModel, batches: Sequence[Batch], policy: ExpertPolicy
) -> dict[Router, Tensor]:
    """N x S of some tokens of each router under a policy, [T, N]."""
    kept: dict[Router, list[Tensor]] = {}

    def keep(router: Router) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
            scores_TN = outputs[1]
            kept.setdefault(router, []).append((scores_TN * scores_TN.shape[-1]).cpu())

        return hook

    loaded.set_policy(policy)
    modules = router_modules(loaded)
    hooks = [module.register_forward_hook(keep(router)) for router, module in modules.items()]
    try:
        for batch in batches:
            final_hidden_states(loaded, batch.read(loaded))
            if all(sum(map(Tensor.numel, parts)) >= SAMPLED_SCORES for parts in kept.values()):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return {router: torch.cat(parts) for router, parts in kept.items()}


def _measure_keeping_inputs(loaded: LoadedModel, tensors: BatchTensors, stream: str, into: Measurement) -> list[Tensor]:
    """As measure; returns the input of each layer, [B, S, H]."""
    inputs: list[Tensor] = []

    def keep(_layer: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        inputs.append(arguments[0] if arguments else named["hidden_states"])

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in loaded.model.model.layers]
    try:
        measure(loaded, tensors, stream, into)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@contextmanager
def _starting_at(loaded: LoadedModel, layer: int) -> Iterator[None]:
    """Within, the model begins with this layer, whose input it takes as inputs_embeds."""
    decoder = loaded.model.model
    layers = decoder.layers
    decoder.layers = layers[layer:]
    try:
        yield
    finally:
        decoder.layers = layers
