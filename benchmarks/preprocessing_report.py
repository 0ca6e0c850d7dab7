"""Figures, goals and tables of the benchmark of data preparation."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring import surroundings_line, table
from benchmarks.preprocessing_peers import (
    BARE_SENTENCEPIECE,
    BARE_TOKENIZERS,
    CODEGEN_ROW,
    FAST,
    FAST_PLAIN,
    HUGGINGFACE_ONLY,
    OURS,
    PREPROCESS_DATA,
    SENTENCEPIECE_ROW,
    TWO_WORKERS,
)
from benchmarks.process_usage import Usage

GPT2, REFERENCE, SENTENCEPIECE = "gpt2", "reference", "sentencepiece"

PILE_BYTES = 825 * 2**30
PILE_CORES = 64
LARGEST_PEAK = 1e9  # bytes of one process
FLAT_GROWTH = 1.1  # of the peak, from the smaller to the larger input
INDEX_SECONDS = 1.0

Values = Sequence[float | None]  # one per repeat; None where a difference of times is lost in the noise


@dataclass(frozen=True)
class Goal:
    """What a row is wanted to reach.

    Args:
        comparison: that the row is in.
        row: who.
        peer: whose figure it is divided by; none: the figure itself.
        wanted: at least this.
        clock: `wall` or `processor`.
        larger_comparison: where the row's speed without start-up is taken from, if it is too fast for the input of this
            one; of the repeat of the same number.
    """

    comparison: str
    row: str
    peer: str | None
    wanted: float
    clock: str = "processor"
    larger_comparison: str | None = None


GOALS = (
    Goal(GPT2, OURS, None, 80),
    Goal(GPT2, CODEGEN_ROW, OURS, 0.7),
    Goal(GPT2, OURS, FAST, 1.5),
    Goal(GPT2, OURS, FAST_PLAIN, 1.5),
    Goal(GPT2, TWO_WORKERS, OURS, 1.8, clock="wall"),
    Goal(REFERENCE, OURS, PREPROCESS_DATA, 50, larger_comparison=GPT2),
    Goal(REFERENCE, HUGGINGFACE_ONLY, BARE_TOKENIZERS, 0.9),
    Goal(SENTENCEPIECE, SENTENCEPIECE_ROW, BARE_SENTENCEPIECE, 0.9),
)


def figures(runs: Sequence[Mapping[str, Usage]], megabytes: Mapping[str, float], bare: bool) -> dict[str, Values]:
    """MB of text per second, one per repeat.

    Args:
        runs: usage on the smaller and the larger input.
        megabytes: text of the two.
        bare: the times hold no start-up.

    Returns:
        {"processor", "wall"} of the whole process on the larger input, the same with "_without_startup" from the
        difference between the two sizes, and "peak_bytes".
    """
    more = megabytes["larger"] - megabytes["smaller"]
    result: dict[str, Values] = {"peak_bytes": [run["larger"].peak_bytes for run in runs]}
    for clock in ("processor", "wall"):
        pairs = [(getattr(run["smaller"], clock), getattr(run["larger"], clock)) for run in runs]
        whole = [megabytes["larger"] / larger for _, larger in pairs]
        differences = [more / (larger - smaller) if larger > smaller else None for smaller, larger in pairs]
        result[clock] = whole
        result[f"{clock}_without_startup"] = whole if bare else differences
    return result


def ratios(own: Values, other: Values) -> Values:
    """Of each repeat; the two ran in turns, so that what slows one repeat down slows both."""
    return [None if a is None or b is None else a / b for a, b in zip(own, other, strict=True)]


def judged(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal whose rows were measured, of the whole process and without start-up."""
    verdicts = []
    for goal in GOALS:
        rows = report["comparisons"].get(goal.comparison, {"rows": {}})["rows"]
        if goal.row not in rows or (goal.peer is not None and goal.peer not in rows):
            continue
        verdict: dict[str, Any] = {
            "comparison": goal.comparison,
            "row": goal.row,
            "peer": goal.peer,
            "clock": goal.clock,
            "wanted": goal.wanted,
        }
        larger = report["comparisons"].get(goal.larger_comparison, {"rows": rows})["rows"]
        for part, own_rows in (("whole", rows), ("without_startup", larger)):
            figure = goal.clock if part == "whole" else f"{goal.clock}_{part}"
            own = own_rows[goal.row]["figures"][figure]
            verdict[part] = own if goal.peer is None else ratios(own, rows[goal.peer]["figures"][figure])
        verdicts.append(verdict)
    return verdicts


def pile_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the measured speeds without start-up mean for the Pile: hours, and the storage bandwidth to keep up."""
    rows = []
    wanted = [(GPT2, OURS), (GPT2, CODEGEN_ROW), (GPT2, FAST), (REFERENCE, HUGGINGFACE_ONLY)]
    wanted += [(REFERENCE, PREPROCESS_DATA), (SENTENCEPIECE, SENTENCEPIECE_ROW)]
    for comparison, name in wanted:
        measured = report["comparisons"].get(comparison, {"rows": {}, "megabytes": {}})
        row = measured["rows"].get(name)
        rates = [rate for rate in row["figures"]["processor_without_startup"] if rate] if row else []
        if row is None or not rates:
            continue
        together = statistics.median(rates) * PILE_CORES
        text_bytes = measured["megabytes"]["larger"] * 1e6
        read, write = together * row["input_bytes"] / text_bytes, together * row["output_bytes"] / text_bytes
        hours = PILE_BYTES / 1e6 / together / 3600
        storage = report["storage"]
        # one disk does both by turns
        disk_hours = hours * (read / storage["read"] + write / storage["write"])
        rows.append({"row": name, "hours": hours, "read": read, "write": write, "disk_hours": disk_hours})
    return rows


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    parts = [surroundings_line(report["surroundings"])]
    if "megatron_lm_commit" in report:
        parts.append(f"Megatron-LM at commit {report['megatron_lm_commit']}.")
    for row, reason in report.get("left_out", {}).items():
        parts.append(f"Left out: {row}: {reason}.")
    for name, comparison in report["comparisons"].items():
        parts += [_comparison_title(name, comparison, report["repeats"]), _comparison_table(comparison)]
        parts.append("\n".join(f"- {row}: `{own['command']}`" for row, own in comparison["rows"].items()))
    parts += ["Goals. Ratios are of MB per second, within a repeat.", _goal_table(report)]
    storage = report["storage"]
    parts.append(
        f"Disk: writes {storage['write']:.0f} MB/s (synced), reads {storage['read']:.0f} MB/s (a file of"
        f" {storage['megabytes']:.0f} MB, in sequence)."
    )
    parts += [f"The Pile, {PILE_BYTES / 2**30:.0f} GiB of text, on {PILE_CORES} cores, by the speed without start-up:"]
    parts.append(_pile_table(report))
    return "\n\n".join(parts)


def _comparison_title(name: str, comparison: Mapping[str, Any], repeats: int) -> str:
    smaller, larger = comparison["megabytes"]["smaller"], comparison["megabytes"]["larger"]
    documents = comparison["documents"]["larger"]
    return (
        f"{name}: {larger:.1f} MB of text, {documents:,} documents; without start-up: from the difference to"
        f" {smaller:.1f} MB; {repeats} repeats in turns, median [min, max]. CPU-s: user and system, all children."
    )


def _comparison_table(comparison: Mapping[str, Any]) -> str:
    header = ["what", "MB per CPU-s", "without start-up", "MB/s", "without start-up", "largest process", "files"]
    rows = []
    for name, row in comparison["rows"].items():
        own = row["figures"]
        rates = [own[f"{clock}{part}"] for clock in ("processor", "wall") for part in ("", "_without_startup")]
        peak = f"{statistics.median(own['peak_bytes']) / 1e6:.0f} MB"
        rows.append([name, *map(_summary, rates), peak, _identity(comparison, name)])
    return "\n".join(table(header, rows))


def _identity(comparison: Mapping[str, Any], name: str) -> str:
    if name == next(iter(comparison["rows"])):
        return "the reference"
    identical = comparison["identical_to_first"].get(name)
    return "not compared" if identical is None else "identical" if identical else "DIFFERENT"


def _goal_table(report: Mapping[str, Any]) -> str:
    rows = []
    for verdict in report["goals"]:
        unit = "MB/s of the clock" if verdict["clock"] == "wall" else "MB per CPU-s"
        what = f"{verdict['row']} / {verdict['peer']}" if verdict["peer"] else verdict["row"]
        cells = [_against(verdict[part], verdict["wanted"]) for part in ("whole", "without_startup")]
        rows.append([f"{verdict['comparison']}: {what}, {unit}", f">= {verdict['wanted']:g}", *cells])
    if "memory" in report:
        rows += _memory_rows(report["memory"])
    index = report["index"]
    seconds = index["median_seconds"]
    files = "identical files" if index["identical"] else "DIFFERENT files"
    taken = ", ".join(f"{name} {own:.2f} s" for name, own in seconds.items())
    on_index = _met(seconds["ours"] < INDEX_SECONDS)
    rows.append(
        [f"index of {index['documents']:,} documents: {taken}; {files}", f"< {INDEX_SECONDS:g} s", on_index, ""]
    )
    return "\n".join(table(["what", "goal", "whole process", "without start-up"], rows))


def _memory_rows(memory: Sequence[Mapping[str, float]]) -> list[list[str]]:
    smaller, larger = memory
    growth = larger["peak_bytes"] / smaller["peak_bytes"]
    peak = f"{larger['peak_bytes'] / 1e6:.0f} MB: {_met(larger['peak_bytes'] < LARGEST_PEAK)}"
    sizes = f"from {smaller['megabytes']:.0f} to {larger['megabytes']:.0f} MB of text"
    return [
        ["peak memory of the largest process, 2 workers", f"< {LARGEST_PEAK / 1e6:.0f} MB", peak, ""],
        [f"its growth {sizes}", f"<= {FLAT_GROWTH:g}", f"{growth:.2f}: {_met(growth <= FLAT_GROWTH)}", ""],
    ]


def _pile_table(report: Mapping[str, Any]) -> str:
    header = ["what", "hours", "storage must read", "and write", "hours that this disk needs", "limit with this disk"]
    rows = [
        [
            row["row"],
            f"{row['hours']:.2f}",
            f"{row['read']:.0f} MB/s",
            f"{row['write']:.0f} MB/s",
            f"{row['disk_hours']:.2f}",
            "storage" if row["disk_hours"] > row["hours"] else "processors",
        ]
        for row in report["pile"]
    ]
    return "\n".join(table(header, rows))


def _summary(values: Values) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "lost in the noise"
    return f"{statistics.median(known):.2f} [{min(known):.2f}, {max(known):.2f}]"


def _against(values: Values, wanted: float) -> str:
    known = [value for value in values if value is not None]
    return f"{_summary(values)}: {_met(statistics.median(known) >= wanted)}" if known else _summary(values)


def _met(met: bool) -> str:
    return "met" if met else "missed"
