"""What a recipe and a user's DeepSpeed configuration may say together; every contradiction is one line."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import parse_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.deepspeed_settings import require_deepspeed, settings
from dsmoe_megatron.errors import ConfigurationError


def recipe(*overrides: str) -> Config:
    return parse_config(["--engine.name=deepspeed", "--train.micro_batch_size=2", *overrides], "test")


def refusal(config: Config, processes: int = 2) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_config(config, processes)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--parallel.pipeline=2", "must be 1 with engine.name deepspeed: split the model by engine.zero_stage 3"),
        ("--parallel.expert=2", "must be 1 with engine.name deepspeed: split the model by engine.zero_stage 3"),
        (
            "--parallel.overlap=true",
            "must be false with engine.name deepspeed, which has zero_optimization.overlap_comm",
        ),
        ("--engine.zero_stage=0", "must be 1, 2 or 3"),
        ("--engine.zero_stage=4", "must be 1, 2 or 3"),
        ("--engine.deepspeed_config=/nowhere/ds.json", "cannot be read (No such file or directory)"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(override: str, expected: str) -> None:
    key, _, value = override.removeprefix("--").partition("=")

    text = refusal(recipe(override))

    assert text.startswith(f"{key} = ")
    assert value in text.lower()
    assert expected in text


def test_experts_are_split_as_the_rest() -> None:
    config = recipe("--parallel.tensor=2", "--parallel.sequence=true", "--parallel.expert_tensor=1")

    assert refusal(config) == "parallel.expert_tensor = 1: must be null with engine.name deepspeed"


@pytest.mark.parametrize("override", ["zero_stage=2", "offload_optimizer=true", "deepspeed_config=ds.json"])
def test_settings_of_deepspeed_need_deepspeed(override: str) -> None:
    text = refusal(parse_config([f"--engine.{override}"], "test"))

    assert f"engine.{override.partition('=')[0]} = " in text
    assert "needs engine.name deepspeed" in text


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ({"train_batch_size": 4}, "train_batch_size is 4 there and 8 by the recipe: set train.global_batch_size"),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "train_micro_batch_size_per_gpu is 1 there and 2 by the recipe: set train.micro_batch_size",
        ),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps is 4 there and 2 by the recipe: set train.global_batch_size and",
        ),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 there and 1.0 by the recipe: set optimizer.clip_grad"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true there and false by the recipe: set train.precision"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true there and false by the recipe: set train.precision"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3 there and 1 by the recipe"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            'offload_optimizer.device is "cpu" there and "none" by the recipe: set engine.offload_optimizer',
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer is the recipe's: remove it there and set optimizer.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is the recipe's: remove it there and set optimizer.schedule"),
        ({"sparse_attention": {}}, "sparse_attention was never tried with this engine: remove it; the file may set"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param was never tried with this engine: remove it",
        ),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads was never tried"),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm needs engine.zero_stage 2 or 3"),
        ({"zero_optimization": 2}, "zero_optimization is no JSON object"),
        ([1], "is no JSON object"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_contradicts_the_recipe_is_refused(tmp_path: Path, users: Any, expected: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(users))

    text = refusal(recipe(f"--engine.deepspeed_config={file}"))

    assert text.startswith(f"engine.deepspeed_config = '{file}': ")
    assert expected in text


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text("{stage: 1}")

    assert f"'{file}': is not JSON: " in refusal(recipe(f"--engine.deepspeed_config={file}"))


def test_a_configuration_that_agrees_is_laid_over_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 10,
        "reduce_bucket_size": "auto",
        "offload_optimizer": None,
    }
    users = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
        "zero_optimization": zero,
    }
    file.write_text(json.dumps(users))
    config = recipe("--engine.zero_stage=3", f"--engine.deepspeed_config={file}")
    check_config(config, 2)

    merged, alone = (settings(each, 1000, False) for each in (config, recipe("--engine.zero_stage=3")))

    assert merged.pop("wall_clock_breakdown") is True
    assert merged["zero_optimization"].pop("stage3_param_persistence_threshold") == 10
    assert merged == alone


def test_a_missing_deepspeed_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock, because DeepSpeed is there where tests run."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    require_deepspeed(parse_config([], "test"))
    with pytest.raises(ConfigurationError) as caught:
        require_deepspeed(recipe())

    expected = "engine.name = 'deepspeed': DeepSpeed is not installed: pip install '.[train,deepspeed]'"
    assert str(caught.value) == expected
