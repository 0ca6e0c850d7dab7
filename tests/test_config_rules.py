"""Recipes and layouts that can run are accepted; each impossible one is refused with key, value and rule."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from operator import attrgetter
from typing import Any, get_type_hints

import pytest

from dsmoe_megatron.config import Config, DatasetSource, PolicyConfig
from dsmoe_megatron.config_rules import check_config, data_parallel_size
from dsmoe_megatron.errors import ConfigurationError

DENSE_BASELINE = {
    "model.attention_type": "gqa",
    "model.num_attention_experts": 1,
    "model.num_experts": 1,
    "model.moe_intermediate_size": 1024,
}
SPARSE_BASELINE = {
    "model.attention_type": "gqa",
    "model.num_attention_experts": 1,
    "model.expert_training": "sparse",
}
RAMP = {"train.ramp_up.start_batch_size": 4, "train.ramp_up.increment": 2, "train.ramp_up.samples": 24}


def recipe(changes: dict[str, Any]) -> Config:
    """The default recipe (moa, 2 kv heads x 4 experts, 8 MLP experts of 128, 4 layers, batch 8) with changes."""
    config = Config()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        assert hasattr(attrgetter(section)(config), name)
        setattr(attrgetter(section)(config), name, value)
    return config


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        (8, {}),
        (2, {"parallel.tensor": 2}),
        (4, {"parallel.tensor": 4, "parallel.sequence": True}),  # two ranks share a key/value head
        (8, {"parallel.tensor": 8}),  # four do: each holds one expert's head of it
        (4, {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert": 2}),
        (2, {"parallel.expert": 2}),
        (4, {"parallel.expert": 2, "parallel.expert_tensor": 2}),
        (2, {"parallel.tensor": 2, "parallel.expert_tensor": 1, "parallel.sequence": True}),
        (4, {"parallel.context": 2, "parallel.expert": 4}),  # expert groups may run across context ranks
        (2, {"parallel.pipeline": 2}),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
        (3, {"parallel.pipeline": 3, "parallel.first_stage_layers": 1, "parallel.last_stage_layers": 2}),
        (2, {"parallel.pipeline": 2, "parallel.last_stage_layers": 1}),
        (2, {"parallel.pipeline": 2, "parallel.first_stage_layers": 1, "parallel.last_stage_layers": 3}),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.first_stage_layers": 2}
            | {"model.num_hidden_layers": 6}),
        (4, {"model.num_experts": 6, "parallel.expert": 4}),  # 6 x 128 units over 4 ranks: experts are cut
        (3, {"parallel.tensor": 3, "model.num_key_value_heads": 3, "model.num_attention_heads": 12}
            | {"model.num_experts": 6, "model.vocab_size": 300}),  # 384 rows
        (2, RAMP),
        (1, {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 60, "optimizer.wsd_decay_steps": 40}),
        (1, DENSE_BASELINE),
        (2, DENSE_BASELINE | {"parallel.tensor": 2}),
        (2, SPARSE_BASELINE | {"parallel.expert": 2}),
        (4, SPARSE_BASELINE | {"parallel.expert": 2, "parallel.expert_tensor": 2}),
        (1, {"model.num_experts": 1, "model.num_experts_per_tok": 4}),  # K of a router that is not there
        (1, {"train.steps": 1, "optimizer.warmup_steps": 0, "checkpoint.interval": 1, "logging.interval": 1}),
        (1, {"train.steps": 2, "optimizer.warmup_steps": 50, "optimizer.decay_steps": 100}),  # a run cut short
    ],
)  # fmt: skip
def test_what_can_run_is_accepted(world_size: int, changes: dict[str, Any]) -> None:
    check_config(recipe(changes), world_size)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("model.hidden_size", 0, "at least 1"),
        ("model.num_hidden_layers", -1, "at least 1"),
        ("model.vocab_size", 0, "at least 1"),
        ("model.vocab_size_multiple", 0, "at least 1"),
        ("model.rms_norm_eps", 0.0, "above 0"),
        ("model.rope_parameters.rope_theta", -1.0, "above 0"),
        ("model.initializer_range", float("nan"), "above 0"),
        ("model.hidden_dropout", 1.0, "below 1"),
        ("model.attention_dropout", -0.1, "at least 0"),
        ("model.mi_alpha_mlp", -1e-4, "not be negative"),
        ("model.expert_threshold", -0.1, "not be negative"),
        ("model.num_experts_per_tok", 9, "from 1 to the number of experts, 8"),
        ("model.attention_experts_per_tok", 5, "from 1 to the number of experts, 4"),
        ("model.head_dim", 33, "even"),
        ("model.num_attention_experts", 1, "attention_type gqa"),
        ("model.num_attention_heads", 12, "= 4 x 2 = 8"),
        ("parallel.tensor", 0, "at least 1"),
        ("parallel.expert_tensor", 0, "at least 1"),
        ("optimizer.lr", 0.0, "above 0"),
        ("optimizer.lr", float("inf"), "above 0"),
        ("optimizer.min_lr", 1.0, "not be above optimizer.lr"),
        ("optimizer.beta2", 1.0, "below 1"),
        ("optimizer.warmup_steps", 100, "below optimizer.decay_steps"),
        ("optimizer.decay_steps", 0, "at least 1"),
        ("train.steps", 0, "at least 1"),
        ("train.seed", -1, "from 0"),
        ("train.seed", 2**31, "from 0"),
        ("train.sequence_length", 4096, "max_position_embeddings, 2048"),
        ("train.timeout_minutes", 0.0, "above 0"),
        ("checkpoint.interval", 0, "at least 1"),
        ("evaluation.batches", 0, "at least 1"),
    ],
)
def test_a_single_value_that_cannot_be_is_refused(key: str, value: float, rule: str) -> None:
    with pytest.raises(ConfigurationError, match=rule) as raised:
        check_config(recipe({key: value}), world_size=1)

    assert raised.value.key == key


@pytest.mark.parametrize(
    ("world_size", "changes", "key", "rule"),
    [
        (3, {"parallel.tensor": 2}, "parallel.tensor", "2 x 1 x 1 must divide the number of processes, 3"),
        (2, {"parallel.pipeline": 4}, "parallel.pipeline", "1 x 4 x 1 must divide the number of processes, 2"),
        (3, {"parallel.tensor": 3}, "parallel.tensor", "the 2 key/value heads"),
        (16, {"parallel.tensor": 16}, "parallel.tensor", "the 4 query heads of each"),
        (6, {"parallel.tensor": 3, "model.num_key_value_heads": 3, "model.num_attention_heads": 12},
            "model.vocab_size_multiple", "divisible by tensor = 3"),
        (4, {"parallel.tensor": 4, "model.vocab_size": 10, "model.vocab_size_multiple": 2},
            "model.vocab_size_multiple", "vocabulary, 10, must be divisible by tensor = 4"),
        (4, {"parallel.expert": 3}, "parallel.expert", "3 x 1 must divide the 4 processes"),
        (4, {"parallel.expert": 4, "parallel.pipeline": 2}, "parallel.expert", "must divide the 2 processes"),
        (4, {"parallel.tensor": 2, "parallel.expert": 2}, "parallel.sequence", "must be true"),
        (2, {"parallel.tensor": 2, "parallel.expert_tensor": 1}, "parallel.sequence", "must be true"),
        (3, {"parallel.expert": 3, "train.global_batch_size": 9}, "model.moe_intermediate_size", "1024 hidden units"),
        (2, {"parallel.tensor": 2, "model.num_experts": 3, "model.moe_intermediate_size": 5},
            "model.moe_intermediate_size", "15 hidden units"),
        (2, DENSE_BASELINE | {"parallel.expert": 2}, "parallel.expert", "must be 1 with model.num_experts 1"),
        (2, DENSE_BASELINE | {"parallel.expert_tensor": 2}, "parallel.expert_tensor", "must be null"),
        (2, DENSE_BASELINE | {"parallel.tensor": 2, "model.moe_intermediate_size": 5},
            "model.moe_intermediate_size", "divisible by tensor = 2"),
        (1, DENSE_BASELINE | {"model.mi_alpha_mlp": 1e-3}, "model.mi_alpha_mlp", "no router"),
        (1, DENSE_BASELINE | {"model.mi_alpha_attention": 1e-3}, "model.mi_alpha_attention", "no router"),
        (1, {"model.attention_type": "gqa"}, "model.num_attention_experts", "must be 1"),
        (1, DENSE_BASELINE | {"model.num_key_value_heads": 3}, "model.num_attention_heads", "multiple of"),
        (1, {"parallel.sequence": True}, "parallel.sequence", "needs parallel.tensor > 1"),
        (2, {"parallel.tensor": 2, "parallel.sequence": True, "train.sequence_length": 255},
            "train.sequence_length", "tensor x context = 2"),
        (2, {"parallel.context": 2, "train.sequence_length": 254}, "train.sequence_length", "2 x context = 4"),
        (3, {"parallel.pipeline": 3}, "model.num_hidden_layers", "pipeline x virtual_pipeline = 3"),
        (1, {"parallel.virtual_pipeline": 2}, "parallel.virtual_pipeline", "needs parallel.pipeline > 1"),
        (3, {"parallel.tensor": 3, "model.num_key_value_heads": 1, "model.num_attention_experts": 6}
            | {"model.num_attention_heads": 6, "model.num_experts": 6, "model.vocab_size": 300},
            "parallel.tensor", "256 columns of the query-key-value projection"),
        (1, {"parallel.first_stage_layers": 2}, "parallel.first_stage_layers", "needs parallel.pipeline > 1"),
        (2, {"parallel.pipeline": 2, "parallel.last_stage_layers": 4}, "parallel.last_stage_layers", "the 4 layers"),
        (2, {"parallel.pipeline": 2, "parallel.first_stage_layers": 1, "parallel.last_stage_layers": 2},
            "parallel.last_stage_layers", "share the rest"),
        (3, {"parallel.pipeline": 3, "parallel.first_stage_layers": 1}, "parallel.first_stage_layers", "evenly"),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.first_stage_layers": 1},
            "parallel.first_stage_layers", "divisible by virtual_pipeline = 2"),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.first_stage_layers": 2}
            | {"parallel.last_stage_layers": 2}, "parallel.last_stage_layers", "the last rank takes the rest"),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 4}, "model.num_hidden_layers", "= 8"),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "train.global_batch_size": 3},
            "train.global_batch_size", "3 micro-batches per replica"),
        (3, {}, "train.global_batch_size", "1 x 3"),
        (2, {"train.micro_batch_size": 3}, "train.global_batch_size", "3 x 2"),
        (1, {"optimizer.wsd_decay_steps": 5}, "optimizer.wsd_decay_steps", "needs optimizer.schedule wsd"),
        (1, {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 60, "optimizer.wsd_decay_steps": 41},
            "optimizer.wsd_decay_steps", "between warm-up and end, 40 steps"),
        (1, {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 91}, "optimizer.wsd_decay_steps", "9 steps"),
        (1, {"logging.profile.last_step": 4}, "logging.profile.last_step", "below first_step, None"),
        (1, {"logging.profile.first_step": 5, "logging.profile.last_step": 4}, "logging.profile.last_step", "step, 5"),
        (1, {"train.ramp_up.start_batch_size": 4}, "train.ramp_up.increment", "must be set"),
        (1, {"train.ramp_up.increment": 4}, "train.ramp_up.start_batch_size", "must be set"),
        (1, RAMP | {"train.ramp_up.start_batch_size": 8}, "train.ramp_up.start_batch_size", "below"),
        (1, RAMP | {"train.ramp_up.increment": 3}, "train.ramp_up.increment", "start_batch_size = 4"),
        (4, RAMP | {"train.ramp_up.start_batch_size": 2}, "train.ramp_up.start_batch_size", "batch of 2 must be"),
        (4, RAMP, "train.ramp_up.increment", "the ramp's batch of 6 must be divisible by .* = 1 x 4"),
        (4, RAMP | {"train.micro_batch_size": 2, "train.global_batch_size": 12, "train.ramp_up.increment": 4,
            "train.ramp_up.start_batch_size": 8}, "train.global_batch_size", "must be divisible by .* = 2 x 4"),
        (2, RAMP | {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "train.ramp_up.start_batch_size": 3,
            "train.ramp_up.increment": 5}, "train.ramp_up.start_batch_size", "3 micro-batches per replica"),
        (1, SPARSE_BASELINE | {"model.num_experts": 1}, "model.num_experts", "above 1"),
        (1, SPARSE_BASELINE | {"model.router_type": "mlp"}, "model.router_type", "must be linear"),
        (1, SPARSE_BASELINE | {"model.mi_alpha_mlp": 1e-3}, "model.mi_alpha_mlp", "must be 0"),
        (1, SPARSE_BASELINE | {"model.num_experts_per_tok": 9}, "model.num_experts_per_tok", "experts, 8"),
        (2, SPARSE_BASELINE | {"parallel.context": 2}, "parallel.context", "must be 1"),
        (2, SPARSE_BASELINE | {"parallel.tensor": 2}, "parallel.sequence", "must be true"),
        (3, SPARSE_BASELINE | {"parallel.expert": 3}, "parallel.expert", "divide model.num_experts, 8"),
        (2, SPARSE_BASELINE | {"parallel.expert_tensor": 2}, "parallel.expert_tensor", "must be null"),
        (2, SPARSE_BASELINE | {"parallel.tensor": 2, "parallel.sequence": True, "parallel.expert_tensor": 1},
            "parallel.expert_tensor", "must be null"),
        (4, SPARSE_BASELINE | {"parallel.expert": 2, "parallel.expert_tensor": 2, "model.moe_intermediate_size": 5},
            "model.moe_intermediate_size", "expert_tensor"),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_run_is_refused(
    world_size: int, changes: dict[str, Any], key: str, rule: str
) -> None:
    config = recipe(changes)

    with pytest.raises(ConfigurationError, match=rule) as raised:
        check_config(config, world_size)

    assert raised.value.key == key
    assert raised.value.value == attrgetter(key)(config)


def test_policies_to_evaluate_are_checked_where_there_is_a_router() -> None:
    policies = [PolicyConfig(), PolicyConfig(expert_policy="topk", num_experts_per_tok=9)]
    config = recipe({"evaluation.policies": policies})

    with pytest.raises(ConfigurationError, match="number of experts, 8") as raised:
        check_config(config, world_size=1)
    assert raised.value.key == "evaluation.policies[1].num_experts_per_tok"

    config.model = recipe(DENSE_BASELINE).model
    check_config(config, world_size=1)


def test_a_blend_needs_prefixes_and_weights() -> None:
    no_weight = recipe({"data.train": [DatasetSource("a"), DatasetSource("b", weight=0.0)]})
    no_prefix = recipe({"data.validation": [DatasetSource("")]})

    with pytest.raises(ConfigurationError, match=r"data.train\[1\].weight = 0.0: must be above 0"):
        check_config(no_weight, world_size=1)
    with pytest.raises(ConfigurationError, match=r"data.validation\[0\].prefix = '': must not be empty"):
        check_config(no_prefix, world_size=1)


def test_data_parallel_size_is_what_is_left_of_the_processes() -> None:
    config = recipe({"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.context": 2, "parallel.expert": 4})

    assert data_parallel_size(config, world_size=24) == 3


def numeric_keys(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of every number in a recipe, also of those that are null by default."""
    for name, hint in get_type_hints(type(section)).items():
        if is_dataclass(hint):
            yield from numeric_keys(getattr(section, name), f"{prefix}{name}.")
        elif hint in (int, float, int | None, float | None):
            yield prefix + name


@pytest.mark.parametrize("key", numeric_keys(Config()))
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_no_number_may_be_negative_or_undefined(key: str, value: float) -> None:
    with pytest.raises(ConfigurationError) as raised:
        check_config(recipe({key: value}), world_size=1)

    assert raised.value.key == key
