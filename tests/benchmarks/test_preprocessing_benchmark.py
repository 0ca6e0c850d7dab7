"""The benchmark of data preparation runs, and pairs what ran in the same repeat; not how fast."""

import json
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.preprocessing_report import figures, pile_rows, ratios
from benchmarks.process_usage import CommandError, Usage, measured

ROOT = Path(__file__).resolve().parents[2]
OURS, BARE = "ours, sentencepiece", "sentencepiece's encode alone"


def runs_of(*seconds: tuple[float, float]) -> list[dict[str, Usage]]:
    """Usage on the smaller and the larger input, per repeat."""
    return [{"smaller": Usage(a, 2 * a, 100), "larger": Usage(b, 2 * b, 300)} for a, b in seconds]


def test_figures_leave_start_up_out() -> None:
    measured_figures = figures(runs_of((2.0, 5.0), (3.0, 3.0)), {"smaller": 10, "larger": 40}, bare=False)

    assert measured_figures["processor"] == [8.0, pytest.approx(40 / 3)]
    assert measured_figures["processor_without_startup"] == [10.0, None]  # no difference: lost in the noise
    assert measured_figures["wall_without_startup"] == [5.0, None]
    assert measured_figures["peak_bytes"] == [300, 300]


def test_ratios_are_those_of_the_same_repeat() -> None:
    megabytes = {"smaller": 10.0, "larger": 40.0}
    slow_second = figures(runs_of((1.0, 4.0), (10.0, 40.0)), megabytes, bare=False)
    half_as_fast = figures(runs_of((2.0, 8.0), (20.0, 80.0)), megabytes, bare=False)

    assert ratios(slow_second["processor"], half_as_fast["processor"]) == [2.0, 2.0]
    assert ratios([1.0, None], [2.0, 3.0]) == [0.5, None]


def test_usage_is_of_the_command_with_its_children_and_not_of_what_started_it(tmp_path: Path) -> None:
    held = b"x" * 300_000_000  # of this process, which must not be counted
    work = "import time\nwhile time.process_time() < 0.3: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"

    usage = measured([sys.executable, "-c", parent], {}, tmp_path, tmp_path / "usage.json")

    assert usage.processor >= 0.3
    assert usage.peak_bytes < len(held) / 2


def test_usage_counts_workers_that_nobody_waits_for(tmp_path: Path) -> None:
    orphan = "import time; held = bytearray(1).ljust(200_000_000)\nwhile time.process_time() < 0.5: pass"
    # the shell ends at once and leaves it behind
    usage = measured(["sh", "-c", f"'{sys.executable}' -c '{orphan}' &"], {}, tmp_path, tmp_path / "usage.json")

    assert usage.processor >= 0.5
    assert usage.peak_bytes > 200_000_000


def test_a_failing_command_says_its_last_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('nothing to read\\n')"]

    with pytest.raises(CommandError, match="nothing to read"):
        measured(command, {}, tmp_path, tmp_path / "usage.json")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a run without Megatron-LM on the texts of Python's language reference."""
    folder = tmp_path_factory.mktemp("preprocessing")
    corpus, path = folder / "corpus.jsonl", folder / "report.json"
    lines = [json.dumps({"text": text}) for text in pydoc_data.topics.topics.values()]
    corpus.write_text("\n".join(lines), encoding="utf-8")
    sizes = ["--megabytes", "0.4", "--slow-megabytes", "0.4", "--large-megabytes", "0", "--storage-megabytes", "4"]
    sizes += ["--vocab-size", "512", "--index-documents", "1000", "--repeats", "2", "--comparisons", "sentencepiece"]
    command = [sys.executable, "-m", "benchmarks.preprocessing", "--input", str(corpus), "--json", str(path), *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        command, check=True, capture_output=True, timeout=300, env=environment, cwd=ROOT, text=True
    )
    contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return contents | {"printed": printed.stdout}


def test_rows_and_what_is_left_out(report: dict[str, Any]) -> None:
    comparison = report["comparisons"]["sentencepiece"]
    assert list(comparison["rows"]) == [OURS, BARE]
    assert comparison["megabytes"]["smaller"] < 0.5 * comparison["megabytes"]["larger"]
    assert all(set(run) == {"smaller", "larger"} for row in comparison["rows"].values() for run in row["runs"])
    assert all(len(row["runs"]) == 2 for row in comparison["rows"].values())
    assert len(report["left_out"]) == 3
    assert all(reason in report["printed"] for reason in report["left_out"].values())


def test_goals_pair_repeats(report: dict[str, Any]) -> None:
    rows = report["comparisons"]["sentencepiece"]["rows"]
    (goal,) = report["goals"]
    seconds = [[run["larger"]["processor"] for run in rows[name]["runs"]] for name in (OURS, BARE)]
    assert goal["whole"] == pytest.approx([bare / own for own, bare in zip(*seconds, strict=True)])


def test_index_and_storage(report: dict[str, Any]) -> None:
    assert report["index"]["identical"]
    assert report["storage"]["write"] > 0
    assert report["storage"]["read"] > 0
    assert {row["row"] for row in report["pile"]} <= {OURS}
    # a rate of its own: noise may leave none of sizes that differ by a few milliseconds of work
    comparison = report["comparisons"]["sentencepiece"]
    fixed = {**comparison["rows"][OURS]["figures"], "processor_without_startup": [10.0, None]}
    rows = {**comparison["rows"], OURS: {**comparison["rows"][OURS], "figures": fixed}}
    (row,) = pile_rows({**report, "comparisons": {"sentencepiece": {**comparison, "rows": rows}}})
    megabytes_per_second = 825 * 2**30 / 1e6 / (row["hours"] * 3600)
    assert megabytes_per_second == pytest.approx(10.0 * 64)
    output_bytes = comparison["rows"][OURS]["output_bytes"]
    share = output_bytes / (comparison["megabytes"]["larger"] * 1e6)
    assert row["write"] == pytest.approx(megabytes_per_second * share)
