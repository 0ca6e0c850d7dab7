"""The exported DS-MoE model for transformers v5. It travels with the export: torch and transformers only.

Source: arXiv 2404.05567; its layers are in routed_layers.py.
Shape suffixes: B batch, S sequence, T tokens (B x S flattened), N experts.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_dsmoe import DSMoEConfig
from .expert_products import PER_EXPERT
from .policy import ExpertPolicy, PolicyName
from .routed_layers import (
    DSMoEAttention,
    DSMoEAttentionRouter,
    DSMoEExpertsBase,
    DSMoEMLP,
    DSMoEMLPRouter,
    DSMoERouter,
)


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

    # transformers looks for the uses of its interfaces in this file's text alone; they are in routed_layers.py
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

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
        the attention as well, and that expert_policy_layers is dropped. With expert_policy_layers none is kept.

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
        kept = ExpertPolicy.from_config(self.config) if expert_policy_layers is None else ExpertPolicy()
        policy = kept.with_changes(changes)
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
