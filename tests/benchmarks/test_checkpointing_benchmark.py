"""The benchmark of checkpoints runs, and its report holds what it promises; not how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_figure_is_reported_and_nothing_left(tmp_path: Path) -> None:
    path, scratch = tmp_path / "report.json", tmp_path / "scratch"
    scratch.mkdir()
    sizes = ("--megabytes", "1", "--width", "512", "--repeats", "1", "--folder", str(scratch))
    command = [sys.executable, "-m", "benchmarks.checkpointing", "--json", str(path), *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    printed = subprocess.run(
        command, check=True, capture_output=True, timeout=300, env=environment, cwd=ROOT, text=True
    ).stdout

    [turn] = json.loads(path.read_text(encoding="utf-8"))["turns"]
    for name in ("waiting", "beside"):
        assert turn[name]["stall"] > 0
        assert turn[name]["seconds"] > 0
        assert turn[name]["bytes"] > 10_000_000
    assert turn["beside"]["step"] > 0
    for name in ("load", "check", "plain write", "plain read"):
        assert turn[name]["seconds"] > 0
        assert f"{turn['waiting']['bytes'] / turn[name]['seconds'] / 1e9:.2f} GB/s" in printed
    assert list(scratch.iterdir()) == []
