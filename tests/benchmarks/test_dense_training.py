"""The benchmark of dense training runs, and its report holds what it promises; how fast anything is, is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "dense_training.py"
MODELS = {"dense", "DS-MoE", "Megatron-Core MoE"}
# the tiny size
LAYERS, HIDDEN, EXPERTS, UNITS_PER_EXPERT, ATTENTION_EXPERTS, TOKENS = 4, 64, 8, 128, 4, 64
# float32: weight, gradient, and two moments of AdamW
BYTES_PER_PARAMETER, BYTES_PER_ACTIVATION = 16, 4


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--repeats", "1", "--threads", "1", "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return contents


def test_layer_and_step_are_timed_for_every_model(report: dict[str, Any]) -> None:
    assert [row["name"] for row in report["time"][:2]] == ["MLP layer", "training step"]
    for row in report["time"]:
        assert set(row["median_seconds"]) == MODELS
        assert [(ratio["of"], ratio["to"]) for ratio in row["ratios"]] == [
            ("DS-MoE", "dense"),
            ("Megatron-Core MoE", "DS-MoE"),
        ]


def test_a_single_repeat_has_one_positive_ratio(report: dict[str, Any]) -> None:
    for row in report["time"]:
        for ratio in row["ratios"]:
            seconds = row["median_seconds"]
            expected = seconds[ratio["of"]] / seconds[ratio["to"]]
            assert expected > 0
            assert ratio["median"] == ratio["min"] == ratio["max"] == pytest.approx(expected)
            assert ratio["processor_time"] > 0


def test_verdicts_follow_from_ratios_and_limits(report: dict[str, Any]) -> None:
    of_time = [(ratio["median"], ratio) for row in report["time"][:2] for ratio in row["ratios"]]
    of_memory = [(ratio["ratio"], ratio) for row in report["memory"] for ratio in row["ratios"].values()]

    for value, ratio in of_time + of_memory:
        bound, number = ratio["limit"].rsplit(maxsplit=1)
        met = {"at most": value <= float(number), "at least": value >= float(number)}[bound]
        assert ratio["met"] is met


def test_live_bytes_hold_the_training_state_and_the_activations(report: dict[str, Any]) -> None:
    # in front of and behind the activation function, in each layer
    kept_units = 2 * LAYERS * TOKENS * EXPERTS * UNITS_PER_EXPERT
    (row,) = report["memory"]
    assert set(row["bytes"]) == MODELS
    for model, live in row["bytes"].items():
        # the batch, the rotary angles and the buffers' padding come on top
        assert live["before"] == pytest.approx(row["parameters"][model] * BYTES_PER_PARAMETER, rel=0.01)
        assert live["own_peak"] > kept_units * BYTES_PER_ACTIVATION
        assert live["peak"] == live["before"] + live["own_peak"]


def test_models_differ_by_their_routers_alone(report: dict[str, Any]) -> None:
    (row,) = report["memory"]
    parameters = row["parameters"]

    assert parameters["Megatron-Core MoE"] - parameters["dense"] == LAYERS * EXPERTS * HIDDEN
    assert parameters["DS-MoE"] - parameters["dense"] == LAYERS * (EXPERTS + ATTENTION_EXPERTS) * HIDDEN
