"""The choosing rules: examples worked by hand, then random scores against the reference's own rules."""

from typing import Any

import pytest
import torch

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.inference.policy import ExpertPolicy, PolicyError, RouterKind, active_experts
from tests import reference_model as reference

# four experts: E x S is 4 times these
SCORES_TE = torch.tensor(
    [
        [0.70, 0.10, 0.10, 0.10],  # 2.8, 0.4, 0.4, 0.4
        [0.05, 0.15, 0.30, 0.50],  # 0.2, 0.6, 1.2, 2.0
        [0.25, 0.25, 0.25, 0.25],  # all 1.0
    ]
)


def chosen(policy: ExpertPolicy, scores_TE: torch.Tensor = SCORES_TE, **options: Any) -> list[list[int]]:
    """Indices of the active experts of each token."""
    mask_TE = active_experts(scores_TE, policy, 0, "mlp", **options)
    assert mask_TE.dtype == torch.bool
    return [row.nonzero().flatten().tolist() for row in mask_TE]


def test_dense_activates_every_expert() -> None:
    assert chosen(ExpertPolicy()) == [[0, 1, 2, 3]] * 3


def test_topk_takes_the_best_and_breaks_ties_by_index() -> None:
    assert chosen(ExpertPolicy("topk", num_experts_per_tok=1)) == [[0], [3], [0]]
    assert chosen(ExpertPolicy("topk", num_experts_per_tok=2)) == [[0, 1], [2, 3], [0, 1]]
    assert chosen(ExpertPolicy("topk")) == [[0, 1, 2, 3]] * 3


def test_threshold_is_in_units_of_the_uniform_probability_and_strict() -> None:
    assert chosen(ExpertPolicy("threshold", expert_threshold=0.5)) == [[0], [1, 2, 3], [0, 1, 2, 3]]
    # 1.0 is not above 1.0: the uniform token keeps its best expert alone
    assert chosen(ExpertPolicy("threshold", expert_threshold=1.0)) == [[0], [2, 3], [0]]
    assert chosen(ExpertPolicy("threshold", expert_threshold=3.9)) == [[0], [3], [0]]
    assert chosen(ExpertPolicy("threshold", expert_threshold=0.0)) == [[0, 1, 2, 3]] * 3


def test_threshold_topk_gives_every_token_the_mean_count() -> None:
    policy = ExpertPolicy("threshold_topk", expert_threshold=0.5)

    # counts 1, 3, 4: their mean 2.67 is 3; without the last token 2; halves go to the even number
    assert chosen(policy) == [[0, 1, 2], [1, 2, 3], [0, 1, 2]]
    assert chosen(policy, token_mask_T=torch.tensor([True, True, False])) == [[0, 1], [2, 3], [0, 1]]
    assert chosen(policy, token_mask_T=torch.tensor([True, False, True])) == [[0, 1], [2, 3], [0, 1]]
    assert chosen(policy, token_mask_T=torch.tensor([False, True, True])) == [[0, 1, 2, 3]] * 3
    assert chosen(ExpertPolicy("threshold_topk", expert_threshold=3.9)) == [[0], [3], [0]]


def test_attention_limits_stand_beside_the_mlps() -> None:
    topk = ExpertPolicy("topk", num_experts_per_tok=1, attention_experts_per_tok=3)
    threshold = ExpertPolicy("threshold", expert_threshold=3.9, attention_expert_threshold=0.5)

    assert active_experts(SCORES_TE, topk, 0, "attention").sum(-1).tolist() == [3, 3, 3]
    assert active_experts(SCORES_TE, threshold, 0, "attention").sum(-1).tolist() == [1, 3, 4]
    # without limits of its own the attention activates all under topk, and takes the MLP's eps under threshold
    assert active_experts(SCORES_TE, ExpertPolicy("topk", num_experts_per_tok=1), 0, "attention").all()
    alone = ExpertPolicy("threshold", expert_threshold=3.9)
    assert active_experts(SCORES_TE, alone, 0, "attention").sum(-1).tolist() == [1, 1, 1]


def test_layers_override_the_scalars() -> None:
    layers = [{"mlp": {"k": 1}, "attention": {"k": 3}}, {"mlp": {"k": 4}}]
    policy = ExpertPolicy("topk", attention_experts_per_tok=1, expert_policy_layers=layers)
    policy.validate(num_layers=2, num_experts=4, num_attention_experts=4)

    def counts(layer: int, kind: RouterKind) -> list[int]:
        return active_experts(SCORES_TE, policy, layer, kind).sum(-1).tolist()

    assert counts(0, "mlp") == [1, 1, 1]
    assert counts(0, "attention") == [3, 3, 3]
    assert counts(1, "mlp") == [4, 4, 4]
    assert counts(1, "attention") == [1, 1, 1]


@pytest.mark.parametrize("name", ["dense", "topk", "threshold", "threshold_topk"])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_random_scores_equal_the_references_rules(name: Any, kind: RouterKind) -> None:
    generator = torch.Generator().manual_seed(1)
    for num_experts in (2, 5, 32):
        logits_BTE = 2 * torch.randn(3, 11, num_experts, generator=generator)
        logits_BTE[0] = logits_BTE[0].round()  # many equal scores
        scores_BTE = logits_BTE.softmax(-1)
        token_mask_BT = torch.rand(3, 11, generator=generator) > 0.3
        limits: dict[str, Any] = {
            "num_experts_per_tok": 2,
            "attention_experts_per_tok": 1,
            "expert_threshold": 0.71,
            "attention_expert_threshold": 1.3,
        }

        mask_BTE = active_experts(scores_BTE, ExpertPolicy(name, **limits), 0, kind, token_mask_BT)

        rules = reference.ReferencePolicy(name, **limits)
        assert torch.equal(mask_BTE, reference.active_experts(scores_BTE, rules, (0, kind), token_mask_BT))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_policy": "best"}, "expert_policy = 'best': must be one of dense, topk"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0: must be a whole number from 1 to the 8 experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9: "),
        ({"num_experts_per_tok": 2.0}, r"num_experts_per_tok = 2\.0: "),
        ({"attention_experts_per_tok": 5}, "attention_experts_per_tok = 5: .* 4 experts"),
        ({"expert_threshold": -0.1}, r"expert_threshold = -0\.1: must be a number"),
        ({"attention_expert_threshold": float("nan")}, "attention_expert_threshold = nan: "),
        ({"expert_policy": "threshold"}, "expert_threshold = None: the threshold policy needs it"),
        ({"expert_policy_layers": [{}, {}]}, "expert_policy_layers = .*: the dense policy has no limits"),
        ({"expert_policy": "topk", "expert_policy_layers": [{}]}, "one entry per layer, 2 in all"),
        ({"expert_policy": "topk", "expert_policy_layers": [{}, {"mlp": {"eps": 1}}]}, r"layers\[1\]\.mlp = .*\"k\""),
        ({"expert_policy": "topk", "expert_policy_layers": [{}, {"mlp": {"k": 9}}]}, r"layers\[1\]\.mlp\.k = 9: "),
        ({"expert_policy": "topk", "expert_policy_layers": [{"moe": {"k": 1}}, {}]}, r"layers\[0\] = .*must map"),
        (
            {"expert_policy": "topk", "num_experts_per_tok": 2, "expert_policy_layers": 2 * [{"mlp": {"k": 1}}]},
            "num_experts_per_tok = 2: expert_policy_layers has limits of its own in every layer",
        ),
        (
            {"expert_policy": "threshold", "expert_threshold": 0.5}
            | {"expert_policy_layers": 2 * [{"mlp": {"eps": 1}, "attention": {"eps": 1}}]},
            "expert_threshold = 0.5: expert_policy_layers has limits of its own in every layer",
        ),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message) as error:
        ExpertPolicy(**values).validate(num_layers=2, num_experts=8, num_attention_experts=4)

    assert "\n" not in str(error.value)


def test_a_kind_without_a_router_needs_no_limits() -> None:
    ExpertPolicy("topk", num_experts_per_tok=2).validate(num_layers=2, num_experts=1, num_attention_experts=1)


def test_the_recipes_model_section_describes_a_policy() -> None:
    model = ModelConfig(expert_policy="topk", num_experts_per_tok=3)

    policy = ExpertPolicy.from_config(model)

    assert policy == ExpertPolicy("topk", num_experts_per_tok=3, expert_threshold=model.expert_threshold)


def test_a_new_threshold_given_alone_holds_for_the_attention() -> None:
    policy = ExpertPolicy("threshold", expert_threshold=0.5, attention_expert_threshold=0.3)

    assert policy.with_changes({"expert_threshold": 0.9}).threshold(0, "attention") == 0.9
    assert policy.with_changes({"num_experts_per_tok": 2}).threshold(0, "attention") == 0.3
    both = policy.with_changes({"expert_threshold": 0.9, "attention_expert_threshold": 0.1})
    assert both.threshold(0, "attention") == 0.1
