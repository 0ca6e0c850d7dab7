"""The study's pictures: how its models learn, and the paper's Figures 3, 4 and 5. Points are means over the seeds.

Where architectures are compared, each has one colour: the entry that the claims take is drawn strong, others faint.
"""

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

from benchmarks.paper_in_small.claims import ARCHITECTURES, best_of, best_of_architecture
from benchmarks.paper_in_small.result import Entry, Result, by_entry, by_group, perplexity, with_best_learning_rates
from dsmoe_megatron.reporting.figures import COLOURS, KINDS, LINE_STYLES, MARKERS, STYLE

WIDTH, HEIGHT = 9.0, 4.0  # inches
EPS = 0.48
LINES_PER_POINT = 5  # of the metrics, ten steps each: single ones are noisy
Point = tuple[float, float]
STRONG: dict[str, Any] = {"linewidth": 2.0, "markersize": 4, "zorder": 3}
FAINT: dict[str, Any] = {"linewidth": 0.9, "markersize": 2.5, "alpha": 0.4}


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
        dense = best_of(runs, "dense")
        others = [run for run in runs if dense and run.run.entry != dense[0].run.entry]
        if curves := [(points, line) for seeds, line in _by_architecture(others) if (points := _gap(seeds, dense))]:
            panels[f"{group}\nbeside {dense[0].run.entry}"] = curves
    if not panels:
        return None
    figure, axes = _panels(len(panels), one_scale=True)
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for points, line in curves:
            axis.plot(*zip(*points, strict=True), **line)
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
    for axis, (group, runs) in zip(axes, panels.items(), strict=True):
        for seeds, line in _by_architecture(runs):
            if seeds[0].run.family == "dense":
                axis.axhline(_mean([seed.as_trained for seed in seeds], perplexity), **line)
                continue
            rule = "topk" if seeds[0].run.family == "smoe" else "threshold"
            axis.plot(*zip(*_curve(seeds, rule), strict=True), marker=MARKERS[rule], **line)
        _labels(axis, group)
    _legend(figure)
    return figure


def parts_by_share(results: Sequence[Result]) -> Figure | None:
    """DS-MoE models that differ in a part or a weight, under thresholds; of the group that has the most of them."""
    dsmoe = [run for run in results if ARCHITECTURES["DS-MoE"](run.run)]
    group, runs = max(by_group(dsmoe).items(), key=lambda item: len(by_entry(item[1])), default=("", []))
    if len(by_entry(runs)) < 2:
        return None
    figure, lines = Figure(figsize=(WIDTH, 1.2 * HEIGHT), layout="constrained"), _lines(runs)
    axis = figure.subplots()
    for name, seeds in by_entry(runs).items():
        points = _curve(seeds, "threshold")
        axis.plot(*zip(*points, strict=True), **lines[name], marker=MARKERS["threshold"], markersize=4, label=name)
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
            points = _curve(runs, rule)
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
        "Training loss less that of the best dense model, which read the same samples in the same order. Of each"
        " architecture the best entry is strong, others are faint.",
        gap_over_tokens,
    ),
    "share": Picture(
        "Perplexity against active parameters",
        "The paper's Figure 3. DS-MoE under thresholds, up to the dense policy; sparse-trained models under more and"
        " fewer experts than they were trained with; dense models as lines. Of each architecture the best entry is"
        " strong, others are faint.",
        perplexity_by_share,
    ),
    "parts": Picture(
        "DS-MoE with other parts and weights of its loss",
        "Under thresholds, up to the dense policy: the weight of the mutual-information loss, and the router.",
        parts_by_share,
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


def _by_architecture(results: Sequence[Result]) -> Iterator[tuple[list[Result], dict[str, Any]]]:
    """The seeds of each entry, and how its line is drawn."""
    for (name, is_of), colour in zip(ARCHITECTURES.items(), COLOURS, strict=False):
        best = best_of_architecture(results, name)
        for seeds in by_entry([result for result in results if is_of(result.run)]).values():
            yield seeds, {"color": colour, **({"label": name, **STRONG} if seeds == best else FAINT)}


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


def _curve(seeds: Sequence[Result], rule: str) -> list[Point]:
    """Under the policies of a rule and, where it has one, the dense policy."""
    return [*_means(seeds, rule), *_means(seeds, "dense")]


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
    """Colour and style of each entry; used up colours come again with another style."""
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
