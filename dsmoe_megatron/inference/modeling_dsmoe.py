"""The exported DS-MoE model for transformers v5. It travels with the export: torch and transformers only.

Source: arXiv 2404.05567. Every MLP and attention layer holds N experts; policy.py says which of them compute on which
token, and scores are never renormalised over the active ones (equation 1).
Shape suffixes: B batch, S sequence, T tokens (B x S flattened), N experts, K active experts of a token, P active
(token, expert) pairs, H hidden size, F units of one expert, G key/value heads, D head width.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_dsmoe import DSMoEConfig
from .expert_products import PER_EXPERT, grouped_linear, linear, sum_of_all, sum_over_pairs, takes_pairs
from .policy import ExpertPolicy, PolicyName, RouterKind, active_experts, best_experts, fixed_top_k


@dataclass
class DSMoEModelOutputWithPast(MoeModelOutputWithPast):
    """As its parent; `router_logits` are those of the MLP routers, one [T, N] per layer."""

    attention_router_logits: tuple[Tensor, ...] | None = None
    """Logits of the attention routers, one [T, N] per layer."""


@dataclass
class DSMoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """As its parent; `router_logits` are those of the MLP routers, one [T, N] per layer."""

    attention_router_logits: tuple[Tensor, ...] | None = None
    """Logits of the attention routers, one [T, N] per layer."""


class DSMoERouter(nn.Module):
    """Scores every expert for every token."""

    kind: RouterKind

    def __init__(self, config: DSMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.router_type = config.router_type
        if self.router_type == "linear":
            self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size))
        else:
            self.fc1 = nn.Linear(config.hidden_size, config.router_hidden_size, bias=False)
            self.fc2 = nn.Linear(config.router_hidden_size, num_experts, bias=False)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities, [T, N], float32 or wider."""
        # bfloat16 logits tie experts and blur the small probabilities that thresholds read
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        hidden_TH = hidden_TH.to(wide)
        if self.router_type == "linear":
            logits_TN = F.linear(hidden_TH, self.weight.to(wide))
        else:
            inner = F.gelu(F.linear(hidden_TH, self.fc1.weight.to(wide)))
            logits_TN = F.linear(inner, self.fc2.weight.to(wide))
        return logits_TN, logits_TN.softmax(dim=-1)


class DSMoEAttentionRouter(DSMoERouter):
    kind = "attention"


class DSMoEMLPRouter(DSMoERouter):
    kind = "mlp"


class DSMoEExpertsBase(nn.Module):
    """N expert MLPs as 3D parameters, in the layout of transformers' experts interface."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))

    def up_weight(self) -> Tensor:
        """First projections of all experts, [N, F or 2F, H]."""
        raise NotImplementedError

    def activate(self, projected: Tensor) -> Tensor:
        """Hidden units from the first projection, [..., F or 2F] -> [..., F]."""
        raise NotImplementedError

    def every_expert(self, hidden_TH: Tensor, scores_TN: Tensor | None) -> Tensor:
        """The sum over all experts of score x output (equation 3), as one MLP of N x F units; no scores are ones."""
        projected_TNF = linear(hidden_TH, self.up_weight().flatten(0, 1)).unflatten(-1, (self.num_experts, -1))
        units_TNF = self.activate(projected_TNF)
        if scores_TN is not None:
            units_TNF = (units_TNF * scores_TN.unsqueeze(-1)).to(hidden_TH.dtype)
        return sum_of_all(units_TNF, self.down_proj)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over each token's K experts of weight x output: the experts interface's eager implementation.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K].
            top_k_weights: [T, K].
        """
        output_TH = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token_P, slot_P = torch.where(top_k_index == expert)
            units_PF = self.activate(F.linear(hidden_states[token_P], self.up_weight()[expert]))
            output_PH = F.linear(units_PF, self.down_proj[expert]) * top_k_weights[token_P, slot_P, None]
            output_TH.index_add_(0, token_P, output_PH.to(output_TH.dtype))
        return output_TH


ExpertsClass = TypeVar("ExpertsClass", bound=type[DSMoEExpertsBase])


def with_every_choice(experts_class: ExpertsClass) -> ExpertsClass:
    """Let the module compute all experts, or any number per token, as well as K: by its own call, since that is where
    adapters (PEFT) and tensor parallelism take hold of a module."""
    chosen = experts_class.forward

    @functools.wraps(chosen)
    def forward(
        self: DSMoEExpertsBase,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        pair_token: Tensor | None = None,
    ) -> Tensor:
        """As the experts interface's. Without an index, every expert with the weights [T, N] (none are ones); with the
        tokens of pairs [P], the experts and weights of these pairs [P]."""
        if top_k_index is None or top_k_weights is None:
            return self.every_expert(hidden_states, top_k_weights)
        if pair_token is None:
            return chosen(self, hidden_states, top_k_index, top_k_weights)
        if takes_pairs(self, hidden_states):
            return sum_over_pairs(self, hidden_states, pair_token, top_k_index, top_k_weights)
        # each pair as a token of its own with one expert; summed in float32: a token may have many experts
        output_PH = chosen(self, hidden_states[pair_token], top_k_index[:, None], top_k_weights[:, None])
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        sum_TH = torch.zeros_like(hidden_states, dtype=wide).index_add(0, pair_token, output_PH.to(wide))
        return sum_TH.to(hidden_states.dtype)

    experts_class.forward = forward  # type: ignore[method-assign]
    return experts_class


@with_every_choice
@use_experts_implementation(has_gate=False)
class DSMoEExperts(DSMoEExpertsBase):
    """Plain experts: W2 act(W1 x)."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, self.intermediate_dim, self.hidden_dim))

    def up_weight(self) -> Tensor:
        return self.up_proj

    def activate(self, projected: Tensor) -> Tensor:
        return cast(Tensor, self.act_fn(projected))


@with_every_choice
@use_experts_implementation
class DSMoEGatedExperts(DSMoEExpertsBase):
    """Gated experts: W2 (act(Wg x) * (W1 x)); each expert's gate rows stand before its up rows."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))

    def up_weight(self) -> Tensor:
        return self.gate_up_proj

    def activate(self, projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return cast(Tensor, self.act_fn(gate) * up)


class DSMoEMLP(nn.Module):
    """Mixture of MLP experts; with one expert, a plain MLP without a router."""

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_experts = config.num_experts
        if self.num_experts > 1:
            self.gate = DSMoEMLPRouter(config, self.num_experts)
        self.experts = DSMoEGatedExperts(config) if config.gated_mlp else DSMoEExperts(config)
        self.set_policy(ExpertPolicy.from_config(config))

    def set_policy(self, policy: ExpertPolicy) -> None:
        self.policy = policy
        self.top_k = fixed_top_k(policy, self.layer_idx, "mlp", self.num_experts)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """[B, S, H] -> [B, S, H]; the token mask [T] is what threshold_topk counts."""
        hidden_TH = hidden_states.flatten(0, -2)
        if self.num_experts == 1:
            return self.experts(hidden_TH).view_as(hidden_states)
        _, scores_TN = self.gate(hidden_TH)
        if self.top_k == self.num_experts:
            output_TH = self.experts(hidden_TH, None, scores_TN)
        elif self.top_k is not None:
            index_TK = best_experts(scores_TN, self.top_k)
            output_TH = self.experts(hidden_TH, index_TK, scores_TN.gather(-1, index_TK).to(hidden_TH.dtype))
        else:
            active_TN = active_experts(scores_TN, self.policy, self.layer_idx, "mlp", token_mask)
            token_P, expert_P = active_TN.nonzero(as_tuple=True)
            weights_P = scores_TN[token_P, expert_P].to(hidden_TH.dtype)
            output_TH = self.experts(hidden_TH, expert_P, weights_P, token_P)
        return output_TH.view_as(hidden_states)


class DSMoEAttention(nn.Module):
    """Mixture of attention heads (equations 7-8), or grouped-query attention.

    Expert i owns one query head per key/value head; keys and values are shared by all experts and always computed.
    Query heads stand in the order (key/value head, expert), so K active experts are grouped-query attention with K
    heads per group.
    """

    is_causal = True

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.num_attention_experts = config.num_attention_experts
        self.is_mixture = config.attention_type == "moa"
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        key_width = self.num_key_value_heads * self.head_dim
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        if self.is_mixture:
            experts = self.num_attention_experts
            self.router = DSMoEAttentionRouter(config, experts)
            self.q_experts = nn.Parameter(torch.empty(experts, key_width, config.hidden_size))
            self.o_experts = nn.Parameter(torch.empty(experts, config.hidden_size, key_width))
        else:
            query_width = config.num_attention_heads * self.head_dim
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
            self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.set_policy(ExpertPolicy.from_config(config))

    def set_policy(self, policy: ExpertPolicy) -> None:
        if not self.is_mixture:
            return
        self.policy = policy
        self.top_k = fixed_top_k(policy, self.layer_idx, "attention", self.num_attention_experts)
        # query heads per key/value head that are computed; attention implementations read this name
        self.num_key_value_groups = self.num_attention_experts if self.top_k is None else self.top_k

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, H] -> [B, S, H] and the attention weights, where the implementation gives them."""
        scores_BSN, index_BSK = self._route(hidden_states, token_mask)
        query = self._queries(hidden_states, index_BSK)
        key = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        heads, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self._output(heads, scores_BSN, index_BSK), weights

    def _route(self, hidden_BSH: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gates of the computed experts, and their indices where not all are; none without a router."""
        if not self.is_mixture:
            return None, None
        _, scores_TN = self.router(hidden_BSH.flatten(0, 1))
        token_shape = hidden_BSH.shape[:-1]
        if self.top_k == self.num_attention_experts:
            return scores_TN.unflatten(0, token_shape), None
        if self.top_k is not None:
            index_TK = best_experts(scores_TN, self.top_k)
            return scores_TN.gather(-1, index_TK).unflatten(0, token_shape), index_TK.unflatten(0, token_shape)
        active_TN = active_experts(scores_TN, self.policy, self.layer_idx, "attention", token_mask_T)
        return (scores_TN * active_TN).unflatten(0, token_shape), None

    def _queries(self, hidden_BSH: Tensor, index_BSK: Tensor | None) -> Tensor:
        """Query heads, [B, heads, S, D]."""
        if not self.is_mixture:
            return cast(Tensor, self.q_proj(hidden_BSH)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if index_BSK is None:
            query = linear(hidden_BSH, self.q_experts.flatten(0, 1))
        else:
            hidden_BSKH = hidden_BSH.unsqueeze(2).expand(*index_BSK.shape, -1)
            query = grouped_linear(hidden_BSKH, self.q_experts, index_BSK).flatten(2)
        query_BSKGD = query.unflatten(-1, (self.num_key_value_groups, self.num_key_value_heads, self.head_dim))
        return query_BSKGD.permute(0, 3, 2, 1, 4).flatten(1, 2)

    def _output(self, heads: Tensor, scores_BSK: Tensor | None, index_BSK: Tensor | None) -> Tensor:
        """The sum over the computed experts of score x output projection of their heads, [B, S, H]."""
        if scores_BSK is None:
            return cast(Tensor, self.o_proj(heads.flatten(2)))
        heads_BSGKD = heads.reshape(*scores_BSK.shape[:2], self.num_key_value_heads, -1, self.head_dim)
        gated_BSGKD = (heads_BSGKD * scores_BSK[:, :, None, :, None]).to(heads.dtype)
        gated_BSKE = gated_BSGKD.transpose(2, 3).flatten(3)
        if index_BSK is None:
            return linear(gated_BSKE.flatten(2), self.o_experts.transpose(0, 1).flatten(1))
        return grouped_linear(gated_BSKE, self.o_experts, index_BSK).sum(dim=2)


class DSMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then MLP, each on normalised input and with a residual connection."""

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DSMoEAttention(config, layer_idx)
        self.mlp = DSMoEMLP(config, layer_idx)
        self.input_layernorm = norm_layer(config)
        self.post_attention_layernorm = norm_layer(config)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), token_mask=token_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + cast(Tensor, self.mlp(self.post_attention_layernorm(hidden_states), token_mask))


def norm_layer(config: DSMoEConfig) -> nn.Module:
    norm_class = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm_class(config.hidden_size, eps=config.rms_norm_eps)


class DSMoEPreTrainedModel(PreTrainedModel):
    """Weights, loading, and the expert policy."""

    config: DSMoEConfig
    config_class = DSMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DSMoEDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012 (transformers reads a class attribute)
        "router_logits": OutputRecorder(DSMoEMLPRouter, index=0),
        "attention_router_logits": OutputRecorder(DSMoEAttentionRouter, index=0),
        "hidden_states": DSMoEDecoderLayer,
        "attentions": DSMoEAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DSMoERouter | DSMoEExpertsBase | DSMoEAttention):
            for parameter in module.parameters(recurse=False):
                initialization.normal_(parameter, std=self.config.initializer_range)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As transformers', with one product per active expert as the default, which is transformers' own on a GPU."""
        requested = PER_EXPERT if requested_experts is None else requested_experts
        return cast(str, super().get_correct_experts_implementation(requested))

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse weights that are not exactly the model's; transformers would report them and initialise the missing.

        Raises:
            ValueError: tensors are missing, left over or of another shape, whatever ignore_mismatched_sizes says.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        shapes = [f"{name} {tuple(found)}, not {tuple(own)}" for name, found, own in loading_info.mismatched_keys]
        faults = {
            "lacks": loading_info.missing_keys,
            "has unknown": loading_info.unexpected_keys,
            "has other shapes:": shapes,
        }
        found = [f"{what} {', '.join(sorted(names))}" for what, names in faults.items() if names]
        if found:
            for names in (loading_info.missing_keys, loading_info.unexpected_keys, loading_info.mismatched_keys):
                names.clear()  # else transformers' own report takes the place of this line
            raise ValueError(f"the checkpoint {' and '.join(found)}: it does not fit its configuration")

    def set_policy(
        self,
        expert_policy: PolicyName,
        *,
        num_experts_per_tok: int | None = None,
        attention_experts_per_tok: int | None = None,
        expert_threshold: float | None = None,
        attention_expert_threshold: float | None = None,
        expert_policy_layers: list[dict[str, Any]] | None = None,
    ) -> None:
        """Choose experts by another policy from now on, and in the configuration that `save_pretrained` writes.

        Limits that are not given keep the configuration's values, except that an expert_threshold given alone holds for
        the attention as well, and that expert_policy_layers is dropped.

        Raises:
            ValueError: the policy does not fit the model; it then stays as it was.
        """
        limits: dict[str, Any] = {
            "num_experts_per_tok": num_experts_per_tok,
            "attention_experts_per_tok": attention_experts_per_tok,
            "expert_threshold": expert_threshold,
            "attention_expert_threshold": attention_expert_threshold,
        }
        changes = {name: value for name, value in limits.items() if value is not None}
        changes |= {"expert_policy": expert_policy, "expert_policy_layers": expert_policy_layers}
        policy = ExpertPolicy.from_config(self.config).with_changes(changes)
        self.config.check_policy(policy)
        for field in dataclasses.fields(policy):
            setattr(self.config, field.name, getattr(policy, field.name))
        for module in self.modules():
            if isinstance(module, DSMoEMLP | DSMoEAttention):
                module.set_policy(policy)


class DSMoEModel(DSMoEPreTrainedModel):
    """The decoder without its output layer."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]  # noqa: RUF012 (an export has the output layer)

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        # from_pretrained(..., expert_policy=...) changes the configuration after its own checks
        config.check_policy(ExpertPolicy.from_config(config))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DSMoEDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = norm_layer(config)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DSMoEModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = hidden_states.shape[1]
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=hidden_states.device) + past_length).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        token_mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -length:].flatten().bool()
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                token_mask=token_mask,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return DSMoEModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class DSMoEForCausalLM(DSMoEPreTrainedModel, GenerationMixin):
    """The decoder with its output layer."""

    # transformers reads class attributes
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.model = DSMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DSMoECausalLMOutputWithPast:
        """Logits, and with labels [B, S] the mean next-token cross-entropy in nats (they are shifted here)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return DSMoECausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            attention_router_logits=outputs.attention_router_logits,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate.

        Raises:
            ValueError: the policy is threshold_topk, whose choice depends on the other tokens of the call.
        """
        if self.config.expert_policy == "threshold_topk":
            raise ValueError(
                "expert_policy = 'threshold_topk': it depends on the whole batch and is for evaluation only; "
                "call set_policy with dense, topk or threshold before generate"
            )
        return super().generate(*args, **kwargs)


__all__ = ["DSMoEForCausalLM", "DSMoEModel", "DSMoEPreTrainedModel"]
