"""The benchmark of the export runs, and its report holds what it promises; not how fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.export import make_checkpoint, model_of
from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint
from dsmoe_megatron.planning.parameters import count_parameters

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_is_reported_and_nothing_left(tmp_path: Path) -> None:
    path, scratch = tmp_path / "report.json", tmp_path / "scratch"
    scratch.mkdir()
    sizes = ("--gigabytes", "0.001", "--hidden-size", "64", "--repeats", "1", "--folder", str(scratch))
    command = [sys.executable, "-m", "benchmarks.export", "--json", str(path), *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    printed = subprocess.run(
        command, check=True, capture_output=True, timeout=300, env=environment, cwd=ROOT, text=True
    ).stdout

    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    pairs = [(case["saved"], case["exported"]) for case in cases]
    assert pairs == [("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16")]
    for case in cases:
        (own,), (copy,) = case["seconds"]["export"], case["seconds"]["cp"]
        assert case["ratio"] == pytest.approx(copy / own)
        assert case["process"]["peak_bytes"] > case["bytes"] == case["largest_shard"] > 0
        assert f"| {case['saved']} -> {case['exported']} |" in printed
    assert list(scratch.iterdir()) == []


def test_the_made_up_checkpoint_is_as_large_as_asked_for(tmp_path: Path) -> None:
    large = model_of(3.0, 2048, torch.bfloat16)
    model = model_of(0.001, 64, torch.bfloat16)

    make_checkpoint(tmp_path / "step", model, "bf16")

    assert (count_parameters(large).total or 0) * 2 == pytest.approx(3e9, rel=0.02)
    weight = DistributedCheckpoint(tmp_path / "step").read("decoder.layers.mlp.linear_fc1.weight", 0)
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().std()) == pytest.approx(0.02, rel=0.05)
