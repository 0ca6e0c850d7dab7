"""The DS-MoE language model straight from the paper's equations: what every implementation is held against.

Plain PyTorch in the dtype of the tensors that it is given (float64 in the tests), a Python loop over experts and over
query heads, nothing fused, nothing of this package imported. Slow on purpose; sizes of a few dozen units are meant.

Source: arXiv 2404.05567 ("Dense Training, Sparse Inference"); equation numbers are the paper's.
Shape suffixes: B batch, T positions, C counted tokens, N experts, H hidden size, F units of one expert, D head width,
E width of all key/value heads, R router width, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Router = tuple[int, str]
"""A router's place: (layer, "attention" or "mlp")."""


@dataclass(frozen=True)
class ReferenceConfig:
    """Architecture, under the names of the exported config.json (rope_theta and the two alphas stand by themselves)."""

    vocab_size: int = 61
    hidden_size: int = 24
    num_hidden_layers: int = 2
    num_key_value_heads: int = 2
    head_dim: int = 8
    attention_type: str = "moa"
    num_attention_experts: int = 3
    num_attention_heads: int = 6
    num_experts: int = 5
    moe_intermediate_size: int = 12
    hidden_act: str = "gelu"
    gated_mlp: bool = False
    router_type: str = "linear"
    router_hidden_size: int = 10
    norm_type: str = "rmsnorm"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    mi_alpha_attention: float = 0.0
    mi_alpha_mlp: float = 0.0


@dataclass(frozen=True)
class ReferencePolicy:
    """Which experts are active (section 4.3), under the names of the exported config.json."""

    expert_policy: str = "dense"
    num_experts_per_tok: int | None = None
    attention_experts_per_tok: int | None = None
    expert_threshold: float | None = None
    attention_expert_threshold: float | None = None
    expert_policy_layers: Sequence[Mapping[str, Mapping[str, Any]]] | None = None


@dataclass
class ReferenceOutput:
    """What one forward pass computes.

    Attributes:
        logits: [B, T, V].
        mi_losses: mutual-information loss of each router, not yet weighted, scalars.
        scores: probabilities of each router before any expert is left out, [B, T, N].
        active: which experts each router's policy chose, bool, [B, T, N].
    """

    logits: Tensor
    mi_losses: dict[Router, Tensor] = field(default_factory=dict)
    scores: dict[Router, Tensor] = field(default_factory=dict)
    active: dict[Router, Tensor] = field(default_factory=dict)


def tensor_shapes(config: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `reference_forward` reads, in the exported layout."""
    hidden, heads_width = config.hidden_size, config.num_key_value_heads * config.head_dim
    experts, units = config.num_experts, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def add_norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if config.norm_type == "layernorm":
            shapes[f"{name}.bias"] = (hidden,)

    def add_router(name: str, num_experts: int) -> None:
        if config.router_type == "linear":
            shapes[f"{name}.weight"] = (num_experts, hidden)
        else:
            shapes[f"{name}.fc1.weight"] = (config.router_hidden_size, hidden)
            shapes[f"{name}.fc2.weight"] = (num_experts, config.router_hidden_size)

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        add_norm(f"{prefix}.input_layernorm")
        add_norm(f"{prefix}.post_attention_layernorm")
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (heads_width, hidden)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (heads_width, hidden)
        if config.attention_type == "moa":
            add_router(f"{prefix}.self_attn.router", config.num_attention_experts)
            shapes[f"{prefix}.self_attn.q_experts"] = (config.num_attention_experts, heads_width, hidden)
            shapes[f"{prefix}.self_attn.o_experts"] = (config.num_attention_experts, hidden, heads_width)
        else:
            shapes[f"{prefix}.self_attn.q_proj.weight"] = (config.num_attention_heads * config.head_dim, hidden)
            shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, config.num_attention_heads * config.head_dim)
        if experts > 1:
            add_router(f"{prefix}.mlp.gate", experts)
        if config.gated_mlp:
            shapes[f"{prefix}.mlp.experts.gate_up_proj"] = (experts, 2 * units, hidden)
        else:
            shapes[f"{prefix}.mlp.experts.up_proj"] = (experts, units, hidden)
        shapes[f"{prefix}.mlp.experts.down_proj"] = (experts, hidden, units)
    add_norm("model.norm")
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def random_tensors(config: ReferenceConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random weights, far enough from zero that the routers disagree and every term counts."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = torch.randn(shape, generator=generator, dtype=dtype)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif "router" in name or "mlp.gate" in name:
            values = values / math.sqrt(shape[-1])
        else:
            values = 0.2 * values
        tensors[name] = values
    return tensors


def reference_forward(
    config: ReferenceConfig,
    tensors: Mapping[str, Tensor],
    ids_BT: Tensor,
    policy: ReferencePolicy | None = None,
    attention_mask_BT: Tensor | None = None,
) -> ReferenceOutput:
    """Logits and routing of the whole sequence, without a cache.

    Args:
        config: architecture.
        tensors: weights under the exported names; `tensor_shapes` lists them.
        ids_BT: token ids.
        policy: which experts are active; None is dense (equation 3).
        attention_mask_BT: non-zero for tokens, zero for padding; padding is neither attended to nor counted in the
            mutual information and in threshold_topk. None counts all.
    """
    policy = policy or ReferencePolicy()
    token_mask_BT = torch.ones_like(ids_BT).bool() if attention_mask_BT is None else attention_mask_BT.bool()
    output = ReferenceOutput(logits=torch.empty(0))

    def gates(router: Router, name: str, hidden_BTH: Tensor) -> Tensor:
        """Scores of the active experts, zero for the others; records the router's figures."""
        scores_BTN = router_scores(config, tensors, name, hidden_BTH)
        output.scores[router] = scores_BTN
        output.mi_losses[router] = mutual_information_loss(scores_BTN[token_mask_BT])
        output.active[router] = active_experts(scores_BTN, policy, router, token_mask_BT)
        return scores_BTN * output.active[router]  # not renormalised (equation 1)

    hidden_BTH = tensors["model.embed_tokens.weight"][ids_BT]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"

        normed_BTH = normalise(config, tensors, f"{prefix}.input_layernorm", hidden_BTH)
        attention_gates_BTN = None
        if config.attention_type == "moa":
            attention_gates_BTN = gates((layer, "attention"), f"{prefix}.self_attn.router", normed_BTH)
        hidden_BTH = hidden_BTH + attention(
            config, tensors, f"{prefix}.self_attn", normed_BTH, attention_gates_BTN, token_mask_BT
        )

        normed_BTH = normalise(config, tensors, f"{prefix}.post_attention_layernorm", hidden_BTH)
        if config.num_experts > 1:
            mlp_gates_BTN = gates((layer, "mlp"), f"{prefix}.mlp.gate", normed_BTH)
        else:
            mlp_gates_BTN = normed_BTH.new_ones(*normed_BTH.shape[:2], 1)
        hidden_BTH = hidden_BTH + mlp(config, tensors, f"{prefix}.mlp.experts", normed_BTH, mlp_gates_BTN)

    hidden_BTH = normalise(config, tensors, "model.norm", hidden_BTH)
    output_embedding = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    output.logits = hidden_BTH @ tensors[output_embedding].T
    return output


def reference_loss(
    config: ReferenceConfig,
    tensors: Mapping[str, Tensor],
    ids_BT: Tensor,
    labels_BT: Tensor,
    policy: ReferencePolicy | None = None,
    attention_mask_BT: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy plus alpha times each router's mutual-information loss, in nats: a scalar to differentiate.

    Args:
        labels_BT: the token that follows each position; -100 where a position does not count.
        config, tensors, ids_BT, policy, attention_mask_BT: as in `reference_forward`.
    """
    output = reference_forward(config, tensors, ids_BT, policy, attention_mask_BT)
    loss = F.cross_entropy(output.logits.flatten(0, 1), labels_BT.flatten(), ignore_index=-100)
    for (_, kind), mi_loss in output.mi_losses.items():
        loss = loss + (config.mi_alpha_attention if kind == "attention" else config.mi_alpha_mlp) * mi_loss
    return loss


def router_scores(config: ReferenceConfig, tensors: Mapping[str, Tensor], name: str, hidden_BTH: Tensor) -> Tensor:
    """Probabilities of the experts, [B, T, N]."""
    if config.router_type == "linear":
        logits_BTN = hidden_BTH @ tensors[f"{name}.weight"].T
    else:
        inner_BTR = F.gelu(hidden_BTH @ tensors[f"{name}.fc1.weight"].T)
        logits_BTN = inner_BTR @ tensors[f"{name}.fc2.weight"].T
    return torch.softmax(logits_BTN, dim=-1)


def mutual_information_loss(scores_CN: Tensor) -> Tensor:
    """Equations 4-6 over the C tokens that count: -H(e) + mean of H(e|x), natural logarithm."""
    mean_N = scores_CN.mean(dim=0)
    marginal_entropy = -torch.special.xlogy(mean_N, mean_N).sum()
    conditional_entropy = -torch.special.xlogy(scores_CN, scores_CN).sum(dim=-1).mean()
    return -marginal_entropy + conditional_entropy


def active_experts(scores_BTN: Tensor, policy: ReferencePolicy, router: Router, token_mask_BT: Tensor) -> Tensor:
    """The three choosing rules of section 4.3, token by token; equal scores go to the expert that comes first."""
    layer, kind = router
    num_experts = scores_BTN.shape[-1]
    top_k, threshold = policy_limits(policy, layer, kind, num_experts)

    def best(scores_N: list[float], count: int) -> list[int]:
        return sorted(range(num_experts), key=lambda expert: (-scores_N[expert], expert))[:count]

    def above_threshold(scores_N: list[float]) -> list[int]:
        return [expert for expert in range(num_experts) if num_experts * scores_N[expert] > threshold] or best(
            scores_N, 1
        )

    if policy.expert_policy == "threshold_topk":
        counts = [len(above_threshold(scores_N)) for scores_N in scores_BTN[token_mask_BT].tolist()]
        top_k = max(1, round(sum(counts) / len(counts)))

    active_BTN = torch.zeros_like(scores_BTN, dtype=torch.bool)
    for row, scores_TN in enumerate(scores_BTN.tolist()):
        for position, scores_N in enumerate(scores_TN):
            chosen = above_threshold(scores_N) if policy.expert_policy == "threshold" else best(scores_N, top_k)
            active_BTN[row, position, chosen] = True
    return active_BTN


def policy_limits(policy: ReferencePolicy, layer: int, kind: str, num_experts: int) -> tuple[int, float]:
    """K and eps of one router; K is all experts where the policy does not name one."""
    top_k, threshold = policy.num_experts_per_tok, policy.expert_threshold
    if kind == "attention":
        top_k = policy.attention_experts_per_tok
        if policy.attention_expert_threshold is not None:
            threshold = policy.attention_expert_threshold
    if policy.expert_policy_layers is not None:
        entry = policy.expert_policy_layers[layer].get(kind, {})
        top_k, threshold = entry.get("k", top_k), entry.get("eps", threshold)
    if policy.expert_policy == "dense" or top_k is None:
        top_k = num_experts
    return top_k, math.nan if threshold is None else threshold


def mlp(
    config: ReferenceConfig, tensors: Mapping[str, Tensor], name: str, hidden_BTH: Tensor, gates_BTN: Tensor
) -> Tensor:
    """Equation 3: the sum over the experts of gate x expert output."""
    activation: Callable[[Tensor], Tensor] = F.gelu if config.hidden_act == "gelu" else F.silu
    units = config.moe_intermediate_size
    output_BTH = torch.zeros_like(hidden_BTH)
    for expert in range(config.num_experts):
        if config.gated_mlp:
            gate_up = tensors[f"{name}.gate_up_proj"][expert]
            inner_BTF = activation(hidden_BTH @ gate_up[:units].T) * (hidden_BTH @ gate_up[units:].T)
        else:
            inner_BTF = activation(hidden_BTH @ tensors[f"{name}.up_proj"][expert].T)
        expert_output_BTH = inner_BTF @ tensors[f"{name}.down_proj"][expert].T
        output_BTH = output_BTH + gates_BTN[..., expert, None] * expert_output_BTH
    return output_BTH


def attention(
    config: ReferenceConfig,
    tensors: Mapping[str, Tensor],
    name: str,
    hidden_BTH: Tensor,
    gates_BTN: Tensor | None,
    token_mask_BT: Tensor,
) -> Tensor:
    """Equations 7-8: expert i owns one query head per key/value head j; keys and values are shared by all experts.

    Without gates this is grouped-query attention: query head h reads key/value head h // (heads per group).
    """
    width = config.head_dim
    keys_BTE = hidden_BTH @ tensors[f"{name}.k_proj.weight"].T
    values_BTE = hidden_BTH @ tensors[f"{name}.v_proj.weight"].T
    per_group = config.num_attention_heads // config.num_key_value_heads
    output_BTH = torch.zeros_like(hidden_BTH)
    for group in range(config.num_key_value_heads):
        group_rows = slice(group * width, (group + 1) * width)
        keys_BTD = rotate(config, keys_BTE[..., group_rows])
        values_BTD = values_BTE[..., group_rows]
        for index in range(per_group):
            if gates_BTN is None:
                head = group * per_group + index
                query_DH = tensors[f"{name}.q_proj.weight"][head * width : (head + 1) * width]
                output_HD = tensors[f"{name}.o_proj.weight"][:, head * width : (head + 1) * width]
            else:
                query_DH = tensors[f"{name}.q_experts"][index, group_rows]
                output_HD = tensors[f"{name}.o_experts"][index, :, group_rows]
            query_BTD = rotate(config, hidden_BTH @ query_DH.T)
            head_output_BTH = attend(query_BTD, keys_BTD, values_BTD, token_mask_BT) @ output_HD.T
            gate = 1.0 if gates_BTN is None else gates_BTN[..., index, None]
            output_BTH = output_BTH + gate * head_output_BTH
    return output_BTH


def attend(query_BTD: Tensor, key_BTD: Tensor, value_BTD: Tensor, token_mask_BT: Tensor) -> Tensor:
    """Causal attention of one head; padding is not attended to, except by itself (its row would be empty)."""
    positions = query_BTD.shape[1]
    causal_TT = torch.ones(positions, positions, dtype=torch.bool).tril()
    allowed_BTT = causal_TT & token_mask_BT[:, None, :] | torch.eye(positions, dtype=torch.bool)
    weights_BTT = query_BTD @ key_BTD.transpose(1, 2) / math.sqrt(query_BTD.shape[-1])
    return torch.softmax(weights_BTT.masked_fill(~allowed_BTT, -math.inf), dim=-1) @ value_BTD


def rotate(config: ReferenceConfig, heads_BTD: Tensor) -> Tensor:
    """Rotary embedding: the pair (unit d, unit d + D/2) at position t turns by t x theta^(-2d/D)."""
    positions, width = heads_BTD.shape[1:]
    frequencies = config.rope_theta ** (-torch.arange(0, width, 2, dtype=heads_BTD.dtype) / width)
    angles = torch.arange(positions, dtype=heads_BTD.dtype)[:, None] * frequencies
    first, second = heads_BTD[..., : width // 2], heads_BTD[..., width // 2 :]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def normalise(config: ReferenceConfig, tensors: Mapping[str, Tensor], name: str, hidden_BTH: Tensor) -> Tensor:
    """RMSNorm, or LayerNorm with a bias."""
    weight_H = tensors[f"{name}.weight"]
    if config.norm_type == "rmsnorm":
        mean_square = hidden_BTH.pow(2).mean(dim=-1, keepdim=True)
        return hidden_BTH / torch.sqrt(mean_square + config.rms_norm_eps) * weight_H
    centred_BTH = hidden_BTH - hidden_BTH.mean(dim=-1, keepdim=True)
    variance = centred_BTH.pow(2).mean(dim=-1, keepdim=True)
    return centred_BTH / torch.sqrt(variance + config.rms_norm_eps) * weight_H + tensors[f"{name}.bias"]
