"""The generate command: each policy with the export's own limits; what it cannot serve is refused in one line."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_tools.export_hf import export
from checkpoints_tools.generate import generate, main
from dsmoe_megatron.errors import CheckpointError, ConfigurationError
from dsmoe_megatron.inference.policy import ExpertPolicy
from tests.made_up_runs import ARCHITECTURE, QWEN, make_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    folder = tmp_path_factory.mktemp("generate")
    run = make_run(folder / "run", tokenizer_folder, ARCHITECTURE, max_position_embeddings=24)
    export(run.folder, folder / "export")
    return str(folder / "export")


def test_a_prompt_that_just_fits_is_continued(exported: str) -> None:
    (result,) = generate(exported, "x" * 20, ["threshold"], max_new_tokens=4, temperature=0.0, seed=1)

    assert result["text"].startswith("x" * 20)


def test_limits_per_layer_are_those_of_the_policy_that_the_export_names(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    layers = [{"mlp": {"k": 1 + layer}, "attention": {"k": 1}} for layer in range(ARCHITECTURE.num_hidden_layers)]
    export(run.folder, tmp_path / "export", ExpertPolicy("topk", expert_policy_layers=layers))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
    expected = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]

    results = generate(str(tmp_path / "export"), "def main(", ["dense", "topk"], 8, temperature=0.0, seed=1)

    assert results[1]["text"] == tokenizer.decode(expected)
    assert results[0]["text"] != results[1]["text"]


def test_a_policy_gives_the_same_text_whatever_ran_before(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Limits per layer of one policy, limits for all layers of the others."""
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    layers = [{"mlp": {"eps": 0.9}, "attention": {"eps": 1.1}}] * ARCHITECTURE.num_hidden_layers
    limits: dict[str, Any] = {"num_experts_per_tok": 1, "attention_experts_per_tok": 1, "expert_policy_layers": layers}
    export(run.folder, tmp_path / "export", ExpertPolicy("threshold", **limits))

    def texts(*policies: str) -> dict[str, str]:
        results = generate(str(tmp_path / "export"), "def main(", policies, 8, temperature=0.0, seed=1)
        return {result["policy"]: result["text"] for result in results}

    alone = texts("topk") | texts("threshold")
    assert len(set(alone.values())) == 2
    assert texts("threshold", "topk") == texts("topk", "threshold") == alone


def test_limits_of_some_layers_come_with_those_of_all_others(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    limits = {"num_experts_per_tok": 1, "attention_experts_per_tok": 1}
    layers = [{"mlp": {"k": 2}}, *[{}] * (ARCHITECTURE.num_hidden_layers - 1)]
    export(run.folder, tmp_path / "export", ExpertPolicy("topk", **limits, expert_policy_layers=layers))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
    expected = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]

    (result,) = generate(str(tmp_path / "export"), "def main(", ["topk"], 8, temperature=0.0, seed=1)

    assert result["text"] == tokenizer.decode(expected)


@pytest.mark.parametrize("wanted", ["auto", "qwen2_moe"])
def test_a_sparse_trained_model_is_run_as_it_was_trained(tmp_path: Path, tokenizer_folder: Path, wanted: Any) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, QWEN, expert_training="sparse", num_experts_per_tok=2)
    export(run.folder, tmp_path / "export", wanted_format=wanted)

    results = generate(str(tmp_path / "export"), "def main(", None, 4, temperature=0.0, seed=1)

    assert [result["policy"] for result in results] == ["topk"]
    for policy in ("dense", "threshold"):
        with pytest.raises(ConfigurationError, match=f"--policies = '{policy}': a sparse-trained model"):
            generate(str(tmp_path / "export"), "def main(", ["topk", policy], 4, temperature=0.0, seed=1)


def test_a_densely_trained_model_is_run_under_every_policy(exported: str) -> None:
    results = generate(exported, "def main(", None, 4, temperature=0.0, seed=1)

    assert [result["policy"] for result in results] == ["dense", "topk", "threshold"]


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        ("", 4, "--prompt = '': has no tokens"),
        ("x" * 25, 4, "has 25 tokens, more than the 24"),
        ("x" * 20, 5, r"--max-new-tokens = 5: with the prompt's 20 tokens more than the 24 .*: at most 4 are left"),
        ("x", 0, "--max-new-tokens = 0: must be at least 1"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(exported: str, prompt: str, new_tokens: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        generate(exported, prompt, ["dense"], new_tokens, temperature=0.0, seed=1)


def test_a_policy_and_a_folder_that_are_none_are_refused(exported: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--policies = 'best': expert_policy = 'best': must be one of"):
        generate(exported, "x", ["best"], 4, temperature=0.0, seed=1)
    with pytest.raises(ConfigurationError, match=r"--policies = 'threshold_topk': .* for evaluation only"):
        generate(exported, "x", ["threshold_topk"], 4, temperature=0.0, seed=1)
    with pytest.raises(CheckpointError, match=r"has no config\.json: is it an export"):
        generate(str(tmp_path), "x", ["dense"], 4, temperature=0.0, seed=1)


def test_a_refusal_is_one_line(
    exported: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", "--model", exported, "--prompt", ""])

    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines == ["generate: error: --prompt = '': has no tokens: give a text to continue"]
