"""Configuration of an exported DS-MoE model. It travels with the export: torch and transformers only."""

from typing import Any

from transformers import PreTrainedConfig

from .policy import ExpertPolicy


class DSMoEConfig(PreTrainedConfig):
    """Architecture and default expert policy.

    Raises:
        ValueError: a value breaks a rule; one line, `key = value: rule`.
    """

    model_type = "dsmoe"
    # transformers reads class attributes
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    # every process holds a part of the units of every expert, so that the load is even whatever the routers choose;
    # attention and routers are on each
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.mlp.experts.up_proj": "colwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    """Tokens of the tokenizer."""
    hidden_size: int = 256
    """Width of the residual stream [units]."""
    num_hidden_layers: int = 4
    """Transformer layers."""
    num_attention_heads: int = 8
    """Query heads in all, whatever the policy; for `moa`, num_attention_experts x num_key_value_heads."""
    num_key_value_heads: int = 2
    """Key/value heads, shared by all attention experts."""
    head_dim: int = 32
    """Width of one attention head [units]."""
    attention_type: str = "moa"
    """`moa`: each attention expert owns one query head per key/value head; `gqa`: no attention router."""
    num_attention_experts: int = 4
    """Attention experts per layer (`moa`); 1 for `gqa`."""
    num_experts: int = 8
    """MLP experts per layer; 1 is a plain MLP without a router."""
    moe_intermediate_size: int = 128
    """Hidden units of one expert."""
    hidden_act: str = "gelu"
    """Activation of the experts; gelu is the exact one."""
    gated_mlp: bool = False
    """Gated experts: act(gate) * up."""
    router_type: str = "linear"
    """`linear`, or a two-layer `mlp` with GeLU of width router_hidden_size."""
    router_hidden_size: int = 512
    """Width of the mlp router [units]."""
    norm_type: str = "rmsnorm"
    """`rmsnorm` or `layernorm`."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the normalisation, of either type."""
    rope_parameters: dict[str, Any] | None = None
    """Rotary position embedding: rope_theta, rope_type."""
    tie_word_embeddings: bool = False
    """Share the input embedding with the output layer."""
    max_position_embeddings: int = 2048
    """Longest sequence that the model was trained for [tokens]."""
    attention_dropout: float = 0.0
    """Dropout probability of the attention weights when training."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights."""
    norm_topk_prob: bool = False
    """Always false: scores are not renormalised over the active experts."""
    trained_experts_per_tok: int | None = None
    """K that a sparse-trained model was trained with; null: densely trained, every expert on every token."""

    expert_policy: str = "dense"
    """How experts are chosen: dense, topk, threshold, or (evaluation only) threshold_topk."""
    num_experts_per_tok: int | None = None
    """K of the MLP experts under topk; null is all."""
    attention_experts_per_tok: int | None = None
    """K of the attention experts under topk; null is all."""
    expert_threshold: float | None = None
    """eps: an expert is active where (number of experts) x (its probability) is above it."""
    attention_expert_threshold: float | None = None
    """eps of the attention experts; null is expert_threshold."""
    expert_policy_layers: list[dict[str, Any]] | None = None
    """One {"mlp": {"k" | "eps": value}, "attention": {...}} per layer, over the values above."""

    use_cache: bool = True
    """Return keys and values for generation."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_architecture()
        self.check_policy(ExpertPolicy.from_config(self))

    def check_policy(self, policy: ExpertPolicy) -> None:
        """Raise ValueError where a policy does not fit this model."""
        policy.validate(self.num_hidden_layers, self.num_experts, self.num_attention_experts)

    def _check_architecture(self) -> None:
        choices = {
            "attention_type": ("moa", "gqa"),
            "hidden_act": ("gelu", "silu"),
            "router_type": ("linear", "mlp"),
            "norm_type": ("rmsnorm", "layernorm"),
            "norm_topk_prob": (False,),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} = {getattr(self, key)!r}: must be one of {', '.join(map(str, allowed))}")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.attention_type == "moa" and heads != self.num_attention_experts * groups:
            rule = f"must be num_attention_experts x num_key_value_heads = {self.num_attention_experts} x {groups}"
            raise ValueError(f"num_attention_heads = {heads}: {rule}")
        if self.attention_type == "gqa" and heads % groups:
            raise ValueError(f"num_attention_heads = {heads}: must be a multiple of num_key_value_heads = {groups}")
        if self.attention_type == "gqa" and self.num_attention_experts != 1:
            raise ValueError(f"num_attention_experts = {self.num_attention_experts}: must be 1 with gqa attention")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: must be even, because rotary embeddings turn pairs of units")


__all__ = ["DSMoEConfig"]
