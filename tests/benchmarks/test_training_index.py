"""The benchmark of training indices runs, and its report holds what it promises; not how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKENS, FILES = 400_000, 3


def test_training_index(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    sizes = ("--tokens", str(TOKENS), "--files", str(FILES), "--repeats", "1")
    command = [sys.executable, "-m", "benchmarks.training_index", "--json", str(path), *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=environment, cwd=ROOT)

    blends = json.loads(path.read_text(encoding="utf-8"))["blends"]

    assert [blend["files"] for blend in blends] == [1, FILES]
    for blend in blends:
        assert blend["samples"] == int(0.98 * TOKENS / 2048)
        assert blend["cache_bytes"] > blend["samples"] * (8 + 4)  # of each: where it starts, and its place in the order
        for action in ("build", "open"):
            ours, theirs = (blend[action]["median_seconds"][whose] for whose in ("ours", "Megatron-Core"))
            assert blend[action]["ratio"]["median"] == pytest.approx(ours / theirs)
            assert min(blend[action]["peak_bytes"].values()) >= 0
        build = blend["build"]
        assert build["met"] is (build["ratio"]["median"] <= build["limit"])
