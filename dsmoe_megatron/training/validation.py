"""Validation in the loop: the same batches under the dense policy and under each sparse one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_megatron.config import Config, PolicyConfig
from dsmoe_megatron.inference.policy import ExpertPolicy, active_experts, policy_name
from dsmoe_megatron.json_text import finite
from dsmoe_megatron.model.router import RouterKind
from dsmoe_megatron.perplexity import perplexity_of
from dsmoe_megatron.planning.parameters import active_share
from dsmoe_megatron.training.engines.passes import counted_tokens
from dsmoe_megatron.training.engines.protocol import Batch, Engine

# this rank's micro-batches of a global batch, and how many of its tokens count, relative to the mean of all batches
WeightedBatch = tuple[Sequence[Batch], float]


def validate(
    engine: Engine, batches: Sequence[Sequence[Batch]], config: Config, batch_done: Callable[[], None]
) -> dict[str, Any]:
    """Perplexity and active share per policy.

    Args:
        engine: its routers take the policies for the time of the call.
        batches: this rank's micro-batches of each global batch.
        config: recipe.
        batch_done: is called after every batch.

    Returns:
        validation_loss [nats per token, mean over all that count] as the model was trained (dense, or the sparse
        baseline's own top-k), and policies: name -> perplexity and active_share (of parameters without embeddings);
        the same on every rank. Of a run that has diverged, losses and perplexities that are no finite number are None.
    """
    tokens_N = counted_tokens(batches, config, engine.device)
    weighted = list(zip(batches, (tokens_N / tokens_N.mean()).tolist(), strict=True))
    loss = _mean_loss(engine, weighted, batch_done)
    model = config.model
    trained_sparse = model.has_mlp_router and model.expert_training == "sparse"
    name = f"topk {model.num_experts_per_tok}" if trained_sparse else "dense"
    active_mlp = model.num_experts_per_tok if trained_sparse else model.num_experts
    share = active_share(model, active_mlp, model.num_attention_experts)
    policies = {name: {"perplexity": finite(perplexity_of(loss)), "active_share": share}}
    # asked of the recipe, not of engine.routers: every rank must make the same passes
    if (model.has_attention_router or model.has_mlp_router) and not trained_sparse:
        for section in config.evaluation.policies:
            policy = resolve_policy(section, config)
            policies[policy_name(policy)] = _under_policy(engine, weighted, policy, config, batch_done)
    return {"validation_loss": finite(loss), "policies": policies}


def resolve_policy(section: PolicyConfig, config: Config) -> ExpertPolicy:
    """The policy of an evaluation entry, with the model section's values where it has none."""

    def value(name: str) -> Any:
        own = getattr(section, name)
        return getattr(config.model, name) if own is None else own

    attention_threshold = section.attention_expert_threshold
    if section.expert_threshold is None and attention_threshold is None:
        attention_threshold = config.model.attention_expert_threshold
    return ExpertPolicy(
        expert_policy=section.expert_policy,
        num_experts_per_tok=value("num_experts_per_tok"),
        attention_experts_per_tok=value("attention_experts_per_tok"),
        expert_threshold=value("expert_threshold"),
        attention_expert_threshold=attention_threshold,
    )


class _CountingChoice:
    """Chooses experts by a policy and counts them."""

    def __init__(self, policy: ExpertPolicy, layers: int, device: torch.device) -> None:
        self.policy = policy
        # [layer, 0: active MLP experts, 1: MLP tokens, 2: active attention experts, 3: attention tokens]
        self.sums_L4 = torch.zeros(layers, 4, dtype=torch.float64, device=device)

    def __call__(self, scores_TE: Tensor, layer_index: int, kind: RouterKind) -> Tensor:
        active_TE = active_experts(scores_TE, self.policy, layer_index, kind)
        first = 0 if kind == "mlp" else 2
        self.sums_L4[layer_index, first] += active_TE.sum()
        self.sums_L4[layer_index, first + 1] += active_TE.shape[0]
        return active_TE

    def mean_active(self, kind: RouterKind) -> list[float]:
        """Active experts per token of every layer of the model; 1 where there is no router."""
        first = 0 if kind == "mlp" else 2
        active_L, tokens_L = self.sums_L4[:, first], self.sums_L4[:, first + 1]
        return [float(a / t) if t else 1.0 for a, t in zip(active_L, tokens_L, strict=True)]


def _under_policy(
    engine: Engine,
    weighted: Sequence[WeightedBatch],
    policy: ExpertPolicy,
    config: Config,
    batch_done: Callable[[], None],
) -> dict[str, float | None]:
    choice = _CountingChoice(policy, config.model.num_hidden_layers, engine.device)
    for router in engine.routers:
        router.control.choose_experts = choice
    try:
        loss = _mean_loss(engine, weighted, batch_done)
    finally:
        for router in engine.routers:
            router.control.choose_experts = None
    # replicas count the same tokens several times, in numerator and denominator alike
    dist.all_reduce(choice.sums_L4)
    share = active_share(config.model, choice.mean_active("mlp"), choice.mean_active("attention"))
    return {"perplexity": finite(perplexity_of(loss)), "active_share": share}


def _mean_loss(engine: Engine, weighted: Sequence[WeightedBatch], batch_done: Callable[[], None]) -> float:
    total = 0.0
    for micro_batches, weight in weighted:
        total += weight * engine.evaluate(micro_batches)
        batch_done()
    return total / len(weighted)
