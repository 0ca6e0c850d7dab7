"""Limits of each layer that meet a wanted active share, or a wanted perplexity loss, at the least cost.

1. The uniform policy that meets the target: one eps, or one K, for all layers.
2. Around it, what each alternative limit of each router adds to the loss and to the active parameters (sensitivity.py).
3. The choice that adds the least loss for the same parameters: with a price per parameter every router takes the limit
   of least loss + price x parameters, and the price is the one at which the parameters add up to no more than before.
   It is the greedy exchange of the cheapest parameters, to its end. The whole is repeated once from what it finds.
4. The effects were taken to add up, so the choice is scaled (all eps by one factor; for K another price) until it
   meets the target in a real evaluation, and is compared with the uniform policy on windows that step 2 has not seen.
   The uniform policy stays where the layers' own limits are no better there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsmoe_megatron.errors import ConfigurationError, DataError
from dsmoe_megatron.evaluation.loading import LoadedModel
from dsmoe_megatron.evaluation.perplexity import Measurement, Router, sweep
from dsmoe_megatron.evaluation.policies import policy_values
from dsmoe_megatron.evaluation.sensitivity import Effect, Limits, Rule, effects, policy_of
from dsmoe_megatron.evaluation.windows import Batch
from dsmoe_megatron.inference.policy import ExpertPolicy, policy_name
from dsmoe_megatron.planning.parameters import active_share
from dsmoe_megatron.planning.presentation import table

Advance = Callable[[int], object]

HELD_OUT = 4  # every fourth window is for the comparison alone
ROUNDS = 2
SMALLEST_EPS = 1e-3
SHARE_TOLERANCE = 5e-4  # of the parameters
LOSS_TOLERANCE = 2e-4  # relative perplexity
MOST_EVALUATIONS = 14  # of one search


@dataclass(frozen=True)
class Target:
    """Either is set: the active share to stay below, or the perplexity loss relative to the reference."""

    share: float | None
    perplexity_loss: float | None

    def check(self, loaded: LoadedModel, rule: Rule) -> None:
        """Refuse what cannot be met.

        Raises:
            ConfigurationError: names the bounds.
        """
        model = loaded.architecture
        if not (model.has_mlp_router or model.has_attention_router) or loaded.reference_policy.expert_policy != "dense":
            raise ConfigurationError(
                "--calibrate", rule, "only a densely trained model with routers has limits to find"
            )
        least = active_share(model, 1, 1)
        if self.share is not None and not least <= self.share < 1:
            bounds = f"must be from {least:.4f}, one expert in each layer, to below 1"
            raise ConfigurationError("--target-share", self.share, bounds)
        if self.perplexity_loss is not None and not 0 < self.perplexity_loss < math.inf:
            raise ConfigurationError("--target-perplexity-loss", self.perplexity_loss, "must be above 0")

    def excess(self, found: Measurement, dense: Measurement, loaded: LoadedModel) -> float:
        """How far a measurement is beyond the target; at most 0 meets it."""
        if self.share is not None:
            return found.active(loaded)[1] - self.share
        assert self.perplexity_loss is not None
        return found.perplexity / dense.perplexity - 1 - self.perplexity_loss

    @property
    def tolerance(self) -> float:
        return SHARE_TOLERANCE if self.share is not None else LOSS_TOLERANCE

    def cost(self, found: Measurement, loaded: LoadedModel) -> float:
        """What is to be small once the target is met."""
        return found.perplexity if self.share is not None else found.active(loaded)[1]

    def is_better(self, ours: Measurement, theirs: Measurement, dense: Measurement, loaded: LoadedModel) -> bool:
        """Whether ours costs less, on windows that were not fitted. A wanted loss must be met there, or at least be no
        larger than theirs."""
        if self.perplexity_loss is not None:
            allowed = max(0.0, self.excess(theirs, dense, loaded))
            if self.excess(ours, dense, loaded) > allowed:
                return False
        return self.cost(ours, loaded) < self.cost(theirs, loaded)

    def __str__(self) -> str:
        if self.share is not None:
            return f"active share of at most {self.share:.1%}"
        return f"perplexity loss of at most {self.perplexity_loss:.2%}"


@dataclass
class Calibration:
    """What was found.

    Attributes:
        target: that was to be met.
        policy: uniform, or with limits per layer.
        per_layer: whether the limits per layer were better.
        rows: (policy, windows) -> measurement; windows are calibration or held-out.
        loaded: the model.
    """

    target: Target
    policy: ExpertPolicy
    per_layer: bool
    rows: dict[tuple[str, str], Measurement]
    loaded: LoadedModel

    @property
    def verdict(self) -> str:
        if self.per_layer:
            return "kept: limits per layer, better than the uniform policy on the held-out windows"
        return "kept: the uniform policy; limits per layer were no better on the held-out windows"

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": {"share": self.target.share, "perplexity_loss": self.target.perplexity_loss},
            "kept": "per layer" if self.per_layer else "uniform",
            "policy": policy_values(self.policy),
            "measured": [
                {
                    "policy": name,
                    "windows": windows,
                    "limits": policy_values(found.policy),
                    "loss": found.loss,
                    "perplexity": found.perplexity,
                    "scored_tokens": sum(found.scored.values()),
                    "active_share": found.active(self.loaded)[1],
                    "active_parameters": found.active(self.loaded)[0],
                }
                for (name, windows), found in self.rows.items()
            ],
        }

    def as_text(self) -> str:
        header = ["", "windows", "perplexity", "against dense", "share"]
        rows = [
            [
                name,
                windows,
                f"{found.perplexity:.4f}",
                f"{found.perplexity / self.rows['dense', windows].perplexity - 1:+.3%}",
                f"{found.active(self.loaded)[1]:.2%}",
            ]
            for (name, windows), found in self.rows.items()
        ]
        return "\n".join([f"target: {self.target}", "", *table(header, rows), "", self.verdict, *self._limits()])

    def _limits(self) -> list[str]:
        layers = self.policy.expert_policy_layers
        if layers is None:
            return [f"policy: {policy_name(self.policy)}"]
        kinds = [kind for kind in ("attention", "mlp") if kind in layers[0]]
        name = "K" if self.policy.expert_policy == "topk" else "eps"
        rows = [
            [str(index), *(f"{next(iter(entry[kind].values())):g}" for kind in kinds)]
            for index, entry in enumerate(layers)
        ]
        return table(["layer", *(f"{name}, {'MLP' if kind == 'mlp' else kind}" for kind in kinds)], rows)


@dataclass
class _Search:
    """The model, the windows and the target, and what every step asks of them."""

    loaded: LoadedModel
    batches: Sequence[Batch]
    rule: Rule
    target: Target
    advance: Advance
    dense: Measurement = field(init=False)
    _measured: dict[frozenset[tuple[Router, float]], Measurement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense = self.evaluate(self.loaded.reference_policy, self.batches)

    @property
    def routers(self) -> list[Router]:
        return sorted(self.dense.routers)

    def evaluate(self, policy: ExpertPolicy, batches: Sequence[Batch]) -> Measurement:
        return sweep(self.loaded, {"": policy}, batches, lambda _tokens: self.advance(1))[""]

    def measure(self, limits: Limits) -> Measurement:
        key = frozenset(limits.items())
        if key not in self._measured:  # limits are rounded, so a search comes to the same ones again
            policy = policy_of(self.rule, limits, self.loaded.architecture.num_hidden_layers)
            self._measured[key] = self.evaluate(policy, self.batches)
        return self._measured[key]

    def excess(self, found: Measurement) -> float:
        return self.target.excess(found, self.dense, self.loaded)

    def cost(self, limits: Limits) -> float:
        return self.target.cost(self.measure(limits), self.loaded)


def calibrate(
    loaded: LoadedModel, batches: Sequence[Batch], rule: Rule, target: Target, advance: Advance = lambda _passes: None
) -> Calibration:
    """Find limits per layer, and keep them if they are better than the uniform policy.

    Args:
        loaded: a densely trained model with routers.
        batches: calibration windows; every fourth is held out for the comparison.
        rule: threshold (eps) or topk (K).
        target: checked.
        advance: is told of each forward pass.

    Raises:
        DataError: there are too few windows to hold any out.
        ConfigurationError: no uniform policy meets the target on this data.
    """
    seen, held_out = _split(batches)
    search = _Search(loaded, [*seen, *held_out], rule, target, advance)
    uniform = best = _uniform_threshold(search) if rule == "threshold" else _uniform_top_k(search)
    for _ in range(ROUNDS):
        proposed = _meet(search, best, effects(loaded, seen, rule, best, advance))
        if proposed is None or search.cost(proposed) >= search.cost(best):
            break
        best = proposed

    policies = {
        "dense": loaded.reference_policy,
        "uniform": _as_uniform(uniform, rule),
        "per layer": policy_of(rule, best, loaded.architecture.num_hidden_layers),
    }
    rows = {
        (name, windows): search.evaluate(policy, part)
        for windows, part in (("calibration", seen), ("held-out", held_out))
        for name, policy in policies.items()
    }
    ours, theirs, of_dense = (rows[name, "held-out"] for name in ("per layer", "uniform", "dense"))
    per_layer = best != uniform and target.is_better(ours, theirs, of_dense, loaded)
    kept = policies["per layer" if per_layer else "uniform"]
    return Calibration(target, kept, per_layer, rows, loaded)


def _split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Every fourth window apart, in batches of their own."""
    parts: tuple[list[Batch], list[Batch]] = ([], [])
    number = 0
    for batch in batches:
        groups: tuple[list[Any], list[Any]] = ([], [])
        for window in batch.windows:
            number += 1
            groups[number % HELD_OUT == 0].append(window)
        for part, group in zip(parts, groups, strict=True):
            if group:
                part.append(Batch(batch.stream, group))
    if not parts[1]:
        raise DataError(f"{number} windows are too few to calibrate on: give more data or a shorter --sequence-length")
    return parts


def _as_uniform(limits: Limits, rule: Rule) -> ExpertPolicy:
    values = {kind: limit for (_, kind), limit in limits.items()}
    if rule == "threshold":
        return ExpertPolicy("threshold", expert_threshold=next(iter(values.values())))
    return ExpertPolicy("topk", values.get("mlp"), values.get("attention"))  # type: ignore[arg-type]


def _uniform_threshold(search: _Search) -> Limits:
    """One eps for all routers that just meets the target."""

    def limits(eps: float) -> Limits:
        return dict.fromkeys(search.routers, eps)

    model = search.loaded.architecture
    found = _largest_scale(search, limits, SMALLEST_EPS, float(max(model.num_experts, model.num_attention_experts)))
    if found is None:
        raise ConfigurationError("target", str(search.target), "no eps meets it on this data")
    return found


def _largest_scale(search: _Search, limits: Callable[[float], Limits], low: float, high: float) -> Limits | None:
    """The limits at the scale that meets the target most closely, by the secant method on a logarithmic scale.

    A larger scale means fewer active experts: less share, more loss. Returns None where neither end meets the target.
    """
    sign = -1.0 if search.target.share is not None else 1.0
    left, right = (math.log(low), math.log(high))
    values = {place: sign * search.excess(search.measure(limits(_rounded(math.exp(place))))) for place in (left, right)}
    best = min((p for p in values if sign * values[p] <= 0), key=lambda p: abs(values[p]), default=None)
    at_left, at_right = values[left], values[right]
    if at_left > 0 or at_right < 0:  # the target is beyond an end
        return None if best is None else limits(_rounded(math.exp(best)))
    side = 0
    for _ in range(MOST_EVALUATIONS):
        place = (
            (left * at_right - right * at_left) / (at_right - at_left) if at_right != at_left else (left + right) / 2
        )
        place = min(max(place, left + 0.05 * (right - left)), right - 0.05 * (right - left))
        value = values[place] = sign * search.excess(search.measure(limits(_rounded(math.exp(place)))))
        if sign * value <= 0 and (best is None or abs(value) < abs(values[best])):
            best = place
            if abs(value) <= search.target.tolerance:
                break
        # Illinois: an end that stays twice counts half, so that the other one comes nearer
        if value < 0:
            left, at_left = place, value
            at_right, side = (at_right / 2, -1) if side == -1 else (at_right, -1)
        else:
            right, at_right = place, value
            at_left, side = (at_left / 2, 1) if side == 1 else (at_left, 1)
    return None if best is None else limits(_rounded(math.exp(best)))


def _rounded(eps: float) -> float:
    """Four significant digits: what is evaluated is what the policy file will say."""
    return float(f"{eps:.4g}")


def _uniform_top_k(search: _Search) -> Limits:
    """One K for all MLPs, and all attention experts unless one MLP expert is still too much."""
    model = search.loaded.architecture
    pairs = [(top_k, model.num_attention_experts) for top_k in range(model.num_experts, 0, -1)]
    pairs += [(1, top_k) for top_k in range(model.num_attention_experts - 1, 0, -1)]
    kinds = {kind for _, kind in search.routers}

    def limits(pair: tuple[int, int]) -> Limits:
        return {(layer, kind): pair[0] if kind == "mlp" else pair[1] for layer, kind in search.routers}

    if "mlp" not in kinds:
        pairs = [(1, top_k) for top_k in range(model.num_attention_experts, 0, -1)]
    if search.target.share is not None:  # known without data
        meeting = [pair for pair in pairs if active_share(model, *pair) <= search.target.share]
        return limits(meeting[0])
    low, high = 0, len(pairs) - 1  # pairs[0] is dense and loses nothing
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if search.excess(search.measure(limits(pairs[middle]))) <= 0 else (low, middle - 1)
    return limits(pairs[low])


def _meet(search: _Search, limits: Limits, found: Mapping[Router, Sequence[Effect]]) -> Limits | None:
    """The exchange of parameters that the effects recommend, brought to the target in real evaluations."""
    choices = _choices(found)
    if search.rule == "topk":
        return _top_k_that_meets(search, choices)
    # the same parameters as the limits at hand; the scale does the rest
    affordable = [choice for choice, _, parameters in choices if parameters <= 0]
    chosen = affordable[0] if affordable else limits

    def scaled(factor: float) -> Limits:
        return {router: _rounded(eps * factor) for router, eps in chosen.items()}

    return _largest_scale(search, scaled, 0.5, 2.0)


def _choices(found: Mapping[Router, Sequence[Effect]]) -> list[tuple[Limits, float, float]]:
    """(limits, added loss, added parameters) for rising prices per parameter: fewer and fewer parameters."""
    prices = {0.0}
    for options in found.values():
        for one in options:
            for other in options:
                if one.parameters > other.parameters and other.loss > one.loss:
                    prices.add((other.loss - one.loss) / (one.parameters - other.parameters))
    choices: list[tuple[Limits, float, float]] = []
    for price in sorted(prices):
        price *= 1 + 1e-9  # just above the price at which two limits are equal, the cheaper one is taken
        best = {
            router: min(options, key=lambda effect: effect.loss + price * effect.parameters)
            for router, options in found.items()
        }
        limits = {router: effect.limit for router, effect in best.items()}
        if not choices or limits != choices[-1][0]:
            loss, parameters = (
                sum(getattr(effect, name) for effect in best.values()) for name in ("loss", "parameters")
            )
            choices.append((limits, loss, parameters))
    return choices


def _top_k_that_meets(search: _Search, choices: Sequence[tuple[Limits, float, float]]) -> Limits | None:
    """The choice that just meets the target: as prices rise, the share falls and the loss rises."""
    ordered = [limits for limits, _, _ in choices]
    if search.target.share is None:
        ordered.reverse()
    low, high = 0, len(ordered)  # the first that meets is in low..high; high: none
    while low < high:
        middle = (low + high) // 2
        meets = search.excess(search.measure(ordered[middle])) <= 0
        low, high = (low, middle) if meets else (middle + 1, high)
    return ordered[low] if low < len(ordered) else None
