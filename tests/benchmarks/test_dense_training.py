"""The benchmark of dense training runs, and its report holds what it promises; how fast anything is, is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"dense", "DS-MoE", "Megatron-Core MoE"}
# the tiny size
LAYERS, HIDDEN, EXPERTS, UNITS_PER_EXPERT, ATTENTION_EXPERTS, TOKENS = 4, 64, 8, 128, 4, 512
# in float32, and in bf16: weight, float32 master copy (bf16 only), gradient, the two moments of AdamW
BYTES_PER_PARAMETER = (4 + 4 + 8, 2 + 4 + 4 + 8)
BYTES_PER_UNIT = (4, 2)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmark") / "report.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.dense_training",
        "--size",
        "tiny",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment, cwd=ROOT)
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
    of_memory = [(ratio["ratio"], ratio) for ratio in report["memory"][0]["ratios"].values()]

    for value, ratio in of_time + of_memory:
        bound, number = ratio["limit"].rsplit(maxsplit=1)
        met = {"at most": value <= float(number), "at least": value >= float(number)}[bound]
        assert ratio["met"] is met


def test_live_bytes_hold_the_training_state_and_the_activations(report: dict[str, Any]) -> None:
    # in front of and behind the activation function, in each layer
    kept_units = 2 * LAYERS * TOKENS * EXPERTS * UNITS_PER_EXPERT
    assert [row["name"] for row in report["memory"]] == ["training step", "training step, bf16"]
    for row, bytes_per_parameter, bytes_per_unit in zip(
        report["memory"], BYTES_PER_PARAMETER, BYTES_PER_UNIT, strict=True
    ):
        assert set(row["bytes"]) == MODELS
        for model, live in row["bytes"].items():
            # the batch and the buffers' padding come on top, and the routing that megatron-core's MoE layer remembers
            assert live["before"] == pytest.approx(row["parameters"][model] * bytes_per_parameter, rel=0.03)
            assert live["own_peak"] > kept_units * bytes_per_unit
            assert live["peak"] == live["before"] + live["own_peak"]


def test_models_differ_by_their_routers_alone(report: dict[str, Any]) -> None:
    parameters = report["memory"][0]["parameters"]

    assert parameters["Megatron-Core MoE"] - parameters["dense"] == LAYERS * EXPERTS * HIDDEN
    assert parameters["DS-MoE"] - parameters["dense"] == LAYERS * (EXPERTS + ATTENTION_EXPERTS) * HIDDEN
