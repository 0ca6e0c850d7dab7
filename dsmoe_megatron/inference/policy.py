"""Expert policies: the one place that decides which experts are active. It travels with exported models.

Source: arXiv 2404.05567, section 4.3. Whatever the policy, scores are never renormalised over the active experts
(equation 1), and equal scores go to the expert with the lower index.
Shape suffixes: T tokens, E experts, K active experts of a token.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PolicyName = Literal["dense", "topk", "threshold", "threshold_topk"]
RouterKind = Literal["attention", "mlp"]


class PolicyError(ValueError):
    """A policy breaks a rule or does not fit the model; the message is one line, `key = value: rule`."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key} = {value!r}: {rule}")
        self.key, self.value, self.rule = key, value, rule


@dataclass(frozen=True)
class ExpertPolicy:
    """How experts are chosen. The fields have the names of the exported config.json.

    - `dense`: every expert.
    - `topk`: the best K of each token.
    - `threshold`: the experts whose normalised probability E x S is above eps, and always the best one.
    - `threshold_topk`: K is what `threshold` activates on average over the tokens of the call, per router. It depends
      on the batch, so it is for evaluation only.
    """

    expert_policy: PolicyName = "dense"
    """The rule; the values below that it does not use are checked and ignored."""
    num_experts_per_tok: int | None = None
    """K of the MLP experts; None is all."""
    attention_experts_per_tok: int | None = None
    """K of the attention experts; None is all."""
    expert_threshold: float | None = None
    """eps; in units of the uniform probability 1 / E."""
    attention_expert_threshold: float | None = None
    """eps of the attention experts; None is expert_threshold."""
    expert_policy_layers: Sequence[Mapping[str, Mapping[str, Any]]] | None = None
    """One {"mlp": {"k" | "eps": value}, "attention": {...}} per layer, over the values above; a kind may be absent. A
    value above that all layers go over is refused: whoever changes it would think that it counts."""

    @classmethod
    def from_config(cls, config: object) -> "ExpertPolicy":
        """The policy that a configuration object describes in attributes of these names; absent ones are None."""
        values: dict[str, Any] = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(cls)}
        return cls(**values)

    def with_changes(self, changes: Mapping[str, Any]) -> "ExpertPolicy":
        """This policy with other values; a new expert_threshold, given alone, holds for the attention as well."""
        if "expert_threshold" in changes:
            changes = {"attention_expert_threshold": None, **changes}
        return dataclasses.replace(self, **changes)

    def top_k(self, layer_index: int, kind: RouterKind, num_experts: int) -> int:
        """K of a router under `topk`."""
        scalar = self.num_experts_per_tok if kind == "mlp" else self.attention_experts_per_tok
        top_k = self._layer_value(layer_index, kind, "k", scalar)
        return num_experts if top_k is None else int(top_k)

    def threshold(self, layer_index: int, kind: RouterKind) -> float:
        """eps of a router under `threshold` and `threshold_topk`."""
        scalar = self.expert_threshold
        if kind == "attention" and self.attention_expert_threshold is not None:
            scalar = self.attention_expert_threshold
        threshold = self._layer_value(layer_index, kind, "eps", scalar)
        if threshold is None:
            raise PolicyError("expert_threshold", None, f"the {self.expert_policy} policy needs it")
        return float(threshold)

    def _layer_value(self, layer_index: int, kind: RouterKind, key: str, scalar: float | None) -> float | None:
        if self.expert_policy_layers is None:
            return scalar
        value: float | None = self.expert_policy_layers[layer_index].get(kind, {}).get(key, scalar)
        return value

    def validate(self, num_layers: int, num_experts: int, num_attention_experts: int) -> None:
        """Check every value against a model; a kind with one expert has no router, and its limits are not used.

        Raises:
            PolicyError: the first rule that is broken.
        """
        if self.expert_policy not in get_args(PolicyName):
            raise PolicyError("expert_policy", self.expert_policy, f"must be one of {', '.join(get_args(PolicyName))}")
        _check_top_k("num_experts_per_tok", self.num_experts_per_tok, num_experts)
        _check_top_k("attention_experts_per_tok", self.attention_experts_per_tok, num_attention_experts)
        _check_threshold("expert_threshold", self.expert_threshold)
        _check_threshold("attention_expert_threshold", self.attention_expert_threshold)
        self._validate_layers(num_layers, num_experts, num_attention_experts)
        if self.expert_policy in ("threshold", "threshold_topk"):
            for layer_index in range(num_layers):
                if num_experts > 1:
                    self.threshold(layer_index, "mlp")
                if num_attention_experts > 1:
                    self.threshold(layer_index, "attention")

    def _validate_layers(self, num_layers: int, num_experts: int, num_attention_experts: int) -> None:
        layers = self.expert_policy_layers
        if layers is None:
            return
        if self.expert_policy == "dense":
            raise PolicyError("expert_policy_layers", layers, "the dense policy has no limits; leave it null")
        if len(layers) != num_layers:
            raise PolicyError("expert_policy_layers", layers, f"must have one entry per layer, {num_layers} in all")
        limit = "k" if self.expert_policy == "topk" else "eps"
        for layer_index, entry in enumerate(layers):
            key = f"expert_policy_layers[{layer_index}]"
            if not isinstance(entry, Mapping) or not set(entry) <= set(get_args(RouterKind)):
                raise PolicyError(key, entry, 'must map "mlp" and "attention" to their limits')
            for kind, limits in entry.items():
                if not isinstance(limits, Mapping) or set(limits) != {limit}:
                    rule = f'must be {{"{limit}": value}} under {self.expert_policy}'
                    raise PolicyError(f"{key}.{kind}", limits, f"{rule}; or set expert_policy_layers to null")
                if limit == "k":
                    available = num_experts if kind == "mlp" else num_attention_experts
                    _check_top_k(f"{key}.{kind}.k", limits["k"], available)
                else:
                    _check_threshold(f"{key}.{kind}.eps", limits["eps"])
        for name in self._covered_limits(num_experts, num_attention_experts):
            if (value := getattr(self, name)) is not None:
                rule = f"expert_policy_layers has limits of its own in every layer; set {name} or it to null"
                raise PolicyError(name, value, rule)

    def _covered_limits(self, num_experts: int, num_attention_experts: int) -> list[str]:
        """Names of the limits of this rule that no layer reads."""
        layers = self.expert_policy_layers or ()
        mlp, attention = (
            num == 1 or all(kind in entry for entry in layers)
            for kind, num in (("mlp", num_experts), ("attention", num_attention_experts))
        )
        if self.expert_policy == "topk":
            covered = {"num_experts_per_tok": mlp, "attention_experts_per_tok": attention}
        else:
            attention_alone = self.attention_expert_threshold is not None
            covered = {
                "expert_threshold": mlp and (attention or attention_alone),
                "attention_expert_threshold": attention,
            }
        return [name for name, is_covered in covered.items() if is_covered]


def policy_name(policy: ExpertPolicy) -> str:
    """Short name for tables and metrics: `dense`, `topk 4`, `topk 4/2` (MLP/attention), `threshold 0.48`."""
    if policy.expert_policy == "dense":
        return "dense"
    if policy.expert_policy_layers is not None:
        return f"{policy.expert_policy} per layer"
    mlp: float | None = policy.expert_threshold
    attention: float | None = policy.attention_expert_threshold
    if policy.expert_policy == "topk":
        mlp, attention = policy.num_experts_per_tok, policy.attention_experts_per_tok
    return f"{policy.expert_policy} {mlp}" + ("" if attention is None else f"/{attention}")


def fixed_top_k(policy: ExpertPolicy, layer_index: int, kind: RouterKind, num_experts: int) -> int | None:
    """Experts that each token activates, where that is known before the scores are; None where it varies."""
    if policy.expert_policy == "dense":
        return num_experts
    if policy.expert_policy == "topk":
        return policy.top_k(layer_index, kind, num_experts)
    return None


def best_experts(scores_TE: Tensor, top_k: int) -> Tensor:
    """Indices of each token's K highest scores, best first, [T, K]."""
    if top_k == 1:
        return scores_TE.argmax(dim=-1, keepdim=True)  # the first of equal ones
    # torch.topk leaves the order of equal scores open; a stable sort gives them to the lower index on every device
    return scores_TE.argsort(dim=-1, descending=True, stable=True)[..., :top_k]


def active_experts(
    scores_TE: Tensor,
    policy: ExpertPolicy,
    layer_index: int,
    kind: RouterKind,
    token_mask_T: Tensor | None = None,
) -> Tensor:
    """Which experts compute on which token.

    Args:
        scores_TE: router probabilities, [..., E]; any number of token axes.
        policy: the rule, validated against the model.
        layer_index: global index of the layer, from 0.
        kind: the layer's attention or MLP router.
        token_mask_T: True for tokens, False for padding, [...]; used by threshold_topk. None counts all.

    Returns:
        Boolean mask of the shape of the scores, at least one expert per token.
    """
    num_experts = scores_TE.shape[-1]
    top_k = fixed_top_k(policy, layer_index, kind, num_experts)
    if top_k == num_experts:
        return torch.ones_like(scores_TE, dtype=torch.bool)
    if top_k is not None:
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(-1, best_experts(scores_TE, top_k), True)

    above_TE = scores_TE * num_experts > policy.threshold(layer_index, kind)
    above_TE = above_TE.scatter(-1, best_experts(scores_TE, 1), True)
    if policy.expert_policy == "threshold":
        return above_TE

    ranking_TE = best_experts(scores_TE, num_experts)
    in_top_k_E = torch.arange(num_experts, device=scores_TE.device) < _rounded_mean_count(above_TE, token_mask_T)
    return torch.zeros_like(above_TE).scatter(-1, ranking_TE, in_top_k_E.expand_as(ranking_TE))


def _rounded_mean_count(active_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Mean number of active experts over the tokens that count, rounded (halves to even), at least 1; a scalar."""
    counts_T = active_TE.sum(dim=-1)
    mask_T = torch.ones_like(counts_T) if token_mask_T is None else token_mask_T.to(counts_T)
    # float64: a float32 quotient of a large batch may fall on the wrong side of a half
    mean = (counts_T * mask_T).sum().double() / mask_T.sum().clamp(min=1)
    return mean.round().clamp(min=1)


def _check_top_k(key: str, value: object, num_experts: int) -> None:
    if value is None or num_experts == 1:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= num_experts:
        raise PolicyError(key, value, f"must be a whole number from 1 to the {num_experts} experts")


def _check_threshold(key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise PolicyError(key, value, "must be a number, 0 or above")
