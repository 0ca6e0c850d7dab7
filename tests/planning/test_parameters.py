"""Parameter counts against the tensors that a model of the recipe is made of."""

from dataclasses import replace
from math import prod

import pytest

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.planning.parameters import active_parameters, active_share, count_parameters

MODEL = ModelConfig(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_experts=4,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=6,
    num_experts=5,
    moe_intermediate_size=7,
    router_hidden_size=11,
    vocab_size=100,
)


def exported_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer in the exported form: the experts' own weights, one by one."""
    hidden, width, kv_channels = (
        model.hidden_size,
        model.moe_intermediate_size,
        model.num_key_value_heads * model.head_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {"k_proj": (kv_channels, hidden), "v_proj": (kv_channels, hidden)}
    for expert in range(model.num_attention_heads // model.num_key_value_heads):
        shapes[f"q_experts.{expert}"] = (kv_channels, hidden)
        shapes[f"o_experts.{expert}"] = (hidden, kv_channels)
    for expert in range(model.num_experts):
        shapes[f"up_proj.{expert}"] = (width, hidden)
        shapes[f"down_proj.{expert}"] = (hidden, width)
        if model.gated_mlp:
            shapes[f"gate_proj.{expert}"] = (width, hidden)
    for kind, experts in (("self_attn", model.num_attention_experts), ("mlp", model.num_experts)):
        if experts == 1:
            continue
        if model.router_type == "linear":
            shapes[f"{kind}.router"] = (experts, hidden)
        else:
            shapes[f"{kind}.router.fc1"] = (model.router_hidden_size, hidden)
            shapes[f"{kind}.router.fc2"] = (experts, model.router_hidden_size)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{norm}.weight"] = (hidden,)
        if model.norm_type == "layernorm":
            shapes[f"{norm}.bias"] = (hidden,)
    return shapes


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        replace(MODEL, router_type="mlp"),
        replace(MODEL, gated_mlp=True, hidden_act="silu"),
        replace(MODEL, norm_type="layernorm"),
        replace(MODEL, attention_type="gqa", num_attention_experts=1),
        replace(MODEL, attention_type="gqa", num_attention_experts=1, num_experts=1),
    ],
)
def test_the_count_is_that_of_the_tensors(model: ModelConfig) -> None:
    layer = sum(prod(shape) for shape in exported_shapes(model).values())
    final_norm = model.hidden_size * (2 if model.norm_type == "layernorm" else 1)

    assert count_parameters(model).total_without_embeddings == model.num_hidden_layers * layer + final_norm


def test_embeddings_are_counted_in_padded_rows() -> None:
    untied, tied = count_parameters(MODEL), count_parameters(replace(MODEL, tie_word_embeddings=True))

    assert (untied.embeddings, tied.embeddings) == (2 * 128 * 24, 128 * 24)
    assert untied.total == untied.total_without_embeddings + 2 * 128 * 24
    assert count_parameters(replace(MODEL, vocab_size=None)).total is None


def test_active_parameters_leave_out_the_experts_that_rest() -> None:
    shapes = exported_shapes(MODEL)
    resting = [*(f"{kind}_experts.{expert}" for kind in "qo" for expert in (0, 1, 3))]
    resting += [f"{kind}_proj.{expert}" for kind in ("up", "down") for expert in (1, 4)]
    layer = sum(prod(shape) for name, shape in shapes.items() if name not in resting)

    active = active_parameters(MODEL, active_mlp_experts=3, active_attention_experts=1)

    assert active == pytest.approx(3 * layer + 24)
    assert active_share(MODEL, 3, 1) == pytest.approx(active / count_parameters(MODEL).total_without_embeddings)


def test_active_experts_may_differ_from_layer_to_layer() -> None:
    by_layer = active_parameters(MODEL, [1.0, 2.5, 4.0], [1.0, 4.0, 1.0])

    assert by_layer == pytest.approx(active_parameters(MODEL, 2.5, 2.0))
    assert active_share(MODEL, 5, 4) == 1.0


@pytest.mark.parametrize("active", [[1.0, 2.0], [1.0, 2.0, 6.0], 5.5, -1.0])
def test_impossible_numbers_of_active_experts_are_refused(active: float | list[float]) -> None:
    with pytest.raises(ValueError, match="active experts"):
        active_parameters(MODEL, active, 1)
