"""Export: a distributed checkpoint in pieces becomes a folder that transformers loads, with the reference's logits."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint
from checkpoints_tools.export_hf import export, main
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.inference.policy import ExpertPolicy
from tests.made_up_runs import ARCHITECTURE, GQA, LLAMA, QWEN, Run, make_run, token_ids
from tests.reference_model import ReferenceConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), tokenizer_folder, ARCHITECTURE)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_a_fresh_process_loads_the_export_and_agrees_with_the_reference(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "export"
    export(run.folder, output)
    script = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("dsmoe_megatron", "checkpoints_tools", "megatron"):
            raise ImportError("not installed here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = {str(output)!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids, logits = torch.tensor({token_ids().tolist()}), {{}}
logits["default"] = model(ids).logits.detach()
for policy in ("dense", "topk", "threshold"):
    model.set_policy(policy)
    logits[policy] = model(ids).logits.detach()
    model.generate(**tokenizer(["ab", "c"], padding=True, return_tensors="pt"), max_new_tokens=5)
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}

    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path, timeout=120)

    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    ids, limits = token_ids(), {"num_experts_per_tok": 2, "expert_threshold": 0.48}
    for policy in ("dense", "topk", "threshold"):
        torch.testing.assert_close(logits[policy], run.logits(ids, policy, **limits), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits["default"], logits["threshold"])  # the recipe's default policy


def test_every_tensor_is_written_once_in_small_shards(run: Run, tmp_path: Path) -> None:
    export(run.step_folder, tmp_path / "export", max_shard_bytes=20_000)

    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    written = [(file.name, name, tensor) for file in files for name, tensor in load_file(file).items()]
    assert len(files) > 2
    assert {name: file for file, name, _ in written} == index["weight_map"]
    assert sorted(name for _, name, _ in written) == sorted(run.tensors)
    assert all(torch.equal(tensor, run.tensors[name]) for _, name, tensor in written)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in run.tensors.values())
    # the embedding is larger than a shard and stands alone
    assert all(file.stat().st_size < 25_000 for file in files)
    assert {file.stat().st_mode for file in files} == {(tmp_path / "export" / "config.json").stat().st_mode}


def test_configuration_tokenizer_and_card_tell_of_the_run(run: Run, tmp_path: Path) -> None:
    options = {"expert_policy": "topk", "num_experts_per_tok": 3, "attention_experts_per_tok": 1}
    export(run.folder, tmp_path / "export", options, dtype=torch.bfloat16)

    config = json.loads((tmp_path / "export" / "config.json").read_text())
    card = (tmp_path / "export" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["architectures"] == ["DSMoEForCausalLM"]
    assert config["vocab_size"] == 257
    assert {name: config[name] for name in options} == options
    assert config["norm_topk_prob"] is False
    for ends in (config, generation):
        assert ends["bos_token_id"] == ends["eos_token_id"] == 256
    assert (
        tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == generation["pad_token_id"] == 256
    )
    assert config.get("pad_token_id") is None  # else fine-tuning would leave out the embedding of the end of document
    assert load(tmp_path / "export").dtype == torch.bfloat16
    for fact in (
        "| Steps | 7 |",
        "| Tokens | 1,792 |",
        "| Loss | 2.3457 |",
        "| topk | 12.346 | 51.2 % |",
        "| threshold | not finite | 25.0 % |",
        "num_experts: 5",
    ):
        assert fact in card


@pytest.mark.parametrize("padding", [None, "\u00ff"])  # how a byte is written that no text has
@pytest.mark.parametrize("architecture", [ARCHITECTURE, LLAMA], ids=["dsmoe", "llama"])
def test_a_batch_of_prompts_is_continued_as_each_alone(
    tmp_path: Path, tokenizer_folder: Path, architecture: Any, padding: str | None
) -> None:
    original = AutoTokenizer.from_pretrained(tokenizer_folder, pad_token=padding)
    original.save_pretrained(tmp_path / "tokenizer")
    run = make_run(tmp_path / "run", tmp_path / "tokenizer", architecture)
    export(run.folder, tmp_path / "export")
    model, tokenizer = load(tmp_path / "export"), AutoTokenizer.from_pretrained(tmp_path / "export")
    prompts = ["ab", "def main(x):", "import"]
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

    batch = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), **length)

    alone = [model.generate(**tokenizer(prompt, return_tensors="pt"), **length)[0] for prompt in prompts]
    assert batch[:, -8:].tolist() == [ids[-8:].tolist() for ids in alone]
    own = original.pad_token_id
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (own, own or original.eos_token_id)


def test_the_card_counts_limits_per_layer(run: Run, tmp_path: Path) -> None:
    layers = [{"mlp": {"k": 1}, "attention": {"k": 3}}, {"mlp": {"k": 4}}]
    scalars = {"expert_policy": "topk", "num_experts_per_tok": 2}
    counts = []
    for name, policy in (("uniform", scalars), ("layers", ExpertPolicy("topk", expert_policy_layers=layers))):
        export(run.folder, tmp_path / name, policy)
        row = re.search(
            r"Active per token under the default policy \| ([\d,]+)", (tmp_path / name / "README.md").read_text()
        )
        assert row is not None
        counts.append(int(row[1].replace(",", "")))

    # an MLP expert more than two in each layer, an attention expert less than all of two layers
    hidden, units, width = ARCHITECTURE.hidden_size, ARCHITECTURE.moe_intermediate_size, ARCHITECTURE.head_dim
    heads = ARCHITECTURE.num_key_value_heads
    missing = ARCHITECTURE.num_attention_experts - 3
    assert counts[1] - counts[0] == (1 + 4 - 2 - 2) * 2 * hidden * units - missing * 2 * hidden * heads * width


@pytest.mark.parametrize("architecture", [GQA, ARCHITECTURE], ids=["gqa", "moa"])
def test_sparse_trained_baseline_is_exported_with_topk(
    tmp_path: Path, tokenizer_folder: Path, architecture: ReferenceConfig
) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, architecture, expert_training="sparse", num_experts_per_tok=2)

    export(run.folder, tmp_path / "export")

    model = load(tmp_path / "export")
    expected = run.logits(token_ids(), "topk", num_experts_per_tok=2)
    torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigurationError, match="expert_policy = 'dense': a sparse-trained model knows only topk"):
        export(run.folder, tmp_path / "dense", {"expert_policy": "dense"})


def test_a_dense_baseline_that_is_a_llama_is_exported_as_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    llama = make_run(tmp_path / "llama", tokenizer_folder, LLAMA)
    other = make_run(tmp_path / "other", tokenizer_folder, replace(LLAMA, gated_mlp=False, hidden_act="gelu"))

    for run, class_name in ((llama, "LlamaForCausalLM"), (other, "DSMoEForCausalLM")):
        export(run.folder, run.folder / "export")
        model = load(run.folder / "export")
        assert type(model).__name__ == class_name
        expected = run.logits(token_ids(), "dense")
        torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-4, atol=1e-5)
    assert not list((llama.folder / "export").glob("*.py"))
    with pytest.raises(ConfigurationError, match="this model has no routers"):
        export(llama.folder, tmp_path / "no", {"num_experts_per_tok": 2})


@pytest.mark.parametrize("training", ["dense", "sparse"])
@pytest.mark.parametrize("tied", [False, True])
def test_qwen2_moe_computes_the_same(tmp_path: Path, tokenizer_folder: Path, training: Any, tied: bool) -> None:
    """Loaded as transformers' own architecture, without code of ours, against ours under topk."""
    architecture = replace(QWEN, tie_word_embeddings=tied, rope_theta=500.0)
    run = make_run(tmp_path / "run", tokenizer_folder, architecture, expert_training=training)
    options = {"expert_policy": "topk", "num_experts_per_tok": 2}
    export(run.folder, tmp_path / "ours", options)

    export(run.folder, tmp_path / "qwen", options, wanted_format="qwen2_moe", max_shard_bytes=20_000)

    ours, qwen = load(tmp_path / "ours"), AutoModelForCausalLM.from_pretrained(tmp_path / "qwen").eval()
    assert type(qwen).__name__ == "Qwen2MoeForCausalLM"
    assert not list((tmp_path / "qwen").glob("*.py"))
    ids = token_ids()
    torch.testing.assert_close(qwen(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-6)
    expected = run.logits(ids, "topk", num_experts_per_tok=2)
    torch.testing.assert_close(qwen(ids).logits, expected, rtol=1e-4, atol=1e-5)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(qwen.generate(ids, **greedy), ours.generate(ids, **greedy))
    assert "policy is `topk`" in (tmp_path / "qwen" / "README.md").read_text() or training == "sparse"


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (ARCHITECTURE, {}, "model.attention_type = 'moa': "),
        (replace(QWEN, num_experts=1), {}, "model.num_experts = 1: "),
        (replace(QWEN, gated_mlp=False), {}, "model.gated_mlp = False: "),
        (replace(QWEN, hidden_act="gelu"), {}, "model.hidden_act = 'gelu': "),
        (replace(QWEN, router_type="mlp"), {}, "model.router_type = 'mlp': "),
        (replace(QWEN, norm_type="layernorm"), {}, "model.norm_type = 'layernorm': "),
        (replace(QWEN, head_dim=8), {}, "model.head_dim = 8: "),
        (QWEN, {"expert_policy": "threshold"}, "expert_policy = 'threshold': Qwen2-MoE knows only topk"),
        (QWEN, {"expert_policy": "dense"}, "expert_policy = 'dense': "),
        (
            QWEN,
            {"num_experts_per_tok": None, "expert_policy_layers": [{"mlp": {"k": 1}}, {"mlp": {"k": 2}}]},
            "one K for all layers",
        ),
    ],
)
def test_what_qwen2_moe_has_not_is_named(
    tmp_path: Path, tokenizer_folder: Path, architecture: Any, options: dict[str, Any], message: str
) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, architecture)
    if architecture.num_experts > 1:
        options = {"expert_policy": "topk", "num_experts_per_tok": 2, **options}

    with pytest.raises(ConfigurationError) as refusal:
        export(run.folder, tmp_path / "export", options, wanted_format="qwen2_moe")

    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_pieces_of_any_form_and_type_come_to_the_same(run: Run, tmp_path: Path) -> None:
    """Whole stacked tensors as one piece, saved in bfloat16 or float32 and exported as the other."""
    saved = DistributedCheckpoint(run.step_folder)
    tensors = {name: saved.read(name) for name in saved.tensor_shapes}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype) / "step"
        dcp.save({name: tensor.to(dtype) for name, tensor in tensors.items()}, checkpoint_id=folder, no_dist=True)
        for name in ("config.yaml", "progress.json"):
            shutil.copy(run.step_folder / name, folder / name)
        for exported in (torch.float32, torch.bfloat16):
            output = tmp_path / f"{dtype} {exported}"
            export(folder, output, dtype=exported)
            written = load_file(output / "model.safetensors")
            assert written.keys() == run.tensors.keys()
            assert all(torch.equal(written[name], run.tensors[name].to(dtype).to(exported)) for name in written)


def test_the_command_line_reaches_the_export(run: Run, tmp_path: Path) -> None:
    options = ["--policy", "topk", "--top-k", "1", "--attention-top-k", "2", "--dtype", "bf16"]
    command = [sys.executable, "checkpoints_tools/export_hf.py", "--checkpoint", str(run.folder)]

    subprocess.run([*command, "--output", str(tmp_path / "export"), *options], check=True)

    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["expert_policy"], config["num_experts_per_tok"], config["dtype"]) == ("topk", 1, "bfloat16")


def test_an_error_is_one_line_and_a_non_zero_exit(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", str(run.folder), "--output", str(tmp_path / "export"), "--top-k", "9"]
    monkeypatch.setattr(sys, "argv", ["export_hf", *options])

    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[1:] == [  # the first one: no manifest vouches for this checkpoint
        "export_hf: error: num_experts_per_tok = 9: must be a whole number from 1 to the 5 experts"
    ]
