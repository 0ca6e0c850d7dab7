"""What the routers of all ranks saw: mutual-information losses and per-layer expert use."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dsmoe_megatron.config import Config
from dsmoe_megatron.model.router import Router

KINDS = ("attention", "mlp")


def mutual_information_losses(routers: Sequence[Router], config: Config) -> dict[tuple[int, str], float]:
    """The loss of every router of the model, mean over micro-batches and data-parallel ranks, without alpha [nats].

    Args:
        routers: this rank's.
        config: recipe; its scope and layout say which ranks hold shares of one loss and which hold losses of their own.

    Returns:
        (layer from 0, kind) -> loss; the same on every rank.
    """
    sums = torch.zeros(config.model.num_hidden_layers, len(KINDS), device=torch.cuda.current_device())
    for router in routers:
        statistics = router.control.statistics
        sums[router.layer_number - 1, KINDS.index(router.options.kind)] = statistics.mi_loss / max(statistics.passes, 1)
    dist.all_reduce(sums)
    # shares of one loss add up; equal or independent losses are averaged
    replicas = 1 if config.parallel.sequence else parallel_state.get_tensor_model_parallel_world_size()
    if config.model.mi_scope == "micro_batch":
        replicas *= parallel_state.get_data_parallel_world_size()
    return {(layer, kind): float(sums[layer, KINDS.index(kind)]) / replicas for layer, kind in _places(config)}


def expert_use(routers: Sequence[Router], config: Config) -> list[dict[str, Any]]:
    """Per router of the model: how evenly and how sharply it uses its experts, over the tokens since the last reset.

    Returns:
        One object per router: layer (from 0), kind, share (mean probability of each expert), marginal_entropy and
        conditional_entropy [nats], active_experts (mean number per token above the recipe's eps).
    """
    width = max(config.model.num_experts, config.model.num_attention_experts)
    sums = torch.zeros(config.model.num_hidden_layers, len(KINDS), width + 3, device=torch.cuda.current_device())
    for router in routers:
        statistics, experts = router.control.statistics, router.options.num_experts
        row = sums[router.layer_number - 1, KINDS.index(router.options.kind)]
        row[:experts] = statistics.score_sum_E
        row[width], row[width + 1], row[width + 2] = statistics.tokens, statistics.entropy_sum, statistics.active_sum
    dist.all_reduce(sums)
    return [_use_of(layer, kind, sums[layer, KINDS.index(kind)], config) for layer, kind in _places(config)]


def _use_of(layer: int, kind: str, row: torch.Tensor, config: Config) -> dict[str, Any]:
    experts = config.model.num_attention_experts if kind == "attention" else config.model.num_experts
    tokens, entropy_sum, active_sum = (float(value) for value in row[-3:])
    share_E = row[:experts] / max(tokens, 1.0)
    return {
        "layer": layer,
        "kind": kind,
        "share": share_E.tolist(),
        "marginal_entropy": float(-torch.special.xlogy(share_E, share_E).sum()),
        "conditional_entropy": entropy_sum / max(tokens, 1.0),
        "active_experts": active_sum / max(tokens, 1.0),
    }


def _places(config: Config) -> list[tuple[int, str]]:
    model = config.model
    dense_trained = model.has_mlp_router and model.expert_training == "dense"
    kinds = [kind for kind, present in zip(KINDS, (model.has_attention_router, dense_trained), strict=True) if present]
    return [(layer, kind) for layer in range(model.num_hidden_layers) for kind in kinds]
