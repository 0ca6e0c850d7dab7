"""What an evaluation found, as a table and as values for JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsmoe_megatron.evaluation.loading import LoadedModel
from dsmoe_megatron.evaluation.perplexity import Measurement
from dsmoe_megatron.evaluation.policies import policy_values
from dsmoe_megatron.evaluation.windows import Stream, WindowOptions
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.planning.presentation import table

KINDS = ("attention", "mlp")


def as_dict(
    checkpoint: Path,
    loaded: LoadedModel,
    streams: Sequence[Stream],
    options: WindowOptions,
    measured: Mapping[str, Measurement],
) -> dict[str, Any]:
    """For programs: losses in nats per token, shares of the parameters without embeddings, floats unrounded."""
    return {
        "checkpoint": str(checkpoint),
        "step": loaded.step,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "cpu",
        "parameters_without_embeddings": count_parameters(loaded.architecture).total_without_embeddings,
        "data": [{"name": stream.name, "tokens": len(stream.ids)} for stream in streams],
        "windows": {
            "sequence_length": options.sequence_length,
            "stride": options.stride,
            "max_tokens": options.max_tokens,
            "batch_size": options.batch_size,
            "separate_documents": loaded.separate_documents,
        },
        "policies": {name: _policy_as_dict(loaded, measurement) for name, measurement in measured.items()},
    }


def _policy_as_dict(loaded: LoadedModel, measurement: Measurement) -> dict[str, Any]:
    parameters, share = measurement.active(loaded)
    return {
        "policy": policy_values(measurement.policy),
        "loss": measurement.loss,
        "perplexity": measurement.perplexity,
        "scored_tokens": sum(measurement.scored.values()),
        "active_parameters": parameters,
        "active_share": share,
        "tokens_per_s": measurement.fed / measurement.seconds,
        "loss_by_data": {name: loss / measurement.scored[name] for name, loss in measurement.losses.items()},
        "routers": [
            {"layer": layer, "kind": kind, **counts.as_dict()}
            for (layer, kind), counts in sorted(measurement.routers.items())
        ],
    }


def as_text(result: Mapping[str, Any]) -> str:
    """For people: a line per policy, then the active experts of each layer."""
    policies = result["policies"]
    dense = next(iter(policies.values()))
    rows = [
        [
            name,
            f"{figures['perplexity']:.3f}",
            f"{figures['perplexity'] / dense['perplexity'] - 1:+.2%}",
            f"{figures['active_parameters'] / 1e6:,.2f}M",
            f"{figures['active_share']:.1%}",
            *(_range_of_layers(figures, kind) for kind in _kinds(policies)),
            f"{figures['tokens_per_s']:,.0f}",
        ]
        for name, figures in policies.items()
    ]
    experts = [f"{'MLP' if kind == 'mlp' else kind} experts" for kind in _kinds(policies)]
    header = ["policy", "perplexity", "against first", "active", "share", *experts, "tokens/s"]
    names = ", ".join(f"{data['name']} ({data['tokens']:,} tokens)" for data in result["data"])
    windows = result["windows"]
    return "\n".join(
        [
            f"{result['checkpoint']}{'' if result['step'] is None else ', step ' + format(result['step'], ',')}, "
            f"{result['dtype']}: {result['parameters_without_embeddings'] / 1e6:,.2f}M parameters without embeddings",
            f"{names}; windows of {windows['sequence_length']} tokens every {windows['stride']}, "
            f"{dense['scored_tokens']:,} predictions scored",
            "",
            *table(header, rows),
            *_layer_lines(policies),
        ]
    )


def _kinds(policies: Mapping[str, Any]) -> list[str]:
    present = {router["kind"] for figures in policies.values() for router in figures["routers"]}
    return [kind for kind in KINDS if kind in present]


def _range_of_layers(figures: Mapping[str, Any], kind: str) -> str:
    active = [router["active_experts"] for router in figures["routers"] if router["kind"] == kind]
    mean = sum(active) / len(active)
    return f"{mean:.2f}" if max(active) - min(active) < 0.005 else f"{mean:.2f} ({min(active):.2f}-{max(active):.2f})"


def _layer_lines(policies: Mapping[str, Any]) -> list[str]:
    """A table of each kind: mean active experts per token, a row per policy whose layers differ, a column per layer."""
    lines: list[str] = []
    for kind in _kinds(policies):
        rows = []
        for name, figures in policies.items():
            active = [router["active_experts"] for router in figures["routers"] if router["kind"] == kind]
            if max(active) - min(active) >= 0.005:
                rows.append([name, *(f"{value:.1f}" for value in active)])
        if rows:
            title = f"active {'MLP' if kind == 'mlp' else kind} experts in layer"
            lines += ["", *table([title, *map(str, range(len(rows[0]) - 1))], rows)]
    return lines
