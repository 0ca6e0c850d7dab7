"""The benchmark of serving, on a model of one layer; how fast anything is, is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_report_compares_the_policies(tmp_path: Path) -> None:
    size = ["--layers=1", "--requests=2", "--input=8", "--output=2", "--repeats=2", "--threads=1"]
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.serving", *size, "--eager", "--activation=gelu", f"--json={path}"]

    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=400, env=os.environ, cwd=ROOT)

    models = json.loads(path.read_text())["models"]
    assert list(models) == ["dense", "topk", "threshold"]
    for name, row in models.items():
        assert len(row["seconds"]) == 2
        assert f"| {name} | {row['requests_per_s']:.3f} |" in done.stdout
    assert models["dense"]["over_dense"] == [1.0, 1.0]
    assert models["topk"]["shares"]["mlp"] == 8 / 32
    assert models["threshold"]["shares"]["mlp"] == pytest.approx(0.3, abs=0.1)  # of one layer
    # multiplications of a token in the layer, all experts over the active ones: attention 2 x 768 x (768 + 128) +
    # 2 x 768 x 9 positions, routers 768 x (32 + 6), experts 2 x 768 x 32 x 256
    rest, experts = 1_419_264, 12_582_912
    assert models["topk"]["limit"] == pytest.approx((rest + experts) / (rest + experts / 4), rel=1e-6)
