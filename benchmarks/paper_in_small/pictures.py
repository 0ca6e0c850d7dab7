"""The study's pictures: how its models learn, and the paper's Figures 3, 4 and 5. Points are means over the seeds."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.paper_in_small.claims import best_of
from benchmarks.paper_in_small.result import Entry, Result, by_entry, by_group, perplexity, with_best_learning_rates
from dsmoe_megatron.reporting.figures import COLOURS, KINDS, LINE_STYLES, MARKERS, STYLE

WIDTH, HEIGHT = 9.0, 4.0  # inches
EPS = 0.48
LINES_PER_POINT = 5  # of the metrics, ten steps each: single ones are noisy
Point = tuple[float, float]


class Picture(NamedTuple):
    title: str
    text: str
    draw: Callable[[Sequence[Result]], Figure | None]


def draw(name: str, results: Sequence[Result], path: Path) -> bool:
    """Write a picture of the entries with the best learning rates; returns false where there is nothing to draw yet."""
    with matplotlib.rc_context(STYLE):
        figure = PICTURES[name].draw(with_best_learning_rates([run for run in results if run.evaluation is not None]))
        if figure is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.08)
    return figure is not None


def gap_over_tokens(results: Sequence[Result]) -> Figure | None:
    """A panel per group: training loss less that of the best dense model, which read the same samples."""
    panels = {}
    for group, runs in by_group(results).items():
        if (dense := best_of(runs, "dense")) and (gaps := _gaps(runs, dense)):
            panels[f"{group}\nbeside {dense[0].run.entry}"] = gaps
    if not panels:
        return None
    figure, axes = _panels(len(panels), one_scale=True)
    lines = _lines(results)
    for axis, (title, gaps) in zip(axes, panels.items(), strict=True):
        for name, points in gaps.items():
            axis.plot(*zip(*points, strict=True), **lines[name], label=name)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel("tokens [millions]")
        axis.set_ylabel("loss less the dense model's [nats]")
    _legend(figure)
    return figure


def perplexity_by_share(results: Sequence[Result]) -> Figure | None:
    """A panel per group: DS-MoE under thresholds, sparse-trained models by K, the dense model as a line."""
    panels = by_group(results)
    if not panels:
        return None
    figure, axes = _panels(len(panels), one_scale=False)
    lines = _lines(results)
    for axis, (group, runs) in zip(axes, panels.items(), strict=True):
        for name, seeds in by_entry(runs).items():
            if seeds[0].run.family == "dense":
                level = statistics.fmean(perplexity(seed.as_trained) for seed in seeds)
                axis.axhline(level, **lines[name], linewidth=1.2, label=name)
                continue
            rule = "threshold" if seeds[0].run.family == "dsmoe" else "topk"
            points = [*_means(seeds, rule), *_means(seeds, "dense")]
            axis.plot(*zip(*points, strict=True), **lines[name], marker=MARKERS[rule], markersize=4, label=name)
        _labels(axis, group)
    _legend(figure)
    return figure


def rules_by_share(results: Sequence[Result]) -> Figure | None:
    """A panel per DS-MoE model: the three rules of choosing experts."""
    entries = [(name, runs) for name, runs in by_entry(results).items() if runs[0].run.family == "dsmoe"]
    if not entries:
        return None
    rows = -(-len(entries) // 3)
    figure = Figure(figsize=(WIDTH, 0.75 * HEIGHT * rows), layout="constrained")
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axis, (name, runs) in zip(axes, entries, strict=False):
        for rule, colour in zip(("threshold", "threshold_topk", "topk"), COLOURS, strict=False):
            points = [*_means(runs, rule), *_means(runs, "dense")]
            axis.plot(*zip(*points, strict=True), color=colour, marker=MARKERS[rule], markersize=4, label=rule)
        _labels(axis, name)
    for axis in axes[len(entries) :]:
        axis.set_axis_off()
    _legend(figure)
    return figure


def active_experts_per_layer(results: Sequence[Result]) -> Figure | None:
    """Share of the experts that a token activates at eps 0.48, layer by layer: attention and MLP."""
    entries = {name: runs for name, runs in by_entry(results).items() if runs[0].threshold(EPS) is not None}
    if not entries:
        return None
    figure, lines = Figure(figsize=(WIDTH, HEIGHT), layout="constrained"), _lines(results)
    for axis, (kind, title) in zip(figure.subplots(1, 2), KINDS.items(), strict=True):
        for name, runs in entries.items():
            points = list(_active_by_layer(runs, kind))
            if points:
                axis.plot(*zip(*points, strict=True), **lines[name], marker="o", markersize=4, label=name)
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.set_ylabel("active experts [%]")
        axis.set_ylim(0, 100)
    _legend(figure)
    return figure


PICTURES = {
    "gap": Picture(
        "While they learn",
        "Training loss less that of the best dense model, which read the same samples in the same order.",
        gap_over_tokens,
    ),
    "share": Picture(
        "Perplexity against active parameters",
        "The paper's Figure 3. DS-MoE under thresholds, up to the dense policy; sparse-trained models under more and"
        " fewer experts than they were trained with; dense models as lines.",
        perplexity_by_share,
    ),
    "rules": Picture(
        "Rules of choosing experts", "The paper's Figure 4: what the same models lose under each rule.", rules_by_share
    ),
    "layers": Picture(
        "Active experts per layer",
        "The paper's Figure 5: share of the experts that a token activates at eps 0.48.",
        active_experts_per_layer,
    ),
}


def _gaps(results: Sequence[Result], dense: Sequence[Result]) -> dict[str, list[Point]]:
    """Of each other entry, its gap to the dense one."""
    others = {name: runs for name, runs in by_entry(results).items() if name != dense[0].run.entry}
    return {name: points for name, runs in others.items() if (points := _gap(runs, dense))}


def _gap(runs: Sequence[Result], others: Sequence[Result]) -> list[Point]:
    """Tokens [millions], and how far the loss is above that of the other runs of the same seeds [nats], smoothed."""
    of_seed = {other.run.seed: other.loss_by_tokens for other in others}
    gaps = defaultdict(list)
    for run in runs:
        own, other = run.loss_by_tokens, of_seed.get(run.run.seed, {})
        for tokens in own.keys() & other.keys():
            gaps[tokens].append(own[tokens] - other[tokens])
    points = [(tokens / 1e6, statistics.fmean(gaps[tokens])) for tokens in sorted(gaps)]
    parts = [points[begin : begin + LINES_PER_POINT] for begin in range(0, len(points), LINES_PER_POINT)]
    return [(statistics.fmean(x for x, _ in part), statistics.fmean(y for _, y in part)) for part in parts]


def _means(seeds: Sequence[Result], rule: str) -> Iterator[Point]:
    """Active share [%] and perplexity under each policy of a rule, means over the seeds."""
    for policies in zip(*(seed.under(rule) for seed in seeds), strict=True):
        yield _mean(policies, lambda policy: 100 * policy["active_share"]), _mean(policies, perplexity)


def _mean(policies: Sequence[Entry], figure: Callable[[Entry], float]) -> float:
    return statistics.fmean(figure(policy) for policy in policies)


def _active_by_layer(runs: Sequence[Result], kind: str) -> Iterator[Point]:
    of_runs = [
        [router for router in policy["routers"] if router["kind"] == kind]
        for run in runs
        if (policy := run.threshold(EPS)) is not None
    ]
    for routers in zip(*of_runs, strict=True):
        shares = [router["active_experts"] / len(router["share"]) for router in routers]
        yield routers[0]["layer"], 100 * statistics.fmean(shares)


def _panels(count: int, one_scale: bool) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels beside each other."""
    figure = Figure(figsize=(WIDTH, 1.6 * HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=one_scale)[0])


def _lines(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Colour and style of each entry, alike in all pictures; used up colours come again with another style."""
    styles = [{"color": colour, "linestyle": style} for style in LINE_STYLES for colour in COLOURS]
    return dict(zip(by_entry(results), itertools.cycle(styles)))


def _labels(axis: Axes, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("active share of the parameters [%]")
    axis.set_ylabel("perplexity")


def _legend(figure: Figure) -> None:
    """One for all panels."""
    found: dict[str, Artist] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(list(found.values()), list(found), loc="outside upper left", ncols=3)
