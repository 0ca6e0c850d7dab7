"""Import: a Hugging Face folder becomes a checkpoint that training loads under any layout; and back, bit for bit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint
from checkpoints_tools.export_hf import export
from checkpoints_tools.import_hf import import_model, main
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import CheckpointError, ConfigurationError, DSMoEError
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from tests.models_to_import import VARIANTS, save_model
from tests.pretrain_job import SmallData, pretrain_job, run_config
from tests.worker_pool import WorkerPool


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, small_data: SmallData) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model", small_data.tokenizer)


@pytest.mark.parametrize("variant", [*VARIANTS, "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_import_then_export_gives_every_bit_back(
    small_data: SmallData, tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    changes = VARIANTS.get(variant, {"model_type": "llama"})
    model = save_model(tmp_path / "model", small_data.tokenizer, dtype, **changes)

    import_model(model, tmp_path / "step")
    export(tmp_path / "step", tmp_path / "again")

    assert_equal_bits(tensors_of(tmp_path / "again"), tensors_of(model))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "again"))
    assert after["model_type"] == ("llama" if variant == "llama" else "dsmoe")
    of_tokenizer = {"bos_token_id", "eos_token_id", "pad_token_id"}
    own = set(after) - of_tokenizer - {"num_experts_per_tok", "auto_map", "transformers_version"}
    assert {key: after[key] for key in own & set(before)} == {key: before[key] for key in own & set(before)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model", "step"]


@pytest.mark.parametrize(
    "training",
    [{}, {"expert_training": "sparse"}, {"expert_training": "sparse", "attention_type": "gqa"}],
    ids=["dense", "sparse", "sparse, gqa"],
)
def test_export_then_import_gives_a_trained_checkpoint_back(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path, training: dict[str, Any]
) -> None:
    parallel: dict[str, Any] = {"tensor": 2, "sequence": True}
    changes: dict[str, Any] = {"hidden_act": "silu", "gated_mlp": True, **training}
    config = run_config(small_data, tmp_path / "run", model=changes, parallel=parallel, train={"steps": 1})
    config.evaluation.policies = []
    worker_pool.run(2, pretrain_job, config)
    export(tmp_path / "run", tmp_path / "export")

    # how it is to be trained on is not to be seen in an export
    import_model(tmp_path / "export", tmp_path / "step", [tmp_path / "run" / "config.yaml"])

    trained, imported = (
        DistributedCheckpoint(folder) for folder in (tmp_path / "run/checkpoints/step_00000001", tmp_path / "step")
    )
    names = [name for name in trained.tensor_shapes if not name.startswith("optimizer.")]
    # rows that pad the vocabulary are zero after an import: no token reads them and no loss sees them
    vocabulary = ("embedding.word_embeddings.weight", "output_layer.weight")
    assert_equal_bits(
        {name: imported.read(name)[: 500 if name in vocabulary else None] for name in imported.tensor_shapes},
        {name: trained.read(name)[: 500 if name in vocabulary else None] for name in names},
    )
    assert imported.tensor_shapes == {name: trained.tensor_shapes[name] for name in names}
    assert load_config(tmp_path / "step" / "config.yaml").model == load_config(tmp_path / "run/config.yaml").model


QWEN2_MOE: dict[str, Any] = {
    **{"attention_type": "gqa", "num_attention_heads": 4, "num_attention_experts": 1},
    **{"hidden_act": "silu", "gated_mlp": True, "expert_policy": "topk", "num_experts_per_tok": 2},
    **{"router_hidden_size": 512, "expert_threshold": None},  # which the form does not have
}


def save_qwen2_moe(folder: Path, tokenizer: str) -> Path:
    """A model in the form for engines that know Qwen2-MoE; `ours` beside it is the same in our own."""
    save_model(folder.with_name("ours"), tokenizer, **QWEN2_MOE)
    import_model(folder.with_name("ours"), folder.with_name("step_of_ours"))
    export(folder.with_name("step_of_ours"), folder, wanted_format="qwen2_moe")
    return folder


def test_a_qwen2_moe_export_is_imported_as_our_own_is(small_data: SmallData, tmp_path: Path) -> None:
    qwen = save_qwen2_moe(tmp_path / "qwen", small_data.tokenizer)

    import_model(qwen, tmp_path / "step")

    found, expected = (DistributedCheckpoint(tmp_path / name) for name in ("step", "step_of_ours"))
    assert_equal_bits(
        {name: found.read(name) for name in found.tensor_shapes},
        {name: expected.read(name) for name in expected.tensor_shapes},
    )
    sections = [load_config(tmp_path / name / "config.yaml").model for name in ("step", "step_of_ours")]
    assert sections[0] == sections[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: change_config(model, norm_topk_prob=True), "norm_topk_prob = True: must be False"),
        (lambda model: change_config(model, shared_expert_intermediate_size=32), "= 32: must be 64"),
        (
            lambda model: change_tensors(model, put("model.layers.1.self_attn.k_proj.bias", 0.5)),
            "self_attn.k_proj.bias is not zero, and this system has nothing like it",
        ),
        (
            lambda model: change_tensors(model, put("model.layers.0.mlp.shared_expert.up_proj.weight", 0.5)),
            "mlp.shared_expert.up_proj.weight is not zero",
        ),
    ],
)
def test_a_qwen2_moe_of_another_kind_is_refused(
    small_data: SmallData, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    qwen = save_qwen2_moe(tmp_path / "qwen", small_data.tokenizer)
    damage(qwen)

    with pytest.raises(CheckpointError, match=message):
        import_model(qwen, tmp_path / "step")

    assert not (tmp_path / "step").exists()


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_key(model: Path, key: str) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))


def change_tensors(model: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def put(name: str, value: Any) -> Callable[[dict[str, Tensor]], Any]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    return change


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index(model: Path, weight_map: dict[str, str]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing tensor": (
        lambda model: change_tensors(model, lambda tensors: tensors.pop("model.layers.2.mlp.gate.weight")),
        r"lacks model\.layers\.2\.mlp\.gate\.weight",
    ),
    "extra tensor": (
        lambda model: change_tensors(model, lambda tensors: tensors.update({"extra": torch.zeros(1)})),
        r"has unknown extra",
    ),
    "another shape": (
        lambda model: change_tensors(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63)})),
        r"model\.norm\.weight has shape \(63,\), but config\.json makes it \(64,\)",
    ),
    "NaN": (
        lambda model: change_tensors(model, put("model.layers.3.self_attn.o_experts", float("nan"))),
        r"model\.layers\.3\.self_attn\.o_experts holds NaN or infinite values",
    ),
    "infinity": (
        lambda model: change_tensors(model, put("lm_head.weight", float("-inf"))),
        r"lm_head\.weight holds NaN or infinite values",
    ),
    "whole numbers": (
        lambda model: change_tensors(model, lambda tensors: tensors.update({"lm_head.weight": torch.ones(2).int()})),
        r"lm_head\.weight is I32; a weight is one of",
    ),
    "two dtypes": (
        lambda model: change_tensors(model, lambda t: t.update({"model.norm.weight": torch.ones(64).bfloat16()})),
        r"the dtypes of its tensors are bfloat16, float32; all must be",
    ),
    "dtype denied": (
        lambda model: change_config(model, dtype="bfloat16"),
        r"dtype = 'bfloat16', but the tensors are float32",
    ),
    "fewer experts": (lambda model: change_config(model, num_experts=3), r"but config\.json makes it \(3, 64, 16\)"),
    "more layers": (
        lambda model: change_config(model, num_hidden_layers=5),
        r"lacks model\.layers\.4\.input_layernorm",
    ),
    "heads": (
        lambda model: change_config(model, num_attention_heads=6),
        r"num_attention_heads = 6: must be num_attention_experts x num_key_value_heads",
    ),
    "ill-typed": (lambda model: change_config(model, hidden_size="64"), r"config\.json: .*hidden_size"),
    "missing key": (lambda model: drop_key(model, "router_type"), r"config\.json lacks router_type"),
    "RoPE scaling": (
        lambda model: change_config(
            model, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
        ),
        r"rope_parameters\.rope_type = 'linear': only unscaled",
    ),
    "renormalised scores": (lambda model: change_config(model, norm_topk_prob=True), r"norm_topk_prob = True"),
    "another model": (lambda model: change_config(model, model_type="mixtral"), r"model_type = 'mixtral': only dsmoe"),
    "another vocabulary": (
        lambda model: change_config(model, vocab_size=512),
        r"vocab_size = 512: the tokenizer .* has 500 tokens",
    ),
    "no config": (lambda model: (model / "config.json").unlink(), r"config\.json: cannot be read"),
    "no JSON": (lambda model: (model / "config.json").write_text("{"), r"config\.json: cannot be read"),
    "truncated": (truncate, r"model\.safetensors: cannot be read"),
    "pickle": (only_a_pickle, r"pytorch_model\.bin is a pickle, which is not read"),
    "file of the index missing": (
        lambda model: index(model, {"lm_head.weight": "model-00001-of-00002.safetensors"}),
        r"model-00001-of-00002\.safetensors: cannot be read",
    ),
    "index outside": (lambda model: index(model, {"lm_head.weight": "../other"}), r"is not in the folder"),
    "index incomplete": (
        lambda model: index(model, {"lm_head.weight": "model.safetensors", "ghost": "model.safetensors"}),
        r"the files lack ghost and the index lacks model\.embed",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_one_line_and_nothing_is_left(small_data: SmallData, tmp_path: Path, fault: str) -> None:
    model = save_model(tmp_path / "model", small_data.tokenizer)
    damage, message = BAD[fault]
    damage(model)

    with pytest.raises(CheckpointError, match=message) as error:
        import_model(model, tmp_path / "step")

    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_recipe_adds_what_an_export_does_not_tell_and_denies_nothing(
    model: Path, small_data: SmallData, tmp_path: Path
) -> None:
    recipe, wrong = tmp_path / "recipe.yaml", tmp_path / "wrong.yaml"
    recipe.write_text(
        f"model: {{mi_alpha_mlp: 0.01}}\ndata: {{tokenizer: {small_data.tokenizer}}}\ntrain: {{precision: bf16}}\n"
    )
    wrong.write_text("model: {num_experts: 12}\n")

    import_model(model, tmp_path / "step", [recipe])
    with pytest.raises(ConfigurationError, match=r"model\.num_experts = 12: .*config\.json makes it 6"):
        import_model(model, tmp_path / "no", [recipe, wrong])

    config = load_config(tmp_path / "step" / "config.yaml")
    assert (config.model.mi_alpha_mlp, config.data.tokenizer) == (0.01, small_data.tokenizer)
    assert config.train.precision == "fp32"  # as the tensors are
    assert (config.model.expert_policy, config.model.expert_threshold) == ("threshold", 0.6)


def test_what_is_there_is_kept_unless_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    import_model(model, tmp_path / "step")

    for output, overwrite, message in (
        ("step", False, "is already there"),
        ("thesis", True, "is not a step folder, so --overwrite does not remove it"),
    ):
        with pytest.raises(DSMoEError, match=message):
            import_model(model, tmp_path / output, overwrite=overwrite)
    import_model(model, tmp_path / "step", overwrite=True)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step", "thesis"]


def test_the_command_line_imports(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "checkpoints_tools/import_hf.py", "--model", str(model)]

    done = subprocess.run([*command, "--output", str(tmp_path / "step")], check=True, capture_output=True, text=True)

    assert done.stderr.endswith("step: 11 tensors, whole\n")


def test_an_error_is_one_line_and_a_non_zero_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["import_hf", "--model", str(tmp_path), "--output", str(tmp_path / "step")])

    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_transformers_reads_the_round_trip(model: Path, tmp_path: Path) -> None:
    import_model(model, tmp_path / "step")
    export(tmp_path / "step", tmp_path / "again")

    ids = torch.arange(12)[None]
    before = DSMoEForCausalLM.from_pretrained(model)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(after(ids).logits, before(ids).logits)
