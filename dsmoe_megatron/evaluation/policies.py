"""The expert policies of a sweep, and policies as files."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.inference.policy import ExpertPolicy, PolicyError, policy_name

FIELDS = tuple(field.name for field in dataclasses.fields(ExpertPolicy))


@dataclass(frozen=True)
class PolicyOptions:
    """What the command line asks for; a policy of each value."""

    thresholds: Sequence[float] = ()
    """eps of the MLP experts, and of the attention experts unless attention_threshold is given."""
    attention_threshold: float | None = None
    """eps of the attention experts in all of them."""
    top_k: Sequence[int] = ()
    """K of the MLP experts."""
    attention_top_k: int | None = None
    """K of the attention experts in all of them; None is the model's own, by default all."""
    threshold_top_k: Sequence[float] = ()
    """eps of `threshold_topk`."""
    files: Sequence[Path] = ()
    """Policy files."""

    def __bool__(self) -> bool:
        return bool(self.thresholds or self.top_k or self.threshold_top_k or self.files)


def sweep_policies(
    options: PolicyOptions, model: ModelConfig, default: ExpertPolicy, reference: ExpertPolicy
) -> dict[str, ExpertPolicy]:
    """The policies to evaluate by name: the reference first, then those of the options, else the model's default.

    Args:
        options: of the command line.
        model: architecture.
        default: that the recipe or the export names.
        reference: as the model was trained: dense, or the sparse-trained baseline's own top-k.

    Raises:
        ConfigurationError: a policy does not fit the model.
    """
    _check_options(options, model)
    asked_for = dict(_asked_for(options, default)) if options else {policy_name(default): default}
    policies = {policy_name(reference): reference} | asked_for
    for name, policy in policies.items():
        check_policy(policy, model)
        if reference.expert_policy == "topk" and policy.expert_policy != "topk":
            rule = f"a sparse-trained model chooses experts as it was trained, by topk: give --top-k instead of {name}"
            raise ConfigurationError("policy", name, rule)
    return policies


def _check_options(options: PolicyOptions, model: ModelConfig) -> None:
    if options and not (model.has_mlp_router or model.has_attention_router):
        raise ConfigurationError("policy options", "given", "this model has no routers: only the dense policy fits it")
    if options.attention_top_k is not None and not options.top_k:
        raise ConfigurationError("--attention-top-k", options.attention_top_k, "belongs to --top-k, which is not given")
    if options.attention_threshold is not None and not (options.thresholds or options.threshold_top_k):
        value = options.attention_threshold
        raise ConfigurationError("--attention-threshold", value, "belongs to --thresholds, which is not given")


def check_policy(policy: ExpertPolicy, model: ModelConfig) -> None:
    """Refuse a policy that does not fit the model.

    Raises:
        ConfigurationError: names the value and the rule.
    """
    try:
        policy.validate(model.num_hidden_layers, model.num_experts, model.num_attention_experts)
    except PolicyError as error:
        raise ConfigurationError(error.key, error.value, error.rule) from None


def read_policy_file(path: Path) -> ExpertPolicy:
    """The policy of a file as `evaluate --calibrate` writes it; it is the whole policy, whatever a recipe says.

    Raises:
        ConfigurationError: it cannot be read, is no JSON object, or has unknown keys.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError("--policy-file", str(path), error.strerror or str(error)) from None
    except ValueError as error:
        raise ConfigurationError("--policy-file", str(path), f"is not JSON: {error}") from None
    if not isinstance(values, dict) or "expert_policy" not in values:
        raise ConfigurationError(
            "--policy-file", str(path), f"must be an object of {', '.join(FIELDS)}, the first one set"
        )
    if unknown := sorted(set(values) - set(FIELDS)):
        raise ConfigurationError("--policy-file", str(path), f"has unknown keys {', '.join(unknown)}")
    layers = values.get("expert_policy_layers")
    if layers is not None and not isinstance(layers, list):
        raise ConfigurationError("--policy-file", str(path), "expert_policy_layers must be a list, one entry per layer")
    return ExpertPolicy(**values)


def policy_values(policy: ExpertPolicy) -> dict[str, Any]:
    """What a policy file says of a policy: the fields that are set."""
    return {name: value for name, value in dataclasses.asdict(policy).items() if value is not None}


def _asked_for(options: PolicyOptions, default: ExpertPolicy) -> Iterator[tuple[str, ExpertPolicy]]:
    """Names as in the metrics of a run; a policy file's is its path."""
    attention_top_k = options.attention_top_k
    if attention_top_k is None:
        attention_top_k = default.attention_experts_per_tok
    attention_eps = options.attention_threshold
    policies = [
        *(ExpertPolicy("topk", top_k, attention_top_k) for top_k in options.top_k),
        *(ExpertPolicy("threshold", None, None, eps, attention_eps) for eps in options.thresholds),
        *(ExpertPolicy("threshold_topk", None, None, eps, attention_eps) for eps in options.threshold_top_k),
    ]
    yield from ((policy_name(policy), policy) for policy in policies)
    for path in options.files:
        yield str(path), read_policy_file(path)
