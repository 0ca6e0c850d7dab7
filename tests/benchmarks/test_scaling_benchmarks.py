"""The benchmarks of scaling, layouts, engines and attention run, and report what they promise; not how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import exponent

ROOT = Path(__file__).resolve().parents[2]


def report_of(module: str, path: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(path), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment, cwd=ROOT)
    contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return contents


def test_the_exponent_is_that_of_a_power_law() -> None:
    assert exponent([3 * size**1.7 for size in (1, 2, 4, 8)]) == pytest.approx(1.7)


def test_scaling(tmp_path: Path) -> None:
    report = report_of("scaling", tmp_path / "scaling.json", "--size", "tiny", "--repeats", "1", "--threads", "1")

    exponents = {row["dimension"]: row["operations_exponent"] for row in report["scaling"]}
    assert exponents["micro-batches"] == pytest.approx(1.0)
    assert 0.8 < exponents["layers"] < 1.0  # the output layer stays as it is
    assert exponents["sequence length"] > 1.0 > exponents["MLP experts"]
    assert 1.5 < exponents["width (hidden, heads' and experts' width)"] < 2.0
    assert all(len(row["seconds"]) == 3 for row in report["scaling"])
    assert all(0 < row["share"] < 1 for row in report["share"])


def test_layout_overhead(tmp_path: Path) -> None:
    report = report_of("layout_overhead", tmp_path / "layouts.json", "--size", "tiny", "--repeats", "1")

    assert report["layouts"]["DP2"]["ratios"] == [1.0]
    assert set(report["layouts"]) == {"DP2", "TP2", "TP2+SP", "EP2"}


@pytest.mark.usefixtures("with_deepspeed")
def test_engines(tmp_path: Path) -> None:
    engines = report_of("engines", tmp_path / "engines.json", "--size", "tiny", "--repeats", "1")["engines"]

    assert list(engines) == ["megatron", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-2, offload"]
    assert engines["megatron"]["ratios"] == [1.0]
    assert all(0 < row["bytes_between_steps"] < row["peak_bytes"] for row in engines.values())


def test_attention_memory(tmp_path: Path) -> None:
    lengths = ("--lengths", "[256, 512, 1024]", "--longest-written-out", "512", "--threads", "1")
    attention = report_of("attention", tmp_path / "attention.json", *lengths)["attention"]

    growth = {name: exponent([each["bytes"] for each in measured]) for name, measured in attention.items()}
    assert growth["ours"] < 1.3
    assert growth["ours, last quarter of the queries"] < 1.3
    assert growth["Megatron-Core DotProductAttention"] > 1.7
