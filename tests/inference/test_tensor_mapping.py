"""The tensor table: both ways exact, and Megatron's layouts computed Megatron's way equal the reference's experts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from tests import reference_model as reference

VARIANTS = {
    "gelu_linear_moa": reference.ReferenceConfig(),
    "swiglu_mlp_router_layernorm_tied": reference.ReferenceConfig(
        hidden_act="silu", gated_mlp=True, router_type="mlp", norm_type="layernorm", tie_word_embeddings=True
    ),
    "gqa_mlp_experts": reference.ReferenceConfig(attention_type="gqa", num_attention_experts=1),
    "dense_baseline": reference.ReferenceConfig(attention_type="gqa", num_attention_experts=1, num_experts=1),
}
PADDED_VOCABULARY = 64


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> reference.ReferenceConfig:
    return VARIANTS[request.param]


def mapping_of(config: reference.ReferenceConfig) -> TensorMapping:
    return TensorMapping(config, config.vocab_size, PADDED_VOCABULARY)


def test_exported_names_and_shapes_are_the_references(config: reference.ReferenceConfig) -> None:
    assert mapping_of(config).exported_shapes() == reference.tensor_shapes(config)


def test_both_ways_give_the_tensors_back(config: reference.ReferenceConfig) -> None:
    mapping, exported = mapping_of(config), reference.random_tensors(config)

    megatron = mapping.to_megatron(exported)
    again = mapping.to_exported(megatron)

    assert {name: tuple(tensor.shape) for name, tensor in megatron.items()} == mapping.megatron_shapes()
    assert sum(tensor.count_nonzero() for tensor in megatron.values()) == sum(map(torch.numel, exported.values()))
    for name, tensor in exported.items():
        assert torch.equal(again[name], tensor), name


def test_wide_mlp_in_megatrons_layout_equals_the_sum_over_experts(config: reference.ReferenceConfig) -> None:
    exported = reference.random_tensors(config)
    megatron = mapping_of(config).to_megatron(exported)
    hidden_BTH = torch.randn(2, 7, config.hidden_size, dtype=torch.float64)
    gates_BTN = torch.rand(2, 7, config.num_experts, dtype=torch.float64)

    expected = reference.mlp(config, exported, "model.layers.1.mlp.experts", hidden_BTH, gates_BTN)
    units = hidden_BTH @ megatron["decoder.layers.mlp.linear_fc1.weight"][1].T
    if config.gated_mlp:
        gate, up = units.chunk(2, dim=-1)
        units = F.silu(gate) * up
    else:
        units = F.gelu(units)
    units = units * gates_BTN.repeat_interleave(config.moe_intermediate_size, dim=-1)
    output = units @ megatron["decoder.layers.mlp.linear_fc2.weight"][1].T

    torch.testing.assert_close(output, expected)


def test_fused_qkv_in_megatrons_layout_equals_the_heads(config: reference.ReferenceConfig) -> None:
    exported = reference.random_tensors(config)
    megatron = mapping_of(config).to_megatron(exported)
    hidden_BTH = torch.randn(2, 7, config.hidden_size, dtype=torch.float64)
    experts = config.num_attention_experts
    gates_BTN = torch.rand(2, 7, experts, dtype=torch.float64) if config.attention_type == "moa" else None
    token_mask_BT = torch.ones(2, 7, dtype=torch.bool)

    expected = reference.attention(config, exported, "model.layers.1.self_attn", hidden_BTH, gates_BTN, token_mask_BT)
    groups, per_group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    qkv = hidden_BTH @ megatron["decoder.layers.self_attention.linear_qkv.weight"][1].T
    qkv_BGPTD = qkv.view(2, 7, groups, per_group + 2, config.head_dim).permute(0, 2, 3, 1, 4)
    heads_BGPTD = attend_in_groups(config, qkv_BGPTD)
    if gates_BTN is not None:
        heads_BGPTD = heads_BGPTD * gates_BTN.transpose(1, 2)[:, None, :, :, None]
    heads_BTE = heads_BGPTD.permute(0, 3, 1, 2, 4).flatten(2)
    output = heads_BTE @ megatron["decoder.layers.self_attention.linear_proj.weight"][1].T

    torch.testing.assert_close(output, expected)


def attend_in_groups(config: reference.ReferenceConfig, qkv_BGPTD: Tensor) -> Tensor:
    """Causal attention of each group's query heads over its last two entries, key and value."""

    def turned(tensor: Tensor) -> Tensor:
        return reference.rotate(config, tensor.flatten(0, -3)).view(tensor.shape)

    query, key, value = qkv_BGPTD[:, :, :-2], qkv_BGPTD[:, :, -2:-1], qkv_BGPTD[:, :, -1:]
    return F.scaled_dot_product_attention(
        turned(query), turned(key).expand_as(query), value.expand_as(query), is_causal=True
    )


def test_vocabulary_is_cut_and_padded_with_zeros() -> None:
    config = VARIANTS["gelu_linear_moa"]
    mapping, exported = mapping_of(config), reference.random_tensors(config)

    megatron = mapping.to_megatron(exported)
    megatron["output_layer.weight"][config.vocab_size :] = 7.0

    assert megatron["embedding.word_embeddings.weight"][config.vocab_size :].count_nonzero() == 0
    assert torch.equal(mapping.to_exported(megatron)["lm_head.weight"], exported["lm_head.weight"])


@pytest.mark.parametrize("attention", [{}, {"attention_type": "gqa", "num_attention_experts": 1}], ids=["moa", "gqa"])
@pytest.mark.parametrize("gated", [False, True])
def test_sparse_trained_baseline_keeps_its_expert_axis(gated: bool, attention: dict[str, Any]) -> None:
    config = reference.ReferenceConfig(**attention, gated_mlp=gated)
    mapping = TensorMapping(config, config.vocab_size, PADDED_VOCABULARY, expert_training="sparse")
    exported = reference.random_tensors(config)

    megatron = mapping.to_megatron(exported)

    up = "gate_up_proj" if gated else "up_proj"
    fc1 = megatron["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert torch.equal(fc1[1, 3], exported[f"model.layers.1.mlp.experts.{up}"][3])
    assert torch.equal(megatron["decoder.layers.mlp.router.weight"][1], exported["model.layers.1.mlp.gate.weight"])
    assert all(torch.equal(tensor, exported[name]) for name, tensor in mapping.to_exported(megatron).items())


def test_llama_target_splits_the_gated_mlp() -> None:
    config = reference.ReferenceConfig(
        attention_type="gqa", num_attention_experts=1, num_experts=1, gated_mlp=True, hidden_act="silu"
    )
    megatron = mapping_of(config).to_megatron(reference.random_tensors(config))
    mapping = TensorMapping(config, config.vocab_size, PADDED_VOCABULARY, target="llama")

    exported = mapping.to_exported(megatron)

    fc1 = megatron["decoder.layers.mlp.linear_fc1.weight"][0]
    assert torch.equal(exported["model.layers.0.mlp.gate_proj.weight"], fc1[: config.moe_intermediate_size])
    assert torch.equal(exported["model.layers.0.mlp.up_proj.weight"], fc1[config.moe_intermediate_size :])
    again = mapping.to_megatron(exported)
    assert torch.equal(again["decoder.layers.mlp.linear_fc1.weight"][0], fc1)


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named() -> None:
    config = VARIANTS["gelu_linear_moa"]
    mapping = mapping_of(config)
    megatron = mapping.to_megatron(reference.random_tensors(config))
    weight = megatron.pop("decoder.layers.mlp.linear_fc2.weight")

    with pytest.raises(CheckpointError, match=r"lacks decoder\.layers\.mlp\.linear_fc2\.weight"):
        mapping.to_exported(megatron)
    with pytest.raises(CheckpointError, match=r"unknown decoder\.layers\.mlp\.linear_fc2\.bias"):
        mapping.to_exported(
            {
                **megatron,
                "decoder.layers.mlp.linear_fc2.weight": weight,
                **{"decoder.layers.mlp.linear_fc2.bias": weight},
            }
        )
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight has shape"):
        mapping.to_exported({**megatron, "decoder.layers.mlp.linear_fc2.weight": weight.transpose(1, 2)})
    with pytest.raises(CheckpointError, match=r"lacks .*model\.layers\.1\.mlp\.gate\.weight"):
        mapping.to_megatron({})


def test_the_recipes_model_section_is_an_architecture() -> None:
    config = ModelConfig(vocab_size=100)

    mapping = TensorMapping(config, config.vocab_size or 0, config.padded_vocab_size)

    assert mapping.exported_shapes()["lm_head.weight"] == (100, config.hidden_size)
    assert mapping.megatron_shapes()["output_layer.weight"] == (128, config.hidden_size)
