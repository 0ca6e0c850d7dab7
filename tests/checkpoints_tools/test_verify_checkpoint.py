"""Verification of exports and checkpoints: agreement where there is one, and a line that names what is wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_tools.export_hf import export
from checkpoints_tools.verify import main
from tests.checkpoints_tools.conftest import Run
from tests.made_up_runs import ARCHITECTURE, LLAMA, QWEN, VOCABULARY, make_run
from tests.training_jobs import checkpoint_job, tiny_config
from tests.worker_pool import WorkerPool

GATED = {"hidden_act": "silu", "gated_mlp": True, "attention_type": "gqa", "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "moa": {"router_type": "mlp", "attention_experts_per_tok": 3},
    "gated": {**GATED, "expert_policy": "topk", "num_experts_per_tok": 2},
    "sparse-trained": {**GATED, "expert_training": "sparse", "num_experts_per_tok": 2},
    "sparse-trained, moa": {"expert_training": "sparse", "num_experts_per_tok": 2},
    "llama": {**GATED, "num_experts": 1, "moe_intermediate_size": 96},
}


@dataclass
class Trained:
    """Run folders by name of their model, saved by megatron-core."""

    pool: WorkerPool
    folder: Path
    tokenizer: Path

    def run(self, model: str, name: str = "run", load: Path | None = None, steps: int = 1, **parallel: Any) -> Path:
        folder = self.folder / model / name
        if not folder.exists():
            folder.mkdir(parents=True)
            values = {"vocab_size": VOCABULARY, **MODELS[model]}
            config = tiny_config(values, parallel, {"tokenizer": str(self.tokenizer)}, run_dir=str(folder))
            self.pool.run(parallel.get("tensor", 1), checkpoint_job, config, steps, load)
        return folder


@pytest.fixture(scope="module")
def trained(worker_pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Trained:
    return Trained(worker_pool, tmp_path_factory.mktemp("trained"), tokenizer_folder)


@dataclass
class Verdict:
    code: int
    output: list[str]
    errors: list[str]


Verify = Callable[..., Verdict]


@pytest.fixture
def verify(command: Run) -> Verify:
    """The command and its findings."""

    def run(*arguments: object) -> Verdict:
        code, output, said = command(main, *arguments)
        errors = [line for line in said.splitlines() if line.startswith("verify: error: ")]
        return Verdict(code, output.splitlines(), errors)

    return run


def policies(verdict: Verdict) -> list[str]:
    return [line[:28].strip() for line in verdict.output[2:-1]]


@pytest.mark.parametrize(
    ("model", "wanted", "dtype", "expected"),
    [
        ("moa", "auto", torch.float32, ["threshold 0.48", "dense", "topk 2/4", "topk 2/2"]),
        ("moa", "auto", torch.bfloat16, ["threshold 0.48", "dense", "topk 2/4", "topk 2/2"]),
        ("gated", "auto", torch.float32, ["topk 2", "dense", "threshold 0.48"]),
        ("gated", "qwen2_moe", torch.float32, ["topk 2"]),
        ("sparse-trained", "auto", torch.float32, ["topk 2"]),
        ("sparse-trained, moa", "auto", torch.float32, ["topk 2"]),
        ("llama", "auto", torch.float32, ["dense"]),
    ],
)
def test_an_export_computes_what_was_trained(
    trained: Trained, verify: Verify, tmp_path: Path, model: str, wanted: Any, dtype: torch.dtype, expected: list[str]
) -> None:
    run = trained.run(model)
    export(run, tmp_path / "export", dtype=dtype, wanted_format=wanted)

    verdict = verify("--checkpoint", run, "--hf", tmp_path / "export")

    assert (verdict.code, verdict.errors) == (0, [])
    assert policies(verdict) == expected
    assert "computes what" in verdict.output[-1]


def swap_experts(tensors: dict[str, Tensor]) -> None:
    weight = tensors["model.layers.2.mlp.experts.down_proj"]
    weight[[0, 1]] = weight[[1, 0]]


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (swap_experts, {}),
        (lambda tensors: tensors["model.layers.1.self_attn.k_proj.weight"].mul_(1.01), {}),
        (lambda _: None, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
        (lambda _: None, {"rms_norm_eps": 1e-2}),
    ],
    ids=["experts in another order", "keys 1 % too large", "other rotation", "other epsilon"],
)
def test_an_export_that_computes_something_else_is_told(
    trained: Trained, verify: Verify, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], values: dict[str, Any]
) -> None:
    run, folder = trained.run("moa"), tmp_path / "export"
    export(run, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, **values)

    verdict = verify("--checkpoint", run, "--hf", folder)

    assert verdict.code == 1
    assert len(verdict.errors) == 1
    assert "policy threshold 0.48: logits differ by up to" in verdict.errors[0]


def test_a_damaged_checkpoint_is_told_even_where_the_export_was_made_of_it(
    trained: Trained, verify: Verify, tmp_path: Path
) -> None:
    run, copy = trained.run("moa"), tmp_path / "run"
    export(run, tmp_path / "export")
    shutil.copytree(run, copy)
    shard = next((copy / "checkpoints").glob("*/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 64  # behind the last value
    shard.write_bytes(content)

    verdict = verify("--checkpoint", copy, "--hf", tmp_path / "export")

    assert verdict.code == 1
    assert len(verdict.errors) == 1
    assert f"{shard}: damaged: its checksum is not the manifest's" in verdict.errors[0]


def test_another_vocabulary_is_told(trained: Trained, verify: Verify, tokenizer_folder: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    export(other.folder, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:200].clone()
    save_file(tensors, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path / "export", vocab_size=200)

    verdict = verify("--checkpoint", trained.run("moa"), "--hf", tmp_path / "export")

    assert verdict.code == 1
    assert "has a vocabulary of 200" in verdict.errors[0]


def test_checkpoints_of_two_layouts_are_equal_bit_by_bit(trained: Trained, verify: Verify) -> None:
    run = trained.run("moa")
    split = trained.run("moa", "split", load=run / "checkpoints" / "step_00000007", steps=0, tensor=2)

    verdict = verify("--checkpoint", run, "--other", split)

    assert (verdict.code, verdict.errors) == (0, [])
    # weights, float32 master copies and two moments, of 17 tensors
    assert "tensors, bit by bit" in verdict.output[-1]
    count = int(verdict.output[-1].split(" tensors")[0].split()[-1])
    assert count > 3 * 15


def test_checkpoints_that_differ_are_told_tensor_by_tensor(trained: Trained, verify: Verify) -> None:
    run = trained.run("moa")
    further = trained.run("moa", "further", load=run / "checkpoints" / "step_00000007", steps=1)

    verdict = verify("--checkpoint", run, "--other", further)
    other_model = verify("--checkpoint", run, "--other", trained.run("gated"))

    assert verdict.code == 1
    assert len(verdict.errors) == 1
    assert any(": decoder.layers.mlp.linear_fc1.weight: differs in" in line for line in verdict.output)
    assert any(": optimizer.state.exp_avg." in line for line in verdict.output)
    assert other_model.code == 1
    assert any("decoder.layers.self_attention.router.fc1.weight: is missing" in line for line in other_model.output)
    assert any("linear_fc1.weight: has shape" in line for line in other_model.output)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """In the first file that has a layer's tensors."""
    path = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    run = make_run(folder / "run", tokenizer_folder, ARCHITECTURE)
    export(run.folder, folder / "export", max_shard_bytes=20_000)
    return folder / "export"


NORM = "model.layers.0.post_attention_layernorm.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "tensor removed": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(NORM)),
        [f"{NORM}: is not there, but model.safetensors.index.json places it there", "total_size = ", "is missing"],
    ),
    "tensor too many": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update(spare=torch.zeros(2))),
        ["spare: is there, but model.safetensors.index.json does not name it", "total_size", "spare: is not a tensor"],
    ),
    "another shape": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(8, 2)})),
        [f"{NORM}: has shape (8, 2), but config.json makes it (16,)"],
    ),
    "another type": (
        lambda folder: edit_config(folder, dtype="bfloat16"),
        ["is torch.float32, but config.json says torch.bfloat16"],
    ),
    "NaN": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors[NORM][3:5].fill_(float("nan"))),
        [f"{NORM}: has 2 values that are NaN or infinite"],
    ),
    "configuration of more experts": (
        lambda folder: edit_config(folder, num_experts=6),
        ["mlp.experts.up_proj: has shape (5, 8, 16), but config.json makes it (6, 8, 16)"],
    ),
    "configuration of more layers": (
        lambda folder: edit_config(folder, num_hidden_layers=3),
        ["model.layers.2.mlp.gate.weight: is missing, though config.json asks for it"],
    ),
    "configuration that breaks a rule": (
        lambda folder: edit_config(folder, num_experts_per_tok=9),
        ["config.json: num_experts_per_tok = 9: must be a whole number from 1 to the 5 experts"],
    ),
    "another architecture": (
        lambda folder: edit_config(folder, model_type="mixtral"),
        ["config.json: model_type = 'mixtral': none of dsmoe, llama, qwen2_moe"],
    ),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), ["config.json: cannot be read"]),
    "index of another file": (
        lambda folder: edit_index(folder, lambda index: index["weight_map"].update({NORM: "other.safetensors"})),
        ["names other.safetensors, which is not there", f"{NORM}: is there, but model.safetensors.index.json places"],
    ),
    "index that is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        ["index.json: not the index of safetensors files"],
    ),
    "no index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        ["but neither model.safetensors alone nor model.safetensors.index.json"],
    ),
    "file cut short": (
        lambda folder: cut_short(sorted(folder.glob("*.safetensors"))[1]),
        ["model-00002-of-", "cannot be read, damaged or cut short"],
    ),
    "file missing": (
        lambda folder: sorted(folder.glob("*.safetensors"))[1].unlink(),
        ["which is not there", "is missing, though config.json asks for it"],
    ),
    "code missing": (
        lambda folder: (folder / "modeling_dsmoe.py").unlink(),
        ["config.json: names modeling_dsmoe, but modeling_dsmoe.py is not there"],
    ),
    "imported code missing": (
        lambda folder: (folder / "policy.py").unlink(),
        ["configuration_dsmoe.py: names policy, but policy.py is not there"],
    ),
    "a part of the tokenizer missing": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["has tokenizer_config.json, but not tokenizer.json"],
    ),
}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_of_an_export_is_a_line(sound: Path, verify: Verify, tmp_path: Path, name: str) -> None:
    damage, expected = FAULTS[name]
    folder = tmp_path / "export"
    shutil.copytree(sound, folder)
    damage(folder)

    verdict = verify("--hf", folder)

    assert verdict.code == 1
    assert len(verdict.errors) == 1
    found = "\n".join(verdict.output)
    assert [line for line in expected if line not in found] == []


def test_whole_exports_of_every_architecture_pass(
    sound: Path, verify: Verify, tmp_path: Path, tokenizer_folder: Path
) -> None:
    folders = [sound]
    options = {"expert_policy": "topk", "num_experts_per_tok": 2}
    for name, architecture in (("llama", LLAMA), ("qwen2_moe", QWEN)):
        run = make_run(tmp_path / name, tokenizer_folder, architecture)
        wanted: Any = "auto" if name == "llama" else name
        export(run.folder, run.folder / "export", options if name != "llama" else {}, wanted_format=wanted)
        folders.append(run.folder / "export")

    for folder in folders:
        verdict = verify("--hf", folder)
        assert (verdict.code, verdict.output) == (0, [f"{folder}: whole"])


def test_the_command_says_what_goes_together(verify: Verify, sound: Path, tmp_path: Path) -> None:
    for arguments in ([], ["--checkpoint", "a", "--other", "b", "--hf", "c"], ["--other", "b"]):
        assert verify(*arguments).code == 2
    assert "neither a run folder" in verify("--checkpoint", tmp_path, "--hf", sound).errors[0]
