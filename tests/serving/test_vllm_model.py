"""Exports in real vLLM: greedy tokens and their log-probabilities are those of transformers, under every policy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmoe_megatron.errors import ConfigurationError
from tests.serving.engine import (
    ARCHITECTURES,
    POLICIES,
    Answer,
    transformers_answers,
    vllm_answers,
    write_export,
    write_qwen2_moe_export,
)

# every policy on two architectures, every architecture under the two sparse policies that exports have
COMBINATIONS = [
    *(("gelu moa", policy) for policy in POLICIES),
    *(("swiglu moa", policy) for policy in POLICIES),
    *(
        (name, policy)
        for name in ("silu, mlp router, layernorm, tied", "geglu gqa", "fused geglu", "gelu gqa, mlp router")
        for policy in ("topk", "threshold")
    ),
    ("moa, plain MLP", "threshold"),
    ("dense baseline", "dense"),
]
COMPILED = [("gelu moa", "threshold"), ("swiglu moa", "topk"), ("geglu gqa", "dense")]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folders: dict[tuple[str, str], Path] = {}

    def folder(architecture: str, policy: str) -> Path:
        key = (architecture, policy)
        if key not in folders:
            values = POLICIES[policy]
            if ARCHITECTURES[architecture].num_experts == 1:
                values = {name: value for name, value in values.items() if name != "num_experts_per_tok"}
            folders[key] = write_export(tmp_path_factory.mktemp("export"), ARCHITECTURES[architecture], values)
        return folders[key]

    return folder


def assert_equal(actual: list[Answer], expected: list[Answer]) -> None:
    assert [answer.tokens for answer in actual] == [answer.tokens for answer in expected]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.log_probabilities, other.log_probabilities, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "policy"), COMBINATIONS)
def test_eager_vllm_equals_transformers(export: Callable[[str, str], Path], architecture: str, policy: str) -> None:
    folder = export(architecture, policy)

    assert_equal(vllm_answers(folder, eager=True), transformers_answers(folder))


@pytest.mark.parametrize(("architecture", "policy"), COMPILED)
def test_compiled_vllm_equals_transformers(export: Callable[[str, str], Path], architecture: str, policy: str) -> None:
    folder = export(architecture, policy)

    assert_equal(vllm_answers(folder, eager=False), transformers_answers(folder))


def test_a_qwen2_moe_export_needs_nothing_of_ours(export: Callable[[str, str], Path], tmp_path: Path) -> None:
    """vLLM's own Qwen2-MoE, on the export made for it, answers as our model does."""
    ours = export("of Qwen2-MoE", "topk")

    qwen = write_qwen2_moe_export(tmp_path / "qwen", ours, POLICIES["topk"]["num_experts_per_tok"])

    assert_equal(vllm_answers(qwen, eager=True), transformers_answers(ours))


@pytest.mark.parametrize(("architecture", "policy"), COMPILED)
def test_bfloat16_differs_by_its_rounding(export: Callable[[str, str], Path], architecture: str, policy: str) -> None:
    """Of the first new token, before greedy choices can part; transformers' own bfloat16 is up to 0.065 away there."""
    folder = export(architecture, policy)

    actual = vllm_answers(folder, eager=True, dtype="bfloat16")

    for one, other in zip(actual, transformers_answers(folder), strict=True):
        torch.testing.assert_close(one.log_probabilities[0], other.log_probabilities[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("policy", ["dense", "threshold"])
def test_two_ranks_answer_as_one(export: Callable[[str, str], Path], policy: str) -> None:
    folder = export("swiglu moa", policy)

    assert_equal(vllm_answers(folder, eager=True, ranks=2), transformers_answers(folder))


@pytest.mark.parametrize("architecture", ["gelu moa", "swiglu moa"])
def test_what_a_wrong_server_would_answer_is_something_else(
    export: Callable[[str, str], Path], architecture: str
) -> None:
    """The comparisons above would see another policy, another activation, and renormalised scores."""
    folder = export(architecture, "threshold")
    answers = [transformers_answers(export(architecture, policy)) for policy in POLICIES]
    other = "silu" if ARCHITECTURES[architecture].hidden_act == "gelu" else "gelu"
    answers.append(transformers_answers(folder, hidden_act=other))

    first_probabilities = [torch.stack([each.log_probabilities[0] for each in answer]) for answer in answers]
    for index, one in enumerate(first_probabilities):
        for another in first_probabilities[index + 1 :]:
            assert (one - another).abs().max() > 0.01


def test_the_policy_can_be_chosen_when_the_server_starts(export: Callable[[str, str], Path]) -> None:
    policy: dict[str, Any] = {"expert_policy": "topk", "num_experts_per_tok": 3}

    actual = vllm_answers(export("gelu moa", "threshold"), eager=True, **policy)

    assert_equal(actual, transformers_answers(export("gelu moa", "threshold"), **policy))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"expert_policy": "threshold_topk"}, "expert_policy = 'threshold_topk': .*evaluation only"),
        ({"expert_policy": "topk", "num_experts_per_tok": 99}, "num_experts_per_tok = 99: must be a whole number"),
        ({"ranks": 3}, "--tensor-parallel-size = 3: must divide num_experts = 8"),
        ({"load_format": "pt"}, "--load-format = 'pt': unpickles files"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    export: Callable[[str, str], Path], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        vllm_answers(export("gelu moa", "threshold"), eager=True, **overrides)


def damaged(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"export lacks {NAME}"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "export has unknown extra"),
        (lambda tensors: tensors.update({NAME: torch.ones(8, 64, 4)}), rf"{NAME} has shape \(8, 64, 4\)"),
        (lambda tensors: tensors[NAME][0, 0].fill_(torch.nan), f"{NAME} holds numbers that are not finite"),
    ],
)
def test_a_damaged_export_is_refused(
    export: Callable[[str, str], Path],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    folder = damaged(export("gelu moa", "threshold"), tmp_path, change)

    with pytest.raises(Exception, match=message):
        vllm_answers(folder, eager=True)


def test_pickled_weights_are_not_read(export: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = export("gelu moa", "threshold")
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())

    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        vllm_answers(tmp_path, eager=True)


def test_a_configuration_that_contradicts_itself_is_refused(export: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = damaged(export("gelu moa", "threshold"), tmp_path, lambda tensors: tensors.update())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 6}))

    with pytest.raises(Exception, match="num_attention_heads = 6: must be num_attention_experts x num_key_value_heads"):
        vllm_answers(folder, eager=True)
