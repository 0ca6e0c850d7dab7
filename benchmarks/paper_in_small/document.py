"""Writes docs/paper_in_small.md from the results of the runs: no figure in it is written by hand.

python -m benchmarks.paper_in_small.document [--study FILE] [--results DIR] [--output FILE] [--report FILE]
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

from benchmarks.measuring import surroundings_line, table
from benchmarks.paper_in_small.claims import ARCHITECTURES, Finding, best_of, best_of_architecture, findings, paired
from benchmarks.paper_in_small.data import KINDS
from benchmarks.paper_in_small.pictures import PICTURES, draw
from benchmarks.paper_in_small.result import (
    Entry,
    Result,
    by_entry,
    by_group,
    loss,
    loss_as_trained,
    perplexity,
    ranked,
    read_json,
    read_results,
    spread,
    with_best_learning_rates,
)
from benchmarks.paper_in_small.speed import FILE, speed_table
from benchmarks.paper_in_small.study import HERE, Study, read_study
from data_tools.indexed_dataset import write_whole
from dsmoe_megatron.reporting.page import page
from dsmoe_megatron.reporting.records import read_runs

INTRODUCTION = HERE / "introduction.md"
FINDINGS, OUTLOOK = "findings.md", "outlook.md"  # beside results, where someone has written what to think of them
SHARES = (0.4, 0.3)
Figure = Callable[[Entry], float]  # of one policy, or of passages that were read twice
VERDICTS = (
    "The figure is a ratio of perplexities, or of what sparsity costs. The next table says of which models, and which"
    " limit it is held against."
)
COPYING = (
    "Passages of held-out text, each read twice in a row; a model that looks up what followed a token before gains in"
    " the second reading. Of the runs whose checkpoints were at hand, as they were trained."
)
READINGS: tuple[Figure, ...] = (
    lambda copying: copying["first_reading"],
    lambda copying: copying["second_reading"],
    lambda copying: copying["first_reading"] - copying["second_reading"],
)
SMALL = (
    "These models are small. [benchmarks.md](benchmarks.md) has larger ones, which gain with few tokens at a time too,"
    " and what bounds them."
)


def write_document(study: Study, results: Sequence[Result], results_folder: Path, output: Path) -> None:
    """The document, and its pictures in a folder `images` beside it."""
    pictures = [name for name in PICTURES if draw(name, results, picture_path(output.parent, name))]
    write_whole(output, "\n".join(document(study, results, results_folder, pictures)).encode())


def write_report(results: Sequence[Result], output: Path) -> None:
    """The system's own report, one HTML page, of the best run of each architecture: all runs are too many to see."""
    groups = by_group([result for result in results if result.evaluation is not None]).values()
    best = [best_of_architecture(runs, name)[:1] for runs in groups for name in ARCHITECTURES]
    write_whole(output, page(read_runs([run.folder for seeds in best for run in seeds], [])).encode())


def picture_path(folder: Path, name: str) -> Path:
    """Where a picture lies, seen from the document's folder."""
    return folder / "images" / f"paper_in_small_{name}.svg"


def document(study: Study, results: Sequence[Result], results_folder: Path, pictures: Sequence[str]) -> Iterator[str]:
    """Its lines.

    Args:
        study: what was planned.
        results: what came of it.
        results_folder: where they lie, and beside them what was measured or written of all together.
        pictures: names of those that were drawn.
    """
    measured = ranked([result for result in results if result.evaluation is not None])
    found = findings(results)
    yield INTRODUCTION.read_text(encoding="utf-8")
    yield from _section("What the paper claims, and what the runs say", verdicts_table(found))
    yield from _section("How each claim was measured", claims_table(found))
    yield from _section("All models", models_table(measured))
    yield from _section("What DS-MoE is made of", parts_table(measured))
    yield from _section("What was learned besides", _lines_of(results_folder / FINDINGS))
    yield from _section("Text and code apart", kinds_table(measured))
    yield from _section("Sparse-trained models under other numbers of experts", other_experts_table(measured))
    yield from _section("Choices of experts", policies_table(measured))
    yield from _section("Copying from the context", copying_table(measured))
    for name in pictures:
        title, text, _ = PICTURES[name]
        yield from _section(title, [text, "", f"![{title}]({picture_path(Path(), name)})"])
    yield from _section("Speed of inference", speed_section(results_folder / FILE))
    yield from _section("Time", time_table(results))
    failed = [f"- {result.run.name}: {result.failure}" for result in results if result.failure is not None]
    missing = [run.name for run in study.runs if run.name not in {result.run.name for result in results}]
    yield from ("## Runs that ended otherwise", "", *(failed or ["None."]), "")
    if missing:
        yield from (f"Not made yet: {', '.join(missing)}.", "")
    yield from _lines_of(results_folder / OUTLOOK)
    yield ""


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from (f"## {title}", "", *lines, "")


def _lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def verdicts_table(found: Sequence[Finding]) -> list[str]:
    """Each claim's verdict and figure, a column per group of runs."""
    groups = dict.fromkeys(finding.group for finding in found)
    cells = {
        (finding.claim, finding.group): f"{finding.verdict}: {finding.ratios.text('.3f')}".rstrip(": ")
        for finding in found
    }
    claims = dict.fromkeys(finding.claim for finding in found)
    rows = [[claim, *(cells.get((claim, group), "") for group in groups)] for claim in claims]
    return [*table(["", *groups], rows), "", VERDICTS] if rows else []


def claims_table(found: Sequence[Finding]) -> list[str]:
    """Which figures decide."""
    header = ["", "Claim", "Ratio of perplexities", "Mean over seeds", "At most", "Seeds", "Wanted", "Holds"]
    rows = [
        [
            finding.group,
            finding.claim,
            finding.measure,
            finding.ratios.text(".3f"),
            f"{finding.limit:g}",
            str(len(finding.ratios.values)),
            str(finding.seeds_needed),
            finding.verdict,
        ]
        for finding in found
    ]
    return table(header, rows) if rows else []


def models_table(results: Sequence[Result]) -> list[str]:
    """Table 3 in small."""
    header = ["", "Model", "Parameters", "Learning rate", "MI weight", "Seeds"]
    header += ["Perplexity as trained", "at eps 0.48", "active [%]"]
    header += [f"{share:.0%} active" for share in SHARES] + ["Made on", "Training, tokens/s a core"]
    rows = []
    for name, runs in by_entry(results).items():
        alpha = runs[0].mi_alpha
        row = [runs[0].group, name, _millions(runs[0]), f"{runs[0].learning_rate:g}"]
        row += ["" if alpha is None else f"{alpha:g}", str(len(runs))]
        row.append(spread(runs, _as_trained(perplexity)).text(".2f"))
        row.append(spread(runs, _at_eps(perplexity)).text(".2f"))
        row.append(spread(runs, _at_eps(lambda policy: 100 * policy["active_share"])).text(".0f"))
        row += [spread(runs, _perplexity_at(share)).text(".2f") for share in SHARES]
        row.append(", ".join(sorted({run.device for run in runs})))
        on_a_core = [run.tokens_per_s for run in runs if run.device == "cpu"]  # a GPU is shared by many runs
        row.append(f"{statistics.fmean(on_a_core):,.0f}" if on_a_core else "")
        rows.append(row)
    return table(header, rows) if rows else []


def parts_table(results: Sequence[Result]) -> list[str]:
    """Each DS-MoE model beside the best dense and the best sparse-trained one, and what sparsity costs it."""
    rows = []
    for group, runs in by_group(with_best_learning_rates(results)).items():
        others = [best_of(runs, family) for family in ("dense", "smoe")]
        for name, own in by_entry([run for run in runs if run.run.family in ("dsmoe", "moa")]).items():
            over = [paired(own, other, loss_as_trained, loss_as_trained).text(".3f") for other in others]
            costs = [
                paired(own, own, sparse, loss_as_trained).text(".3f")
                for sparse in (_at_eps(loss), *(_loss_at(share) for share in SHARES))
            ]
            rows.append([group, name, *over, *costs])
    header = ["", "Ratios of perplexities", "to the best dense", "to the best sparse-trained"]
    header += [
        f"{sparsity}, to the dense policy" for sparsity in ("eps 0.48", *(f"{share:.0%} active" for share in SHARES))
    ]
    return table(header, rows) if rows else []


def kinds_table(results: Sequence[Result]) -> list[str]:
    """Losses of prose and code apart [nats per token]."""
    rows = []
    for name, runs in by_entry(results).items():
        row = [name]
        for kind in KINDS:
            of_kind = partial(loss, kinds={kind: 1.0})
            row += [spread(runs, _as_trained(of_kind)).text(".4f"), spread(runs, _at_eps(of_kind)).text(".4f")]
        rows.append(row)
    header = [f"{kind.capitalize()}, {policy}" for kind in KINDS for policy in ("as trained", "eps 0.48")]
    return table(["Model, nats per token", *header], rows) if rows else []


def other_experts_table(results: Sequence[Result]) -> list[str]:
    """What sparse-trained models make of fewer or more experts than they were trained with."""
    entries = {name: runs for name, runs in by_entry(results).items() if runs[0].run.family == "smoe"}
    counts = sorted({_top_k(policy) for runs in entries.values() for run in runs for policy in run.under("topk")})
    rows = [
        [name, *(spread(runs, _perplexity_of_top_k(count)).text(".2f") for count in counts)]
        for name, runs in entries.items()
    ]
    return table(["Model, perplexity", *(f"K = {count}" for count in counts)], rows) if rows else []


def policies_table(results: Sequence[Result]) -> list[str]:
    """The three rules at equal shares."""
    rules = ("threshold", "threshold_topk", "topk")
    rows = [
        [name, f"{share:.0%}"] + [spread(runs, _perplexity_at(share, rule)).text(".2f") for rule in rules]
        for name, runs in by_entry(results).items()
        if runs[0].run.family == "dsmoe"
        for share in SHARES
    ]
    return table(["Model, perplexity", "Active", *rules], rows) if rows else []


def copying_table(results: Sequence[Result]) -> list[str]:
    """Losses of passages that are read twice."""
    rows = []
    for name, runs in by_entry([run for run in results if run.copying is not None]).items():
        parts = [spread(runs, _of_readings(figure)) for figure in READINGS]
        rows.append([runs[0].group, name, str(len(runs)), *(part.text(".3f") for part in parts)])
    header = ["", "Model, nats per token", "Seeds", "First reading", "Second reading", "Gain"]
    return [COPYING, "", *table(header, rows)] if rows else []


def speed_section(report: Path) -> list[str]:
    """What speed.py measured, if it has."""
    if (speed := read_json(report)) is None:
        return []
    return [surroundings_line(speed["surroundings"]), "", *speed_table(speed), "", SMALL]


def time_table(results: Sequence[Result]) -> list[str]:
    """What the study took."""
    rows = []
    for device in sorted({result.device for result in results}):
        made_there = [result for result in results if result.device == device]
        for stage in ("training", "evaluation"):
            costs = [cost for result in made_there for cost in result.costs if cost["stage"] == stage]
            processor, wall = sum(cost["processor_s"] for cost in costs), sum(cost["wall_s"] for cost in costs)
            peak = max((cost["peak_bytes"] for cost in costs), default=0)
            hours = [f"{processor / 3600:.1f}", f"{wall / 3600:.1f}"]
            rows.append([stage, device, str(len(made_there)), *hours, f"{peak / 1e6:,.0f} MB"])
    header = ["", "Made on", "Runs", "Processor hours", "Hours by the clock of one process", "Largest process"]
    return table(header, rows)


def _as_trained(figure: Figure) -> Callable[[Result], float | None]:
    return lambda run: figure(run.as_trained)


def _at_eps(figure: Figure, eps: float = 0.48) -> Callable[[Result], float | None]:
    def at_eps(run: Result) -> float | None:
        policy = run.threshold(eps)
        return None if policy is None else figure(policy)

    return at_eps


def _of_readings(figure: Figure) -> Callable[[Result], float | None]:
    return lambda run: None if run.copying is None else figure(run.copying)


def _perplexity_of_top_k(count: int) -> Callable[[Result], float | None]:
    return lambda run: next((perplexity(policy) for policy in run.under("topk") if _top_k(policy) == count), None)


def _loss_at(share: float, rule: str = "threshold") -> Callable[[Result], float | None]:
    return lambda run: run.loss_at_share(share, rule) if run.run.family == "dsmoe" else None


def _perplexity_at(share: float, rule: str = "threshold") -> Callable[[Result], float | None]:
    def at_share(run: Result) -> float | None:
        found = _loss_at(share, rule)(run)
        return None if found is None else math.exp(found)

    return at_share


def _top_k(policy: Entry) -> int:
    return int(policy["policy"]["num_experts_per_tok"])


def _millions(result: Result) -> str:
    assert result.evaluation is not None
    return f"{result.evaluation['parameters_without_embeddings'] / 1e6:.2f} M"


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.paper_in_small.document", description=__doc__)
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml", metavar="FILE", help="the runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="what they left")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/paper_in_small.md"), metavar="FILE", help="Markdown to write"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="HTML page of the best runs' curves to write")
    arguments = parser.parse_args()
    study = read_study(arguments.study)
    results = read_results(arguments.results, study)
    write_document(study, results, arguments.results, arguments.output)
    if arguments.report is not None:
        write_report(results, arguments.report)


if __name__ == "__main__":
    main()
