"""Bad input of `evaluate`: one clear line, a code, and no file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from data_tools.preprocess import preprocess
from dsmoe_megatron.__main__ import main
from tests.evaluation.conftest import Export, TrainedRun
from tests.pretrain_job import SmallData


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that ends the verb."""
    capsys.readouterr()
    try:
        code: Any = main(["evaluate", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code not in (0, None)
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert lines[-1].startswith("dsmoe-megatron")
    assert "Traceback" not in printed.err
    return lines[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "9"], "num_experts_per_tok = 9: must be a whole number from 1 to the 5 experts"),
        (["--top-k", "0"], "num_experts_per_tok = 0: must be a whole number from 1 to"),
        (["--top-k", "2", "--attention-top-k", "4"], "attention_experts_per_tok = 4: must be a whole number from 1 to"),
        (["--attention-top-k", "1"], "--attention-top-k = 1: belongs to --top-k"),
        (["--attention-threshold", "1"], "--attention-threshold = 1.0: belongs to --thresholds"),
        (["--thresholds", "-1"], "expert_threshold = -1.0: must be a number, 0 or above"),
        (["--thresholds", "nan"], "expert_threshold = nan: must be a number, 0 or above"),
        (["--sequence-length", "33"], "--sequence-length = 33: must not be above max_position_embeddings, 32"),
        (["--sequence-length", "0"], "--sequence-length = 0: must be at least 1"),
        (["--stride", "0"], "--stride = 0: must be at least 1"),
        (["--sequence-length", "8", "--stride", "9"], "--stride = 9: must not be above the sequence length, 8"),
        (["--batch-size", "0"], "--batch-size = 0: must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens = 0: must be at least 1"),
        (["--policy-file", "/nowhere.json"], "--policy-file = '/nowhere.json': No such file"),
        (["--output", "/nowhere/result.json"], "--output = '/nowhere/result.json': its folder does not exist"),
        (["--output", "/"], "--output = '/': is a folder"),
        (["--target-share", "0.5"], "--calibrate = None: must be threshold or topk"),
        (["--calibrate", "topk"], "--calibrate = 'topk': needs --target-share or --target-perplexity-loss"),
        (["--calibrate", "threshold", "--target-share", "0.1"], "--target-share = 0.1: must be from 0."),
        (["--calibrate", "threshold", "--target-share", "1"], "one expert in each layer, to below 1"),
        (["--calibrate", "topk", "--target-perplexity-loss", "-0.1"], "--target-perplexity-loss = -0.1: must be above"),
        (["--calibrate", "topk", "--target-share", "0.5", "--top-k", "1"], "works on --data alone"),
        (["--calibrate", "topk", "--target-share", "0.9", "--max-tokens", "32"], "1 windows are too few"),
    ],
)
def test_options_that_break_a_rule(
    export: Export, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refusal(capsys, "--checkpoint", export.folder, "--data", export.data, *options)


def test_nothing_to_evaluate_on(export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data = None: give datasets" in refusal(capsys, "--checkpoint", export.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be an object of expert_policy"),
        ('{"expert_threshold": 1}', "must be an object of expert_policy"),
        ('{"expert_policy": "topk", "top_k": 3}', "has unknown keys top_k"),
        ('{"expert_policy": "best"}', "expert_policy = 'best': must be one of dense, topk"),
        ('{"expert_policy": "topk", "expert_policy_layers": 3}', "expert_policy_layers must be a list"),
        ('{"expert_policy": "topk", "expert_policy_layers": [{}]}', "must have one entry per layer, 2 in all"),
        (
            '{"expert_policy": "topk", "expert_policy_layers": [{"mlp": {"k": 6}}, {}]}',
            "expert_policy_layers[0].mlp.k = 6: must be a whole number from 1 to the 5 experts",
        ),
        (
            '{"expert_policy": "threshold", "expert_policy_layers": [{"mlp": {"k": 2}}, {}]}',
            'must be {"eps": value} under threshold',
        ),
    ],
)
def test_policy_files_that_do_not_fit(
    export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "policy.json").write_text(content)
    options = ("--policy-file", tmp_path / "policy.json")

    assert message in refusal(capsys, "--checkpoint", export.folder, "--data", export.data, *options)


def test_a_pointer_that_is_no_text(export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(b"step_000000\xb6\n")

    text = refusal(capsys, "--checkpoint", tmp_path, "--data", export.data)

    assert f"{tmp_path / 'latest'}: cannot be read" in text


def test_checkpoints_that_are_none(export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for folder in (tmp_path / "missing", tmp_path / "other"):
        text = refusal(capsys, "--checkpoint", folder, "--data", export.data)
        assert f"{folder}: neither a run folder with a checkpoint, nor a step folder, nor an export" in text
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    text = refusal(capsys, "--checkpoint", tmp_path / "other", "--data", export.data)
    assert "model_type 'gpt2' is not one of dsmoe, llama" in text


@pytest.mark.parametrize("damage", ["missing", "unknown", "misshapen", "not finite", "truncated", "pickle", "config"])
def test_damaged_exports(export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "export"
    shutil.copytree(export.folder, folder)
    weights = folder / "model.safetensors"
    tensors, name = load_file(weights), "model.layers.0.mlp.gate.weight"
    message = name
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors["model.layers.0.mlp.bias"] = tensors["model.norm.weight"].clone()
        message = "has unknown model.layers.0.mlp.bias"
    elif damage == "misshapen":
        tensors[name] = tensors[name][:3].clone()
    elif damage == "not finite":
        tensors[name][0, 0] = float("nan")
        message = f"{name} has values that are not finite"
    save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
        message = "cannot be loaded"
    elif damage == "pickle":
        weights.rename(folder / "pytorch_model.bin")
        message = "cannot be loaded"
    elif damage == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
        message = "num_attention_heads = 5: must be num_attention_experts x num_key_value_heads = 3 x 2"

    assert message in refusal(capsys, "--checkpoint", folder, "--data", export.data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        ("*.distcp", cut_short, "truncated: 2,000 bytes"),
        ("*.distcp", change_a_byte, "damaged: its checksum"),
        ("config.yaml", change_a_byte, "damaged: its checksum"),
        ("manifest.json", change_a_byte, "damaged: "),
        ("*.distcp", Path.unlink, "missing"),
    ],
)
def test_damaged_runs(
    trained_run: TrainedRun,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pattern: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_run.folder, folder)
    damaged = next((folder / "checkpoints").glob(f"*/{pattern}"))
    damage(damaged)

    assert f"{damaged}: {message}" in refusal(capsys, "--checkpoint", folder, "--data", trained_run.data)


def test_data_of_another_vocabulary(
    export: Export, trained_run: TrainedRun, small_data: SmallData, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refusal(capsys, "--checkpoint", export.folder, "--data", trained_run.data)
    assert f"{trained_run.data}: was made with tokenizer {small_data.tokenizer}" in text
    assert "500 tokens), not with that of the model (257 tokens)" in text

    text = refusal(capsys, "--checkpoint", trained_run.folder, "--data", export.data)
    assert f"{export.data}: was made with tokenizer {export.folder}" in text


def test_empty_and_missing_data(export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in {
        "empty.txt": "holds no text",
        "empty.jsonl": "holds no text",
        "broken.jsonl": "broken.jsonl:1",
        "binary.txt": "cannot be read as text",
        "missing.txt": "cannot be read as text",
        "missing": "",
    }.items():
        text = refusal(capsys, "--checkpoint", export.folder, "--data", tmp_path / name)
        assert name in text
        assert message in text


def test_truncated_data(export: Export, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    preprocess([str(export.text)], str(tmp_path / "data"), str(export.folder))
    tokens = tmp_path / "data.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])

    assert "truncated or damaged" in refusal(capsys, "--checkpoint", export.folder, "--data", tmp_path / "data")
    (tmp_path / "data.manifest.json").unlink()
    assert "no such file" in refusal(capsys, "--checkpoint", export.folder, "--data", tmp_path / "data")
