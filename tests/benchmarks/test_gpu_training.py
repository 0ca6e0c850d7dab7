"""The benchmark on a GPU, on a model of two layers; without one it says so in a line."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_where_there_is_a_gpu(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--size", "tiny", "--recipes", "dense_1b", "--micro-batches", "1", "--steps", "2", "--json", str(report)]

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_training", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )

    if torch.cuda.is_available():
        assert done.returncode == 0, done.stderr
        (model,) = json.loads(report.read_text(encoding="utf-8"))["models"]
        assert len(model["seconds"]) == 2
        # what libraries keep for themselves and rounding up come on top of what is estimated
        assert 0.9 < model["peak_bytes"] / model["estimated_bytes"] < 1.2
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(
            "there is no CUDA device, and nothing else that this could measure"
        )
        assert not report.exists()
