"""The page: figures, a table of final figures, and what could not be read, in one file without scripts or links."""

import html
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from dsmoe_megatron.reporting import figures
from dsmoe_megatron.reporting.records import Run

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2327; background: #fff; margin: 2rem auto; max-width: 64rem;
  padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
p { margin: .2rem 0 .6rem; color: #4a545c; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #e4e6e8; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.names :is(th, td):nth-child(-n+3) { text-align: left; }
thead th { border-bottom: 2px solid #9aa3aa; white-space: normal; vertical-align: bottom; }
summary { cursor: pointer; color: #2563a8; }
.remarks { background: #fff6e0; padding: .5rem 1rem; border-left: 4px solid #d9a300; }
"""


class Section(NamedTuple):
    title: str
    text: str
    draw: Callable[[Sequence[Run]], Figure | None]
    has_panel_per_run: bool = False  # folded up where there are many


SECTIONS = (
    Section("Loss", "Language-modelling loss over the tokens seen.", figures.losses),
    Section(
        "Mutual-information loss",
        "Mean over the routers of a kind, without its weight. Lower is more even use and surer choice; the dotted line"
        " is its least value, -log N.",
        figures.mutual_information,
    ),
    Section(
        "Perplexity against active parameters",
        "What sparse inference costs: each point is a policy, each line one way of choosing experts. Compare runs only"
        " where they were measured on the same windows.",
        figures.sparse_perplexity,
    ),
    Section(
        "Cost of sparse policies during training",
        "How far the perplexity of each policy lies above that of the model as trained, in the validation in the loop.",
        figures.policies_in_training,
        has_panel_per_run=True,
    ),
    Section(
        "Active experts per layer",
        "Mean number per token: at the recipe's threshold in the last logged steps of training, and under the"
        " threshold policies of evaluations.",
        figures.active_per_layer,
    ),
    Section(
        "Active experts per token",
        "How many experts single tokens activate in each layer, under a threshold policy.",
        figures.active_per_token,
        has_panel_per_run=True,
    ),
    Section(
        "Active experts during training", "Mean over layers, at the recipe's threshold.", figures.active_in_training
    ),
    Section(
        "Specialisation of the experts",
        "How much of what could be known a token's choice of experts tells: 0 is no choice or one expert for all, 1 is"
        " one expert per token and all used evenly.",
        figures.specialisation,
    ),
    Section(
        "Expert balance",
        "Mean probability of each expert, times their number, at the end.",
        figures.balance,
        has_panel_per_run=True,
    ),
    Section("Throughput", "Training steps alone, without validation and checkpoints.", figures.throughput),
)


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document."""
    title = "Report of " + (f"{len(runs)} runs" if len(runs) > figures.FEW else ", ".join(run.name for run in runs))
    body = [f"<h1>{html.escape(title)}</h1>", _remarks(runs), "<h2>Final figures</h2>", _table(runs), _policies(runs)]
    missing = []
    for section in SECTIONS:
        picture = figures.as_svg(section.draw, runs)
        if picture is None:
            missing.append(section.title)
            continue
        heading = f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"
        if section.has_panel_per_run and len(runs) > figures.FEW:
            picture = _folded("a panel per run", picture)
        body.append(f"<section>{heading}{picture}</section>")
    if missing:
        body.append(f"<h2>Not shown</h2><p>{html.escape(_explanation(missing))}</p>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _explanation(missing: Sequence[str]) -> str:
    return (
        f"No data for: {', '.join(missing)}. Expert use is logged with logging.expert_use; what single tokens activate "
        "is in the results of evaluate, written with --output RUN/evaluation.json."
    )


def _remarks(runs: Sequence[Run]) -> str:
    remarks = [f"{run.name}: {remark}" for run in runs for remark in run.remarks]
    return f'<p class="remarks">{"<br>".join(map(html.escape, remarks))}</p>' if remarks else ""


def _table(runs: Sequence[Run]) -> str:
    """A column per run, a row per run where there are many."""
    rows: list[tuple[str, list[str]]] = [
        ("parameters without embeddings", [_number(run.parameters, 1e6, "M") for run in runs]),
        ("steps", [f"{run.training[-1]['step']:,}" if run.training else "" for run in runs]),
        ("tokens", [_number(run.training[-1]["tokens"] if run.training else None, 1e6, "M") for run in runs]),
        ("training loss", [f"{run.training[-1]['lm_loss']:.4f}" if run.training else "" for run in runs]),
        ("validation loss, as trained", [_last_validation(run) for run in runs]),
        *(
            (f"mutual-information loss, {title}", [_last(run, f"mi_loss_{kind}") for run in runs])
            for kind, title in figures.KINDS.items()
        ),
        ("tokens per second, median", [_median_speed(run) for run in runs]),
    ]
    table = [["", *(run.name for run in runs)], *([name, *cells] for name, cells in rows if any(cells))]
    header, *lines = table if len(runs) <= figures.FEW else [list(line) for line in zip(*table, strict=True)]
    return _html_table(header, lines)


def _policies(runs: Sequence[Run]) -> str:
    """A row per run and policy."""
    rows = []
    for run in runs:
        sources = [("validation", run.validation[-1]["policies"])] if run.validation else []
        sources += [(name, evaluation["policies"]) for name, evaluation in run.evaluations.items()]
        for source, policies in sources:
            for name, values in policies.items():
                rows.append([run.name, source, name, f"{values['perplexity']:.3f}", f"{values['active_share']:.1%}"])
                rows[-1].append(
                    "" if run.parameters is None else _number(values["active_share"] * run.parameters, 1e6, "M")
                )
    header = ["run", "measured in", "policy", "perplexity", "active share", "active parameters"]
    if not rows:
        return ""
    table = _html_table(header, rows, "names")
    return table if len(runs) <= figures.FEW else _folded(f"{len(rows)} rows: each run under each policy", table)


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    """`kind` names: the first three columns are text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _number(value: float | None, unit: float, suffix: str) -> str:
    return "" if value is None else f"{value / unit:,.2f}{suffix}"


def _last(run: Run, name: str) -> str:
    value = run.training[-1].get(name) if run.training else None
    return "" if value is None else f"{value:.4f}"


def _last_validation(run: Run) -> str:
    return f"{run.validation[-1]['validation_loss']:.4f}" if run.validation else ""


def _median_speed(run: Run) -> str:
    speeds = [line["tokens_per_s"] for line in run.training if "tokens_per_s" in line]
    return f"{statistics.median(speeds):,.0f}" if speeds else ""
