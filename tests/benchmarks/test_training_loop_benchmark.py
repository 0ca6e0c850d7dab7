"""The benchmark of the training loop runs, and its report holds what it promises; not how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_training_loop(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.training_loop", "--json", str(tmp_path / "loop.json")]
    command += ["--size", "tiny", "--steps", "4", "--starts", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment, cwd=ROOT)

    report = json.loads((tmp_path / "loop.json").read_text())
    assert {"import of torch", "process groups", "model", "sample indices", "first step"} <= set(report["start"])
    assert all(seconds[0] >= 0 for seconds in report["start"].values())
    for kind in ("unlogged", "logged"):
        assert report[kind]["engine_seconds"] > 0
        assert report[kind]["beside_seconds"] > 0
