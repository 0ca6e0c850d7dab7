"""The pictures of a report. Each function draws one figure of all runs, or returns None where none has the data.

A run has one colour in all of them; a line style or marker tells kinds and policies apart.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.reporting.records import Run

COLOURS = ("#2563a8", "#d1662a", "#3c8d40", "#8e4b9e", "#a63d40", "#5f6b73", "#b08a1e", "#1f8a8a")
MARKERS = {"dense": "*", "topk": "s", "threshold": "o", "threshold_topk": "^"}
KINDS = {"attention": "attention experts", "mlp": "MLP experts"}
LINE_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))
WIDTH, HEIGHT = 9.0, 3.6  # inches
LEGEND_ROW = 0.2  # inches
MOST_POINTS = 400  # of a curve; more are averaged
FEW = 3  # runs that leave room for several lines each
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # identifiers are the same in every run
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6e8",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def as_svg(draw: Callable[[Sequence[Run]], Figure | None], runs: Sequence[Run]) -> str | None:
    """The figure as an <svg> element; None where there is nothing to draw."""
    with matplotlib.rc_context(STYLE):
        figure = draw(runs)
        if figure is None:
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.08)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def losses(runs: Sequence[Run]) -> Figure | None:
    """Training loss as a line, validation loss as points on another one."""
    figure, axes = _figure(1)
    for run, colour in _coloured(runs):
        if run.training:
            _curve(
                axes[0], run, [(line["step"], line["lm_loss"]) for line in run.training], color=colour, label=run.name
            )
        points = [(line["step"], line["validation_loss"]) for line in run.validation]
        _curve(axes[0], run, points, color=colour, linestyle="--", marker="o", markersize=4)
    axes[0].plot([], [], color="black", label="training (without the mutual-information loss)")
    axes[0].plot([], [], color="black", linestyle="--", marker="o", markersize=4, label="validation, as trained")
    axes[0].set_ylabel("loss [nats per token]")
    return _finish(figure, axes)


def mutual_information(runs: Sequence[Run]) -> Figure | None:
    """The loss of the routers, mean over them; its least value is -log N."""
    figure, axes = _figure(2)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for run, colour in _coloured(runs):
            name = f"mi_loss_{kind}"
            points = [(line["step"], line[name]) for line in run.training if line.get(name) is not None]
            _curve(axis, run, points, color=colour, label=run.name)
            experts = _experts(run.model, kind)
            if points and experts > 1:
                axis.axhline(-math.log(experts), color=colour, linestyle=":", linewidth=1)
        axis.set_title(title)
        axis.set_ylabel("mutual-information loss [nats]")
    return _finish(figure, axes)


def sparse_perplexity(runs: Sequence[Run]) -> Figure | None:
    """Perplexity against what is active: the newest validation as single points, `evaluate`'s sweeps as lines."""
    figure, axes = _figure(2)
    drawn = set()
    for run, colour in _coloured(runs):
        for rule, number, points in _policy_points(run):
            drawn.add(rule)
            for axis, column in zip(axes, (0, 1), strict=True):
                places = [(point[column], point[2]) for point in points if point[column] is not None]
                line = LINE_STYLES[number % len(LINE_STYLES)] if len(places) > 1 else "none"
                style: Any = {"color": colour, "marker": MARKERS[rule], "markersize": 10 if rule == "dense" else 5.5}
                if not run.evaluations:  # hollow
                    style["markerfacecolor"] = "white"
                axis.plot(*_columns(places), linestyle=line, linewidth=1.2, **style)
    for rule in (rule for rule in MARKERS if rule in drawn):
        axes[0].plot([], [], color="black", linestyle="none", marker=MARKERS[rule], label=rule)
    for run, colour in _coloured(runs):
        source = "" if run.evaluations else " (hollow: validation in training)"
        axes[0].plot([], [], color=colour, linewidth=4, label=f"{run.name}{source}")
        if len(run.evaluations) > 1:
            for name, style in zip(run.evaluations, itertools.cycle(LINE_STYLES)):
                axes[0].plot([], [], color=colour, linestyle=style, label=f"{run.name}, {name}")
    axes[0].set_xlabel("active share of the parameters without embeddings [%]")
    axes[1].set_xlabel("active parameters without embeddings [millions]")
    for axis in axes:
        axis.set_ylabel("perplexity")
    return _finish(figure, axes, x_label=None) if drawn else None


def policies_in_training(runs: Sequence[Run]) -> Figure | None:
    """What each sparse policy costs against the model as trained, a panel per run."""
    runs_drawn = [run for run in runs if len(run.validation) > 1 and len(run.validation[-1]["policies"]) > 1]
    if not runs_drawn:
        return None
    figure, axes = _grid(len(runs_drawn), 2)
    for axis, run in zip(axes, runs_drawn, strict=True):
        reference, *names = run.validation[-1]["policies"]
        for index, name in enumerate(names):
            lines = [line for line in run.validation if {name, reference} <= set(line["policies"])]
            ratios = [
                line["policies"][name]["perplexity"] / line["policies"][reference]["perplexity"] for line in lines
            ]
            points = [(line["step"], 100 * (ratio - 1)) for line, ratio in zip(lines, ratios, strict=True)]
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}
            _curve(axis, run, points, marker="o", markersize=3.5, label=name, **style)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(run.name)
        axis.set_ylabel(f"perplexity against {reference} [%]")
        axis.legend()
    return _finish(figure, axes, legend=False)


def active_per_layer(runs: Sequence[Run]) -> Figure | None:
    """Mean active experts of each layer: at the recipe's eps in training, and under evaluated threshold policies.

    Of more than a few runs one line each: under one evaluated policy, or in training where there is none.
    """
    figure, axes = _figure(2)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for run, colour in _coloured(runs):
            thresholds = _thresholds(run) if len(runs) <= FEW else _one_threshold(run)
            if len(runs) <= FEW or not thresholds:
                _layer_line(axis, _routers(run, kind), color=colour, label=f"{run.name}, training")
            styles = itertools.cycle(LINE_STYLES[1:])  # the first is the training's
            for name, figures in thresholds:
                routers = [router for router in figures["routers"] if router["kind"] == kind]
                _layer_line(axis, routers, color=colour, linestyle=next(styles), label=f"{run.name}, {name}")
        axis.set_title(title)
        axis.set_xlabel("layer")
        axis.set_ylabel("active experts per token")
        axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
    return _finish(figure, axes, x_label=None)


def active_per_token(runs: Sequence[Run]) -> Figure | None:
    """Layer by layer, the share of tokens by number of active experts, under one threshold policy of each run."""
    panels = []
    for run in runs:
        for name, figures in _one_threshold(run):
            panels += [
                (f"{run.name}, {name}\n{KINDS[kind]}", routers)
                for kind in KINDS
                if (routers := [router for router in figures["routers"] if router["kind"] == kind])
            ]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2)
    for axis, (title, routers) in zip(axes, panels, strict=False):
        shares = [[100 * share for share in router["tokens_by_active_experts"]][1:] for router in routers]
        image = axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, extent=_extent(len(shares), len(shares[0]), 1))
        _heat_map(figure, axis, image, title, "active experts", "tokens [%]")
    return figure


def active_in_training(runs: Sequence[Run]) -> Figure | None:
    """Mean over layers of the active experts at the recipe's eps."""
    return _of_expert_use(runs, "active experts per token", lambda router, _: router["active_experts"])


def specialisation(runs: Sequence[Run]) -> Figure | None:
    """Mutual information of expert and token, as a share of its largest value log N: 1 is even use and sure choice."""
    return _of_expert_use(
        runs,
        "mutual information / log N",
        lambda router, experts: (router["marginal_entropy"] - router["conditional_entropy"]) / math.log(experts),
    )


def balance(runs: Sequence[Run]) -> Figure | None:
    """N x the mean probability of each expert at the end of training: 1 is even use."""
    panels = [
        (f"{run.name}\n{KINDS[kind]}", routers) for run in runs for kind in KINDS if (routers := _routers(run, kind))
    ]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 2)
    for axis, (title, routers) in zip(axes, panels, strict=False):
        shares = [[share * len(router["share"]) for share in router["share"]] for router in routers]
        largest = max(max(max(row) for row in shares), 2.0)
        norm = colors.TwoSlopeNorm(1.0, vmin=0.0, vmax=largest)
        extent = _extent(len(shares), len(shares[0]), 0)
        image = axis.imshow(shares, aspect="auto", cmap="RdBu_r", norm=norm, extent=extent)
        _heat_map(figure, axis, image, title, "expert", "use (1 is even)")
    return figure


def throughput(runs: Sequence[Run]) -> Figure | None:
    """Tokens per second of the steps between two lines, validation and checkpoints left out."""
    figure, axes = _figure(1)
    for run, colour in _coloured(runs):
        points = [(line["step"], line["tokens_per_s"]) for line in run.training if "tokens_per_s" in line]
        _curve(axes[0], run, points, color=colour, label=run.name)
    axes[0].set_ylabel("tokens per second")
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    return _finish(figure, axes)


def _of_expert_use(runs: Sequence[Run], label: str, value: Callable[[dict[str, Any], int], float]) -> Figure | None:
    figure, axes = _figure(2)
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        for run, colour in _coloured(runs):
            points = []
            for line in run.expert_use:
                routers = [router for router in line["routers"] if router["kind"] == kind]
                values = [value(router, len(router["share"])) for router in routers if len(router["share"]) > 1]
                if values:
                    points.append((line["step"], sum(values) / len(values)))
            _curve(axis, run, points, color=colour, label=run.name)
        axis.set_title(title)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    return _finish(figure, axes)


def _policy_points(run: Run) -> Iterator[tuple[str, int, list[tuple[float, float | None, float]]]]:
    """Rule, number of the evaluation, and its (active share [%], active parameters [millions], perplexity) by share.

    Measurements on other windows are other curves; the newest validation counts only where there is no evaluation.
    """
    measured = [evaluation["policies"] for evaluation in run.evaluations.values()]
    if not measured and run.validation:
        measured = [run.validation[-1]["policies"]]
    for number, policies in enumerate(measured):
        found: dict[str, list[tuple[float, float | None, float]]] = {}
        for name, figures in policies.items():
            rule = name.split(" ")[0] if "policy" not in figures else figures["policy"]["expert_policy"]
            share = figures["active_share"]
            parameters = None if run.parameters is None else share * run.parameters / 1e6
            found.setdefault(rule, []).append((100 * share, parameters, figures["perplexity"]))
        yield from ((rule, number, sorted(points)) for rule, points in found.items())


def _thresholds(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Threshold policies of all evaluations, with the evaluation's name where there are several."""
    return [
        (name if len(run.evaluations) == 1 else f"{evaluation_name}, {name}", figures)
        for evaluation_name, evaluation in run.evaluations.items()
        for name, figures in evaluation["policies"].items()
        if figures["policy"]["expert_policy"] == "threshold"
    ]


def _one_threshold(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """The threshold policy of the recipe's eps where it was measured, else the middle one; none where there is none."""
    measured = _thresholds(run)
    of_recipe = [
        (name, figures)
        for name, figures in measured
        if run.model is not None and figures["policy"].get("expert_threshold") == run.model.expert_threshold
    ]
    return (of_recipe or measured[len(measured) // 2 :])[:1]


def _routers(run: Run, kind: str) -> list[dict[str, Any]]:
    """Of the newest line of expert use."""
    routers = run.expert_use[-1]["routers"] if run.expert_use else []
    return [router for router in routers if router["kind"] == kind]


def _experts(model: ModelConfig | None, kind: str) -> int:
    if model is None:
        return 1
    return model.num_experts if kind == "mlp" else model.num_attention_experts


def _coloured(runs: Sequence[Run]) -> Iterator[tuple[Run, str]]:
    """Colours that are told apart well, or of a rainbow where there are more runs than those."""
    rainbow = matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, len(runs)))
    return zip(runs, COLOURS if len(runs) <= len(COLOURS) else map(colors.to_hex, rainbow), strict=False)


def _curve(axes: Axes, run: Run, points: Sequence[tuple[int, float]], **style: Any) -> None:
    """Against the tokens seen, in millions."""
    finite = [(run.tokens_at(step) / 1e6, value) for step, value in points if math.isfinite(value)]
    if len(finite) == 1:  # a line of one point would not be seen
        style = {"marker": "o", **style}
    if finite:
        axes.plot(*_columns(_thinned(finite)), **{"linewidth": 1.5, **style})


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of its neighbours."""
    width = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _columns(points: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def _layer_line(axes: Axes, routers: Sequence[dict[str, Any]], **style: Any) -> None:
    if routers:
        points = [(router["layer"], router["active_experts"]) for router in routers]
        axes.plot(*_columns(points), marker="o", markersize=3.5, linewidth=1.4, **style)


def _extent(rows: int, columns: int, first: int) -> tuple[float, float, float, float]:
    """Cells centred on their numbers: layers from 0 downward, columns from `first` on."""
    return (first - 0.5, first + columns - 0.5, rows - 0.5, -0.5)


def _heat_map(figure: Figure, axes: Axes, image: Any, title: str, x_label: str, bar_label: str) -> None:
    axes.grid(visible=False)
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel("layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes, label=bar_label)


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _grid(panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Panels row by row; places without one stay empty."""
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, 0.8 * HEIGHT * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[panels:]:
        empty.set_axis_off()
    return figure, axes[:panels]


def _finish(
    figure: Figure, axes: Sequence[Axes], x_label: str | None = "tokens [millions]", legend: bool = True
) -> Figure | None:
    """Labels, and one legend above the panels; None if nothing was drawn. A panel without data says so."""
    # lines without points are there for the legend
    if not any(np.size(line.get_xdata()) for axis in axes for line in axis.lines):
        return None
    for axis in axes:
        if x_label is not None:
            axis.set_xlabel(x_label)
        if not axis.lines:
            axis.text(0.5, 0.5, "no such router", transform=axis.transAxes, ha="center", color="grey")
    if legend:
        handles: dict[str, Any] = {}
        for axis in axes:
            handles.update((label, handle) for handle, label in zip(*axis.get_legend_handles_labels(), strict=True))
        if handles:
            columns = min(3, len(handles))
            rows = -(-len(handles) // columns)
            figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - 2))  # room for two is there
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns)
    return figure
