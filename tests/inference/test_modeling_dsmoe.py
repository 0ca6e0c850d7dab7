"""The exported model against the reference: logits, loss, gradients, every policy; generation, padding, saving."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.inference.routed_layers import DSMoERouter
from tests import reference_model as reference

VARIANTS = {
    "gelu_linear_moa": reference.ReferenceConfig(),
    "swiglu_mlp_router_layernorm_tied": reference.ReferenceConfig(
        hidden_act="silu", gated_mlp=True, router_type="mlp", norm_type="layernorm", tie_word_embeddings=True
    ),
    "gqa_mlp_experts": reference.ReferenceConfig(attention_type="gqa", num_attention_experts=1, gated_mlp=True),
    "moa_plain_mlp": reference.ReferenceConfig(num_experts=1),
    "dense_baseline": reference.ReferenceConfig(attention_type="gqa", num_attention_experts=1, num_experts=1),
}
LIMITS: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "attention_experts_per_tok": 2,
    "expert_threshold": 0.7,
    "attention_expert_threshold": 0.9,
}
POLICIES = ("dense", "topk", "threshold", "threshold_topk")


@pytest.fixture(params=VARIANTS)
def architecture(request: pytest.FixtureRequest) -> reference.ReferenceConfig:
    return VARIANTS[request.param]


def configuration(architecture: reference.ReferenceConfig, **values: Any) -> DSMoEConfig:
    names = {"rope_theta", "mi_alpha_attention", "mi_alpha_mlp"}
    shared = {name: value for name, value in vars(architecture).items() if name not in names}
    if architecture.num_experts == 1:
        values.pop("num_experts_per_tok", None)
    rope = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    return DSMoEConfig(**shared, rope_parameters=rope, eos_token_id=0, **values)


def build(
    architecture: reference.ReferenceConfig, dtype: torch.dtype = torch.float64, **values: Any
) -> tuple[DSMoEForCausalLM, dict[str, Tensor]]:
    """A model and the tensors that it holds; in float64 the experts run eagerly, other kernels stop at float32."""
    model = DSMoEForCausalLM(configuration(architecture, **{**LIMITS, **values})).to(dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    tensors = reference.random_tensors(architecture, dtype=dtype)
    state = dict(tensors)
    if architecture.tie_word_embeddings:
        state["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model, tensors


def assert_equal(
    actual: Tensor, expected: Tensor, name: str = "tensor", rtol: float = 1e-5, atol: float = 2e-6
) -> None:
    """Looser than float64 by the rotary angles, which are float32 in all of transformers' models."""
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)


def token_ids(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("policy", POLICIES)
def test_logits_and_router_logits_equal_the_reference(architecture: reference.ReferenceConfig, policy: Any) -> None:
    model, tensors = build(architecture)
    ids = token_ids()
    model.set_policy(policy)

    output = model(ids, output_router_logits=True, output_attention_router_logits=True)

    expected = reference.reference_forward(architecture, tensors, ids, reference.ReferencePolicy(policy, **LIMITS))
    assert_equal(output.logits, expected.logits)
    for kind, logits in (("mlp", output.router_logits), ("attention", output.attention_router_logits)):
        scores = [tensor for (_, router_kind), tensor in expected.scores.items() if router_kind == kind]
        assert len(logits or ()) == len(scores)
        for logits_TN, scores_BSN in zip(logits or (), scores, strict=True):
            assert_equal(logits_TN.softmax(-1), scores_BSN.flatten(0, 1))
    if policy != "dense":
        assert all(active.float().mean() < 1 for active in expected.active.values())


@pytest.mark.parametrize("policy", ["dense", "topk", "threshold"])
def test_loss_and_every_gradient_equal_the_reference(architecture: reference.ReferenceConfig, policy: Any) -> None:
    model, tensors = build(architecture)
    ids = token_ids()
    labels = ids.clone()
    labels[0, 4:7] = -100
    model.set_policy(policy)

    loss = model(ids, labels=labels).loss
    loss.backward()

    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    next_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = reference.reference_loss(
        architecture, leaves, ids, next_labels, reference.ReferencePolicy(policy, **LIMITS)
    )
    expected.backward()
    assert_equal(loss, expected)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == leaves.keys()
    for name, leaf in leaves.items():
        # transformers computes the loss in float32
        assert leaf.grad is not None
        assert_equal(gradients[name], leaf.grad, name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["per_expert", "eager", "grouped_mm", "batched_mm"])
def test_every_experts_implementation_is_sparse_inference(implementation: str) -> None:
    for architecture in (VARIANTS["gelu_linear_moa"], VARIANTS["gqa_mlp_experts"]):
        model, tensors = build(architecture, torch.float32)
        model.set_experts_implementation(implementation)
        for policy in ("topk", "threshold"):
            model.set_policy(policy)
            rules = reference.ReferencePolicy(policy, **LIMITS)
            expected = reference.reference_forward(architecture, tensors, token_ids(), rules)
            assert_equal(model(token_ids()).logits, expected.logits, rtol=1e-4, atol=2e-5)


def test_transformers_that_do_not_say_whether_experts_are_spread_over_processes() -> None:
    """5.17 and older have no such attribute; seen on a machine with that version."""
    model, tensors = build(VARIANTS["gelu_linear_moa"], torch.float32)
    for module in model.modules():
        vars(module).pop("_is_expert_parallel", None)
    model.set_policy("topk")

    expected = reference.reference_forward(
        VARIANTS["gelu_linear_moa"], tensors, token_ids(), reference.ReferencePolicy("topk", **LIMITS)
    )
    assert_equal(model(token_ids()).logits, expected.logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("policy", ["topk", "threshold"])
def test_inactive_experts_are_never_computed(policy: Any) -> None:
    """NaN weights of experts that no token chose leave no trace; scores times zero would."""
    architecture = dataclasses.replace(VARIANTS["gelu_linear_moa"], num_attention_experts=8, num_attention_heads=16)
    limits = {**LIMITS, "expert_threshold": 1.3}
    model, tensors = build(architecture, **limits)
    model.set_policy(policy)
    ids = token_ids(1, 2)
    expected = reference.reference_forward(architecture, tensors, ids, reference.ReferencePolicy(policy, **limits))
    parameters = {"mlp": ["mlp.experts.up_proj", "mlp.experts.down_proj"]}
    if policy == "topk":  # under a threshold the attention is computed dense and its gates are masked
        parameters["attention"] = ["self_attn.q_experts", "self_attn.o_experts"]

    for kind, names in parameters.items():
        for layer in range(architecture.num_hidden_layers):
            unused = ~expected.active[layer, kind].flatten(0, 1).any(dim=0)
            assert unused.any()
            for name in names:
                model.get_parameter(f"model.layers.{layer}.{name}").data[unused] = torch.nan

    assert_equal(model(ids).logits, expected.logits)


def test_layers_may_have_limits_of_their_own() -> None:
    architecture = VARIANTS["gelu_linear_moa"]
    model, tensors = build(architecture)
    layers = [{"mlp": {"k": 1}, "attention": {"k": 3}}, {"mlp": {"k": 4}, "attention": {"k": 1}}]

    model.set_policy("topk", expert_policy_layers=layers)

    rules = reference.ReferencePolicy("topk", expert_policy_layers=layers)
    expected = reference.reference_forward(architecture, tensors, token_ids(), rules)
    assert_equal(model(token_ids()).logits, expected.logits)


@pytest.mark.parametrize("router_type", ["linear", "mlp"])
def test_routers_stay_in_float32_under_autocast(router_type: Any) -> None:
    architecture = dataclasses.replace(VARIANTS["gelu_linear_moa"], router_type=router_type)
    model, _ = build(architecture, torch.float32)
    routers = [module for module in model.modules() if isinstance(module, DSMoERouter)]
    hidden_TH = torch.randn(50, architecture.hidden_size)
    expected = [router(hidden_TH) for router in routers]

    with torch.autocast("cpu", torch.bfloat16):
        found = [router(hidden_TH) for router in routers]

    assert len(routers) == 2 * architecture.num_hidden_layers
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


# transformers' eager attention masks by the most negative number of the dtype and takes the softmax in float32, where
# float64's overflows
@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", torch.float64), ("eager", torch.float32)])
@pytest.mark.parametrize("policy", POLICIES)
def test_padding_on_the_left_changes_nothing(policy: Any, attention: str, dtype: torch.dtype) -> None:
    architecture = VARIANTS["gelu_linear_moa"]
    model, tensors = build(architecture, dtype)
    model.set_attn_implementation(attention)
    model.set_policy(policy)
    ids, padding = token_ids(2, 9), 4
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0

    logits = model(ids.masked_fill(mask == 0, 0), attention_mask=mask).logits

    rules = reference.ReferencePolicy(policy, **LIMITS)
    expected = reference.reference_forward(architecture, tensors, ids, rules, mask).logits
    assert_equal(logits[mask == 1], expected[mask == 1])
    if policy != "threshold_topk":  # which depends on the batch
        alone = model(ids[1:, padding:]).logits
        assert_equal(logits[1:, padding:], alone)


@pytest.mark.parametrize("policy", ["dense", "topk", "threshold"])
def test_cached_generation_equals_full_forward_passes(policy: Any) -> None:
    model, _ = build(VARIANTS["gelu_linear_moa"], torch.float32)
    model.set_policy(policy)
    ids = token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    for row, start in ((0, 0), (1, 3)):
        text = ids[row : row + 1, start:]
        for _ in range(8):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert generated[row, start:].tolist() == text[0].tolist()


def test_gradient_checkpointing_keeps_the_gradients() -> None:
    model, _ = build(VARIANTS["gelu_linear_moa"])
    ids = token_ids()
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])

    for plain, checkpointed in zip(*gradients, strict=True):
        assert_equal(checkpointed, plain)


def test_bfloat16_keeps_the_routers_arithmetic_in_float32() -> None:
    # grouped_mm wants rows of whole 16 bytes
    model, _ = build(dataclasses.replace(VARIANTS["gelu_linear_moa"], moe_intermediate_size=16), torch.bfloat16)
    model.set_policy("threshold")

    output = model(token_ids(), output_router_logits=True)

    assert output.logits.dtype == torch.bfloat16
    assert {logits.dtype for logits in output.router_logits} == {torch.float32}
    assert output.logits.isfinite().all()


def test_save_and_load_keep_weights_and_policy(tmp_path: Path) -> None:
    model, _ = build(VARIANTS["swiglu_mlp_router_layernorm_tied"], torch.float32)
    model.set_policy("topk", num_experts_per_tok=3)
    model.save_pretrained(tmp_path)

    loaded = DSMoEForCausalLM.from_pretrained(tmp_path)
    dense = DSMoEForCausalLM.from_pretrained(tmp_path, expert_policy="dense")

    assert (loaded.config.expert_policy, loaded.config.num_experts_per_tok) == ("topk", 3)
    assert_equal(loaded(token_ids()).logits, model(token_ids()).logits)
    model.set_policy("dense")
    assert_equal(dense(token_ids()).logits, model(token_ids()).logits)


def test_threshold_topk_does_not_generate() -> None:
    model, _ = build(VARIANTS["gelu_linear_moa"], torch.float32)
    model.set_policy("threshold_topk")

    with pytest.raises(ValueError, match=r"expert_policy = 'threshold_topk': .*evaluation only"):
        model.generate(token_ids())


def test_a_policy_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model, _ = build(VARIANTS["gelu_linear_moa"])
    before = model(token_ids()).logits

    with pytest.raises(ValueError, match="num_experts_per_tok = 6: "):
        model.set_policy("topk", num_experts_per_tok=6)

    assert model.config.expert_policy == "dense"
    assert torch.equal(model(token_ids()).logits, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads = 8: must be num_attention_experts x num_key_value_heads"),
        ({"attention_type": "mha"}, "attention_type = 'mha': must be one of moa, gqa"),
        ({"attention_type": "gqa"}, "num_attention_experts = 3: must be 1 with gqa"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu': "),
        ({"norm_topk_prob": True}, "norm_topk_prob = True: "),
        ({"head_dim": 7}, "head_dim = 7: must be even"),
        ({"expert_policy": "threshold"}, "expert_threshold = None: "),
    ],
)
def test_a_configuration_that_breaks_a_rule_is_refused(values: dict[str, Any], message: str) -> None:
    architecture = vars(VARIANTS["gelu_linear_moa"])
    names = ("num_attention_experts", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts")

    with pytest.raises(ValueError, match=message):
        DSMoEConfig(**{**{name: architecture[name] for name in names}, **values})
