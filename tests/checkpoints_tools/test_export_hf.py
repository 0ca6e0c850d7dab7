"""Export: a distributed checkpoint in pieces becomes a folder that transformers loads, with the reference's logits."""

import io
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from checkpoints_tools.export_hf import export, main
from dsmoe_megatron.config import Config, DataConfig, ModelConfig, TrainConfig
from dsmoe_megatron.config_parsing import save_config
from dsmoe_megatron.errors import CheckpointError, ConfigurationError
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from tests import reference_model as reference

ARCHITECTURE = reference.ReferenceConfig(vocab_size=257, hidden_size=16, head_dim=8, moe_intermediate_size=8)
GQA = replace(ARCHITECTURE, attention_type="gqa", num_attention_experts=1, num_attention_heads=2, num_key_value_heads=1)
LLAMA = replace(GQA, num_experts=1, hidden_act="silu", gated_mlp=True)


class InPieces(dcp.DefaultSavePlanner):
    """Saves as a tensor-parallel run of megatron-core: layer by layer, the next axis in halves; bytes as objects."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.state_dict.items():
            if not isinstance(tensor, Tensor):
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
                continue
            axes = [[(0, 1)] if size < 2 else [(0, size // 2), (size // 2, size)] for size in tensor.shape[:2]]
            if name.startswith("decoder.layers"):
                axes[0] = [(layer, layer + 1) for layer in range(tensor.shape[0])]
            grid = torch.cartesian_prod(*[torch.arange(len(axis)) for axis in axes]).view(-1, len(axes)).tolist()
            for place in grid:
                spans = [axis[index] for axis, index in zip(axes, place, strict=True)]
                offsets = [start for start, _ in spans] + [0] * (tensor.dim() - len(spans))
                sizes = [end - start for start, end in spans] + list(tensor.shape[len(spans) :])
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.size())
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        tensor: Tensor | io.BytesIO = self.state_dict[write_item.index.fqn]
        if isinstance(tensor, io.BytesIO):
            return tensor
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            tensor = tensor.narrow(axis, offset, size)
        return tensor.clone()


@dataclass
class Run:
    """A run folder with one checkpoint, and the tensors that its export must have."""

    folder: Path
    step_folder: Path
    architecture: reference.ReferenceConfig
    tensors: dict[str, Tensor]

    def logits(self, ids: Tensor, policy: str, **limits: Any) -> Tensor:
        rules = reference.ReferencePolicy(policy, **limits)
        return reference.reference_forward(self.architecture, self.tensors, ids, rules).logits


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 bytes and an end-of-document token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def make_run(
    folder: Path,
    tokenizer: Path,
    architecture: reference.ReferenceConfig,
    extra: dict[str, Any] | None = None,
    **model: Any,
) -> Run:
    names = {"rope_theta", "vocab_size"}
    section = ModelConfig(
        **{name: value for name, value in vars(architecture).items() if name not in names}, vocab_size=257, **model
    )
    config = Config(
        model=section,
        data=DataConfig(tokenizer=str(tokenizer)),
        train=TrainConfig(run_dir=str(folder), precision="fp32"),
    )
    tensors = reference.random_tensors(architecture, dtype=torch.float32)
    mapping = TensorMapping(section, 257, section.padded_vocab_size, section.expert_training)
    megatron = mapping.to_megatron(tensors)
    megatron["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(16)

    step_folder = folder / "checkpoints" / "step_00000007"
    layer_object = {"decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": io.BytesIO(b"scales")}
    planner = InPieces()
    dcp.save({**megatron, **layer_object, **(extra or {})}, checkpoint_id=step_folder, planner=planner, no_dist=True)
    contents = pickle.loads((step_folder / ".metadata").read_bytes())
    contents.all_local_plans = [planner.plan]  # as megatron-core adds it
    (step_folder / ".metadata").write_bytes(pickle.dumps(contents))
    save_config(config, step_folder / "config.yaml")
    policies = {
        "dense": {"perplexity": 10.44, "active_share": 1.0},
        "topk": {"perplexity": 12.3456, "active_share": 0.512},
    }
    validation = {"step": 7, "validation_loss": 2.3456789, "policies": policies}
    progress = {"step": 7, "consumed_samples": 56, "tokens": 1792, "last_validation": validation}
    (step_folder / "progress.json").write_text(json.dumps(progress))
    (folder / "latest").write_text("step_00000007\n")
    return Run(folder, step_folder, architecture, tensors)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), tokenizer_folder, ARCHITECTURE)


def token_ids() -> Tensor:
    return torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(5))


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
tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
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
    assert config["eos_token_id"] == tokenizer.eos_token_id == generation["pad_token_id"] == 256
    assert load(tmp_path / "export").dtype == torch.bfloat16
    for fact in (
        "| Steps | 7 |",
        "| Tokens | 1,792 |",
        "| Loss | 2.3457 |",
        "| topk | 12.346 | 51.2 % |",
        "num_experts: 5",
    ):
        assert fact in card


def test_sparse_trained_baseline_is_exported_with_topk(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, GQA, expert_training="sparse", num_experts_per_tok=2)

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


@pytest.mark.parametrize(
    ("extra", "units", "message"),
    [
        (
            {"decoder.layers.mlp.linear_fc1.bias": torch.zeros(2, 40)},
            8,
            r"has unknown decoder\.layers\.mlp\.linear_fc1\.b",
        ),
        ({"replay_buffer": io.BytesIO(b"?")}, 8, r"has unknown replay_buffer"),
        ({}, 16, r"linear_fc1\.weight has shape \(2, 40, 16\), but its configuration makes it \(2, 80, 16\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    tmp_path: Path, tokenizer_folder: Path, extra: dict[str, Any], units: int, message: str
) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE, extra)
    recipe = run.step_folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace("moe_intermediate_size: 8", f"moe_intermediate_size: {units}"))

    with pytest.raises(CheckpointError, match=message):
        export(run.folder, tmp_path / "export")

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_piece_is_named_and_nothing_is_left(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    piece = next(run.step_folder.glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[: piece.stat().st_size // 2])

    with pytest.raises(CheckpointError, match=r"cannot be read: "):
        export(run.folder, tmp_path / "export")

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_table_of_contents_cannot_run_code(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    trace = tmp_path / "trace"

    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            import os

            return os.system, (f"touch {trace}",)

    (run.step_folder / ".metadata").write_bytes(pickle.dumps(Attack()))

    with pytest.raises(CheckpointError, match=r"refers to posix\.system"):
        export(run.folder, tmp_path / "export")
    assert not trace.exists()


def test_an_existing_folder_is_kept_unless_told(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "export"
    export(run.folder, output)
    (output / "mark").touch()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").touch()

    with pytest.raises(ConfigurationError, match="is already there"):
        export(run.folder, output)
    with pytest.raises(ConfigurationError, match="is not an export"):
        export(run.folder, strange, overwrite=True)
    assert (output / "mark").exists()
    export(run.folder, output, overwrite=True)

    assert not (output / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "strange"]


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
    assert capsys.readouterr().err.splitlines() == [
        "export_hf: error: num_experts_per_tok = 9: must be a whole number from 1 to the 5 experts"
    ]
