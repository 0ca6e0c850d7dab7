"""Perplexity and active experts against the training loop, and against the equations in float64."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from checkpoints_tools.export_formats import Format
from checkpoints_tools.export_hf import export as export_run
from dsmoe_megatron.__main__ import main
from dsmoe_megatron.config import Config, DatasetSource, PolicyConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.evaluation.loading import load_model
from dsmoe_megatron.evaluation.windows import windows_of
from dsmoe_megatron.inference.policy import ExpertPolicy
from tests import reference_model as reference
from tests.evaluation.conftest import ARCHITECTURE, Export, TrainedRun
from tests.pretrain_job import SmallData, pretrain_job, read_lines, run_config
from tests.worker_pool import WorkerPool


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The result of the verb, as a program reads it."""
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_equals_the_validation_of_the_training_loop(
    trained_run: TrainedRun, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    expected = next(line for line in read_lines(trained_run.folder) if "validation_loss" in line)
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"expert_policy": "topk", "num_experts_per_tok": 3, "attention_experts_per_tok": 2}))
    options = ["--top-k", 2, "--thresholds", 1.0, "--policy-file", file]

    result = evaluate(capsys, "--checkpoint", trained_run.folder, "--data", trained_run.data, *options)
    mixed = ["--thresholds", 0.7, "--attention-threshold", 0.5]
    second = evaluate(capsys, "--checkpoint", trained_run.folder, "--data", trained_run.data, *mixed)

    found = {**result["policies"], **second["policies"]}
    found["topk 3/2"] = found.pop(str(file))
    assert set(found) == set(expected["policies"])
    for name, figures in expected["policies"].items():
        assert found[name]["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-5)
        assert found[name]["active_share"] == pytest.approx(figures["active_share"], rel=1e-5)
        assert found[name]["scored_tokens"] == 64 * 32
    assert found["dense"]["loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
    # the experts have become different enough for the policies to matter
    assert found["topk 2"]["perplexity"] > 1.001 * found["dense"]["perplexity"]
    assert result["step"] == 60


def test_equals_the_equations_under_every_policy(
    export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    layers = [{"mlp": {"eps": 0.5}, "attention": {"eps": 1.1}}, {"mlp": {"eps": 1.3}, "attention": {"eps": 0.2}}]
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"expert_policy": "threshold", "expert_policy_layers": layers}))
    sweep = ["--top-k", 1, 3, "--attention-top-k", 2, "--thresholds", 0.8, 1.0, "--threshold-top-k", 0.9]
    policies: dict[str, dict[str, Any]] = {
        "dense": {},
        "topk 1/2": {"expert_policy": "topk", "num_experts_per_tok": 1, "attention_experts_per_tok": 2},
        "topk 3/2": {"expert_policy": "topk", "num_experts_per_tok": 3, "attention_experts_per_tok": 2},
        "threshold 0.8": {"expert_policy": "threshold", "expert_threshold": 0.8},
        "threshold 1.0": {"expert_policy": "threshold", "expert_threshold": 1.0},
        "threshold_topk 0.9": {"expert_policy": "threshold_topk", "expert_threshold": 0.9},
        str(file): {"expert_policy": "threshold", "expert_policy_layers": layers},
    }
    windows = ["--sequence-length", 20, "--stride", 11, "--batch-size", 2]

    result = evaluate(
        capsys, "--checkpoint", export.folder, "--data", export.data, *sweep, "--policy-file", file, *windows
    )

    assert list(result["policies"]) == list(policies)
    for name, fields in policies.items():
        assert_as_by_the_equations(export, result["policies"][name], reference.ReferencePolicy(**fields))


def assert_as_by_the_equations(export: Export, figures: dict[str, Any], policy: reference.ReferencePolicy) -> None:
    """Windows of 20 tokens every 11, two together; the shorter last one alone."""
    windows = windows_of(len(export.ids), 20, 11)
    whole = [window for window in windows if window.length == 20]
    groups = [whole[start : start + 2] for start in range(0, len(whole), 2)] + [windows[len(whole) :]]
    assert len(groups[-1]) == 1
    losses = []
    active: dict[tuple[int, str], list[torch.Tensor]] = {}
    for group in groups:
        rows = torch.stack([export.ids[window.start : window.start + window.length + 1] for window in group])
        output = reference.reference_forward(ARCHITECTURE, export.tensors, rows[:, :-1], policy)
        for row, window in enumerate(group):
            kept = slice(window.length - window.scored, None)
            losses.append(F.cross_entropy(output.logits[row, kept], rows[row, 1:][kept], reduction="none"))
        for router, chosen in output.active.items():
            active.setdefault(router, []).append(chosen.flatten(0, 1))
    loss = float(torch.cat(losses).mean())
    counts = {router: torch.cat(parts).sum(dim=-1) for router, parts in active.items()}

    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert figures["scored_tokens"] == len(export.ids) - 1
    for router in figures["routers"]:
        count = counts[router["layer"], router["kind"]]
        assert router["active_experts"] == pytest.approx(float(count.double().mean()))
        histogram = torch.bincount(count, minlength=len(router["share"]) + 1) / len(count)
        assert router["tokens_by_active_experts"] == pytest.approx(histogram.tolist())
    assert figures["active_parameters"] == pytest.approx(active_parameters(counts), rel=1e-9)
    total = sum(
        tensor.numel() for name, tensor in export.tensors.items() if "embed" not in name and "lm_head" not in name
    )
    assert figures["active_share"] == pytest.approx(active_parameters(counts) / total, rel=1e-9)


def active_parameters(counts: dict[tuple[int, str], torch.Tensor]) -> float:
    """Counted by hand: what every token uses, and the mean number of experts of each layer."""
    model = ARCHITECTURE
    hidden, width = model.hidden_size, model.num_key_value_heads * model.head_dim
    always = hidden  # the last norm
    experts = 0.0
    for layer in range(model.num_hidden_layers):
        always += 2 * hidden + 2 * hidden * width + hidden * (model.num_experts + model.num_attention_experts)
        experts += 2 * hidden * model.moe_intermediate_size * float(counts[layer, "mlp"].double().mean())
        experts += 2 * hidden * width * float(counts[layer, "attention"].double().mean())
    return always + experts


@pytest.fixture(scope="module")
def sparse_trained_run(
    worker_pool: WorkerPool,
    small_data: SmallData,
    trained_run: TrainedRun,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Of an architecture that Qwen2-MoE has too; its last line of metrics is the validation's."""
    folder = tmp_path_factory.mktemp("sparse") / "run"
    config = sparse_training(small_data, folder, trained_run, attention_type="gqa")
    worker_pool.run(1, pretrain_job, config)
    return folder


def sparse_training(small_data: SmallData, folder: Path, trained_run: TrainedRun, attention_type: str) -> Config:
    return run_config(
        small_data,
        folder,
        model={
            **{"attention_type": attention_type, "num_experts": 6, "expert_training": "sparse"},
            **{"num_experts_per_tok": 2, "head_dim": 8, "hidden_act": "silu", "gated_mlp": True},
        },
        data={"validation": [DatasetSource(trained_run.data)]},
        evaluation={"policies": [PolicyConfig(expert_policy="threshold")], "batches": 8},  # not for such models
    )


def check_evaluated_as_trained(run: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = next(line for line in read_lines(run) if "validation_loss" in line)

    result = evaluate(capsys, "--checkpoint", run, "--data", data)

    assert list(result["policies"]) == ["topk 2"] == list(expected["policies"])
    for name, value in expected["policies"]["topk 2"].items():
        assert result["policies"]["topk 2"][name] == pytest.approx(value, rel=1e-5)


def test_a_sparse_trained_baseline_is_evaluated_as_it_was_trained(
    sparse_trained_run: Path, capsys: pytest.CaptureFixture[str], trained_run: TrainedRun
) -> None:
    check_evaluated_as_trained(sparse_trained_run, trained_run.data, capsys)

    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint", str(sparse_trained_run), "--data", trained_run.data, "--thresholds", "1"])
    assert "a sparse-trained model chooses experts as it was trained, by topk" in capsys.readouterr().err


def test_a_sparse_trained_baseline_with_attention_experts_is_too(
    worker_pool: WorkerPool,
    small_data: SmallData,
    trained_run: TrainedRun,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    worker_pool.run(1, pretrain_job, sparse_training(small_data, tmp_path / "run", trained_run, attention_type="moa"))

    check_evaluated_as_trained(tmp_path / "run", trained_run.data, capsys)


def test_a_sparse_trained_baseline_takes_other_numbers_of_experts(
    worker_pool: WorkerPool,
    sparse_trained_run: Path,
    trained_run: TrainedRun,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """As megatron-core's own layer does: validation in the loop, after one more step that moves nothing."""
    config = load_config(sparse_trained_run / "config.yaml")
    config.train.run_dir, config.checkpoint.load = str(tmp_path / "run"), str(sparse_trained_run)
    config.train.steps += 1
    config.optimizer.lr = config.optimizer.min_lr = 1e-30
    config.model.num_experts_per_tok = 4
    worker_pool.run(1, pretrain_job, config)
    expected = next(line for line in read_lines(tmp_path / "run") if "validation_loss" in line)["policies"]["topk 4"]

    result = evaluate(capsys, "--checkpoint", sparse_trained_run, "--data", trained_run.data, "--top-k", 1, 4)

    assert list(result["policies"]) == ["topk 2", "topk 1", "topk 4"]
    for name, value in expected.items():
        assert result["policies"]["topk 4"][name] == pytest.approx(value, rel=1e-5)
    assert result["policies"]["topk 1"]["loss"] != pytest.approx(result["policies"]["topk 2"]["loss"], rel=1e-4)


@pytest.mark.parametrize("form", ["auto", "qwen2_moe"])
def test_an_export_of_a_sparse_trained_baseline_is_evaluated_as_the_run_is(
    sparse_trained_run: Path, small_data: SmallData, capsys: pytest.CaptureFixture[str], tmp_path: Path, form: Format
) -> None:
    policy = {"expert_policy": "topk", "num_experts_per_tok": 3}  # other than it was trained with
    export_run(sparse_trained_run, tmp_path / "export", policy, wanted_format=form)
    data = ["--data", small_data.validation, "--max-tokens", 2000, "--sequence-length", 32]

    result = evaluate(capsys, "--checkpoint", tmp_path / "export", *data)

    expected = evaluate(capsys, "--checkpoint", sparse_trained_run, *data, "--top-k", 3)
    assert list(result["policies"]) == ["topk 2", "topk 3"] == list(expected["policies"])
    for policy_name, figures in expected["policies"].items():
        for name in ("loss", "perplexity", "active_share", "scored_tokens"):
            assert result["policies"][policy_name][name] == pytest.approx(figures[name], rel=1e-5)
    arguments = [str(word) for word in ("--checkpoint", tmp_path / "export", *data, "--thresholds", 1)]
    with pytest.raises(SystemExit):
        main(["evaluate", *arguments])
    assert "a sparse-trained model chooses experts as it was trained, by topk" in capsys.readouterr().err


def test_bf16_stays_near_float32(export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--checkpoint", export.folder, "--data", export.data)

    exact, rounded = (evaluate(capsys, *arguments, "--dtype", dtype)["policies"] for dtype in ("fp32", "bf16"))

    assert exact["dense"]["loss"] != rounded["dense"]["loss"]
    assert rounded["dense"]["loss"] == pytest.approx(exact["dense"]["loss"], rel=0.02)


def test_a_policy_leaves_nothing_behind_for_the_next(export: Export) -> None:
    """What a policy does not name is all experts, not what the policy before it named."""
    loaded = load_model(export.folder)
    ids = export.ids[None, :30]
    loaded.set_policy(ExpertPolicy("topk", num_experts_per_tok=3))
    expected = loaded.model(ids).logits

    loaded.set_policy(ExpertPolicy("topk", num_experts_per_tok=1, attention_experts_per_tok=1))
    loaded.set_policy(ExpertPolicy("topk", num_experts_per_tok=3))

    assert torch.equal(loaded.model(ids).logits, expected)
