"""An estimate and a search as text, as JSON and as a picture."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig
from dsmoe_megatron.errors import ConfigurationError, EnvironmentNotSupportedError
from dsmoe_megatron.planning.estimate import Estimate, PolicyEstimate, StageEstimate, require_vocabulary
from dsmoe_megatron.planning.memory import RankMemory
from dsmoe_megatron.planning.parameters import ParameterCount, count_parameters
from dsmoe_megatron.planning.search import GIB, Candidate, SearchResult

PICTURE_FORMATS = (".png", ".svg")


@dataclass(frozen=True)
class Report:
    """One result for people and for programs."""

    text: str
    values: dict[str, Any]

    def json(self) -> str:
        return json.dumps(self.values, indent=2)


def of_estimate(estimate: Estimate) -> Report:
    return Report(as_text(estimate), as_dict(estimate))


def of_search(result: SearchResult, world_size: int, top: int) -> Report:
    return Report(search_as_text(result, world_size, top), search_as_dict(result))


def without_vocabulary(config: Config) -> Report:
    """What is known before the tokenizer is: the parameters without embeddings, and what to give for the rest."""
    try:
        require_vocabulary(config)
    except ConfigurationError as error:
        missing = str(error)
    return Report(
        f"{parameters_as_text(config.model)}\n{missing}",
        {"parameters": parameters_as_dict(count_parameters(config.model)), "missing": missing},
    )


def parameters_as_text(model: ModelConfig) -> str:
    """The lines that need no vocabulary."""
    count = count_parameters(model)
    parts = {
        "MLP experts": count.mlp_experts,
        "attention experts": count.attention_experts,
        "keys and values": count.key_value,
        "routers": count.attention_routers + count.mlp_routers,
        "norms": count.norms,
    }
    shares = ", ".join(f"{name} {number / 1e6:,.1f}M" for name, number in parts.items())
    total = "unknown" if count.total is None else f"{count.total / 1e6:,.1f}M in all"
    without = f"{count.total_without_embeddings / 1e6:,.1f}M without embeddings"
    return f"Parameters   {without}, {total}\n             ({shares})"


def as_text(estimate: Estimate) -> str:
    """For people: what is counted, what is assumed, what follows."""
    return "\n".join(
        [
            _head(estimate),
            "",
            parameters_as_text(estimate.config.model),
            *map(_policy_line, estimate.policies),
            "",
            *_flops_lines(estimate),
            "",
            *_memory_lines(estimate),
            "",
            *_traffic_lines(estimate),
            "",
            *_time_lines(estimate),
            "",
            *_assumption_lines(estimate),
        ]
    )


def _head(estimate: Estimate) -> str:
    train = estimate.config.train
    return (
        f"{estimate.world_size} x {estimate.hardware.description}\n"
        f"Layout: {layout_words(estimate.config.parallel, estimate.world_size)}; "
        f"micro-batch {train.micro_batch_size}, global batch {train.global_batch_size} samples of "
        f"{train.sequence_length} tokens, {train.precision}, recompute {train.recompute}"
    )


def layout_words(parallel: ParallelConfig, world_size: int) -> str:
    """Sizes above 1: `TP2+SP x DP16`."""
    data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    sizes = {"TP": parallel.tensor, "PP": parallel.pipeline, "VPP": parallel.virtual_pipeline}
    sizes |= {"EP": parallel.expert, "CP": parallel.context, "DP": data}
    words = [f"{name}{size}{'+SP' * (name == 'TP' and parallel.sequence)}" for name, size in sizes.items() if size > 1]
    return " x ".join(words) or "one process"


def _policy_line(policy: PolicyEstimate) -> str:
    return (
        f"             sparse inference, {policy.name}: {policy.active_parameters / 1e6:,.1f}M active, "
        f"{policy.flops.total / 1e9:.2f} GFLOP per token of a prompt"
    )


def _flops_lines(estimate: Estimate) -> list[str]:
    flops = estimate.flops
    parts = [field.name for field in fields(flops.forward)]
    columns = {"forward": flops.forward, "backward": flops.backward, "again": flops.recompute}
    rows = [
        [part.replace("_", " "), *(f"{getattr(each, part) / 1e9:.3f}" for each in columns.values())] for part in parts
    ]
    rows.append(["total", *(f"{each.total / 1e9:.3f}" for each in columns.values())])
    return [
        "GFLOP per token of dense training (matrix products; scores: causal half; again: recomputed, not in the MFU)",
        *table(["", *columns], rows),
    ]


def _memory_lines(estimate: Estimate) -> list[str]:
    recompute = estimate.config.train.recompute
    rows = [
        [
            str(rank),
            str(stage.layers),
            f"{stage.parameters.total / 1e6:,.1f}M",
            *(f"{part / GIB:.2f}" for part in _parts(stage.memory[recompute]).values()),
            *(f"{memory.total / GIB:.2f}" for memory in stage.memory.values()),
        ]
        for rank, stage in enumerate(estimate.stages)
    ]
    usable, reserve = estimate.hardware.usable_memory, estimate.hardware.assumptions.memory_reserve
    verdict = "fits" if estimate.fits else "DOES NOT FIT"
    names = _parts(estimate.stages[0].memory[recompute])
    return [
        f"GiB per rank at the peak of a step (recompute {recompute}; last columns: in all, under each recompute mode)",
        *table(
            ["stage", "layers", "parameters", *names, *(f"all, {mode}" for mode in estimate.stages[0].memory)], rows
        ),
        f"The fullest rank has {estimate.peak_memory / GIB:.1f} GiB of {usable / GIB:.1f} GiB "
        f"({(usable + reserve) / GIB:.1f} GiB less a reserve of {reserve / GIB:.1f}): {verdict}.",
    ]


def _parts(memory: RankMemory) -> dict[str, int]:
    return {field.name: getattr(memory, field.name) for field in fields(memory)}


def _traffic_lines(estimate: Estimate) -> list[str]:
    kinds = sorted({kind for stage in estimate.stages for kind in stage.traffic})
    if not kinds:
        return ["No traffic: a single process."]
    rows = [
        [str(rank), *(f"{stage.traffic.get(kind, 0) / GIB:.3f}" for kind in kinds)]
        for rank, stage in enumerate(estimate.stages)
    ]
    return ["GiB that a rank sends per step, by parallelism", *table(["stage", *kinds], rows)]


def _time_lines(estimate: Estimate) -> list[str]:
    time = estimate.time
    rows = [[name, f"{seconds:.4f}", f"{seconds / time.total:.1%}"] for name, seconds in time.terms.items() if seconds]
    return [
        "Seconds per step (estimated, not measured)",
        *table(["", "seconds", "share"], [*rows, ["total", f"{time.total:.4f}", ""]]),
        f"{time.tokens_per_second:,.0f} tokens/s, MFU {time.model_flops_utilisation:.1%} of "
        f"{time.peak / 1e12:,.4g} TFLOP/s; {time.steps:,} steps, {time.steps * time.tokens / 1e9:,.3g}B tokens: "
        f"{time.days:,.2f} days, {time.gpu_hours:,.1f} GPU-hours",
    ]


def _assumption_lines(estimate: Estimate) -> list[str]:
    assumed = ", ".join(
        f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(estimate.hardware.assumptions).items()
    )
    return [f"Assumed for {estimate.hardware.name}: {assumed}.", f"Sources: {', '.join(estimate.hardware.sources)}"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: the first to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in cells)
        for line in lines
        for cells in [list(enumerate(zip(line, widths, strict=True)))]
    ]


def parameters_as_dict(count: ParameterCount) -> dict[str, Any]:
    return asdict(count) | {"total_without_embeddings": count.total_without_embeddings, "total": count.total}


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """For programs; bytes, seconds, and operations per token. What is unknown is null."""
    time, flops = estimate.time, estimate.flops
    return {
        "world_size": estimate.world_size,
        "hardware": asdict(estimate.hardware),
        "parallel": asdict(estimate.config.parallel),
        "parameters": parameters_as_dict(estimate.parameters),
        "policies": [asdict(policy) | {"flops_total": policy.flops.total} for policy in estimate.policies],
        "flops_per_token": asdict(flops) | {"model": flops.model, "machine": flops.machine},
        "stages": [_stage_as_dict(stage) for stage in estimate.stages],
        "peak_memory": estimate.peak_memory,
        "usable_memory": estimate.hardware.usable_memory,
        "fits": estimate.fits,
        "time": {
            "terms": time.terms,
            "step": time.total,
            "tokens_per_second": time.tokens_per_second,
            "model_flops_utilisation": time.model_flops_utilisation,
            "days": time.days,
            "gpu_hours": time.gpu_hours,
        },
    }


def _stage_as_dict(stage: StageEstimate) -> dict[str, Any]:
    return {
        "layers": stage.layers,
        "parameters": asdict(stage.parameters) | {"total": stage.parameters.total},
        "memory": {mode: asdict(memory) | {"total": memory.total} for mode, memory in stage.memory.items()},
        "traffic": stage.traffic,
    }


def search_as_text(result: SearchResult, world_size: int, top: int) -> str:
    """The fastest layouts, and why the others lose."""
    rows = [[str(place), *_cells(each, world_size)] for place, each in enumerate(result.ranked[:top], start=1)]
    header = ["", "layout", "micro-batch", "recompute", "GiB", "s/step", "tokens/s", "MFU", "GPU-hours", "loses"]
    reasons = [f"  {count:6d} {reason}" for reason, count in result.reasons.items()]
    invalid = [f"  {count:6d} {key}" for key, count in result.invalid.items()]
    smallest = result.too_large[0] if result.too_large else None
    nothing = "Nothing fits." + (
        f" The smallest is {layout_words(smallest.config.parallel, world_size)}, micro-batch "
        f"{smallest.config.train.micro_batch_size}, recompute {smallest.config.train.recompute}: {smallest.reason}."
        if smallest
        else " No layout is allowed."
    )
    return "\n".join(
        [
            f"{result.tried:,} layouts tried, {len(result.ranked):,} fit",
            *(table(header, rows) if rows else [nothing]),
            "Why the others lose (how many):",
            *reasons,
            *(["Refused by a rule on:", *invalid] if invalid else []),
        ]
    )


def _cells(candidate: Candidate, world_size: int) -> list[str]:
    time, train = candidate.time, candidate.config.train
    assert time is not None  # of a ranked layout
    return [
        layout_words(candidate.config.parallel, world_size),
        str(train.micro_batch_size),
        train.recompute,
        f"{candidate.memory / GIB:.1f}",
        f"{time.total:.3f}",
        f"{time.tokens_per_second:,.0f}",
        f"{time.model_flops_utilisation:.1%}",
        f"{time.gpu_hours:,.0f}",
        candidate.reason,
    ]


def search_as_dict(result: SearchResult) -> dict[str, Any]:
    """All layouts that run, the ranked ones first."""
    return {
        "tried": result.tried,
        "reasons": result.reasons,
        "invalid": result.invalid,
        "ranked": [_candidate_as_dict(candidate) for candidate in result.ranked],
        "too_large": [_candidate_as_dict(candidate) for candidate in result.too_large],
    }


def _candidate_as_dict(candidate: Candidate) -> dict[str, Any]:
    train, time = candidate.config.train, candidate.time
    return {
        "parallel": vars(candidate.config.parallel) | {"data": candidate.data},
        "micro_batch_size": train.micro_batch_size,
        "recompute": train.recompute,
        "memory": candidate.memory,
        "step_time": None if time is None else time.total,
        "model_flops_utilisation": None if time is None else time.model_flops_utilisation,
        "gpu_hours": None if time is None else time.gpu_hours,
        "reason": candidate.reason,
    }


def draw(estimate: Estimate, picture: str) -> None:
    """Memory per rank, stacked, over the pipeline stages, with the line of what the GPU has; PNG or SVG.

    Raises:
        ConfigurationError: the name ends otherwise, or cannot be written to.
        EnvironmentNotSupportedError: matplotlib is not installed.
    """
    path = Path(picture)
    if path.suffix not in PICTURE_FORMATS:
        raise ConfigurationError("picture", str(path), f"must end in {' or '.join(PICTURE_FORMATS)}")
    try:
        import matplotlib
    except ImportError:
        message = "--picture needs matplotlib: pip install '.[estimate]'"
        raise EnvironmentNotSupportedError(message) from None
    from matplotlib.figure import Figure

    parts = [_parts(stage.memory[estimate.config.train.recompute]) for stage in estimate.stages]
    figure = Figure(figsize=(max(7.5, 3.5 + 0.45 * len(parts)), 4.0), layout="constrained")
    axes = figure.subplots()
    floor = [0.0] * len(parts)
    for name in parts[0]:
        heights = [part[name] / GIB for part in parts]
        axes.bar([str(rank) for rank in range(len(parts))], heights, bottom=floor, label=name, width=0.7)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.axhline(estimate.hardware.memory / GIB, color="black", linestyle="--", label="memory of the GPU")
    axes.axhline(estimate.hardware.usable_memory / GIB, color="grey", linestyle=":", label="less the reserve")
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("GiB per rank at the peak of a step")
    layout = layout_words(estimate.config.parallel, estimate.world_size)
    train = estimate.config.train
    axes.set_title(
        f"{estimate.parameters.total_without_embeddings / 1e9:.2f}B parameters without embeddings on "
        f"{estimate.world_size} {estimate.hardware.name}\n{layout}, micro-batch {train.micro_batch_size}, "
        f"recompute {train.recompute}",
        fontsize="medium",
    )
    figure.legend(loc="outside right center", reverse=True, frameon=False)
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        # text stays text in an SVG, and its identifiers are the same in every run
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "estimate"}):
            figure.savefig(temporary, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        temporary.replace(path)
    except OSError as error:
        raise ConfigurationError("picture", str(path), f"cannot be written: {error.strerror}") from None
