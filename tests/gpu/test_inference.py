"""A trained model on a GPU: the CPU's losses under every policy, and from its export the CPU's logits and tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.gpu.commands import command, pretrain
from tests.pretrain_job import SmallData, run_config

POLICIES: list[dict[str, Any]] = [
    {"expert_policy": "dense"},
    {"expert_policy": "topk", "num_experts_per_tok": 2, "attention_experts_per_tok": 2},
    {"expert_policy": "threshold", "expert_threshold": 1.0},
]


@pytest.fixture(scope="module")
def run_dir(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained long enough for the experts to differ."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    intervals = {"checkpoint": {"interval": 60}, "logging": {"interval": 60}}
    pretrain("cpu", run_config(small_data, folder, train={"steps": 60}, **intervals))
    return folder


def test_losses_under_every_policy(run_dir: Path, small_data: SmallData, tmp_path: Path) -> None:
    results = {}
    for device in ("gpu", "cpu"):
        output = tmp_path / f"{device}.json"
        options = ["--max-tokens", 2000, "--top-k", 1, 2, "--thresholds", 0.5, 1.0, "--threshold-top-k", 0.5]
        words = ["evaluate", "--checkpoint", run_dir, "--data", small_data.validation, *options, "--output", output]
        command(device, "-m", "dsmoe_megatron", *words)
        results[device] = json.loads(output.read_text(encoding="utf-8"))["policies"]

    assert list(results["gpu"]) == list(results["cpu"])
    for name, expected in results["cpu"].items():
        found = results["gpu"][name]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        # a score beside the threshold may fall on either side of it
        assert found["active_share"] == pytest.approx(expected["active_share"], abs=2e-3), name


def test_an_export_gives_the_logits_and_tokens_of_a_cpu(run_dir: Path, tmp_path: Path) -> None:
    command("cpu", "checkpoints_tools/export_hf.py", "--checkpoint", run_dir, "--output", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True).eval()
    ids = torch.randint(500, (2, 20), generator=torch.Generator().manual_seed(1))
    for policy in POLICIES:
        found = {}
        for device in ("cpu", "cuda"):
            model.to(device).set_policy(**policy)
            with torch.no_grad():
                logits = model(ids.to(device)).logits.cpu()
                tokens = model.generate(ids.to(device), max_new_tokens=12, do_sample=False).cpu()
            found[device] = logits, tokens
        torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-3, atol=1e-3)
        assert torch.equal(found["cuda"][1], found["cpu"][1]), policy
