"""Floating-point operations per token, by part of the model, from the recipe alone.

Counted are matrix products, a multiplication and an addition as two operations; norms, activations, softmax and gates
are left out, as is usual in model-FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B). Core attention counts the
causal half: a token attends to itself and what is before it, (sequence + 1) / 2 keys in the mean. What attention over
whole documents would save is not known from a recipe, so `data.separate_documents` changes nothing here.
"""

from dataclasses import dataclass, fields

from dsmoe_megatron.config import Config, ModelConfig

FLASH_RECOMPUTE = 0.5
"""Flash attention's backward pass computes the scores once more: one of the two products of its forward pass."""


@dataclass(frozen=True)
class Flops:
    """Operations per token, all layers together."""

    attention_projections: float = 0.0
    """Query, key, value and output projections."""
    attention_scores: float = 0.0
    """Q K^T and the product with V, causal half."""
    routers: float = 0.0
    """Of attention and MLP; float32 whatever the model's dtype."""
    mlp: float = 0.0
    logits: float = 0.0
    """The output layer, in padded rows."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def layers(self) -> float:
        """Everything but the output layer."""
        return self.total - self.logits

    def times(self, factor: float) -> "Flops":
        return Flops(**{part.name: getattr(self, part.name) * factor for part in fields(self)})


@dataclass(frozen=True)
class TrainingFlops:
    """Operations per token of a training step.

    Attributes:
        forward: one forward pass.
        backward: two products, by input and by weight, for each of the forward pass.
        recompute: what the machine computes a second time: under train.recompute, and flash attention's scores. No part
            of the model's FLOPs, from which utilisation is reckoned.
    """

    forward: Flops
    backward: Flops
    recompute: Flops

    @property
    def model(self) -> float:
        return self.forward.total + self.backward.total

    @property
    def machine(self) -> float:
        return self.model + self.recompute.total


def training_flops(config: Config) -> TrainingFlops:
    """Per token of a training step: every expert computes (`expert_training: sparse`: num_experts_per_tok of them).

    Raises:
        ValueError: the vocabulary is not known.
    """
    model = config.model
    active = model.num_experts_per_tok if model.expert_training == "sparse" else model.num_experts
    forward = _forward(model, (config.train.sequence_length + 1) / 2, active, model.num_attention_experts)
    flash = forward.attention_scores * FLASH_RECOMPUTE
    again = {
        "none": Flops(attention_scores=flash),
        "selective": Flops(attention_scores=flash + forward.attention_scores),
        "full": Flops(
            attention_projections=forward.attention_projections,
            attention_scores=flash + forward.attention_scores,
            routers=forward.routers,
            mlp=forward.mlp,
        ),
    }
    return TrainingFlops(forward, forward.times(2), again[config.train.recompute])


def inference_flops(
    model: ModelConfig, context: float, active_mlp_experts: float, active_attention_experts: float
) -> Flops:
    """Per token of sparse inference: only active experts compute; routers, keys and values serve every token.

    Args:
        model: the recipe's model section with a known vocabulary size.
        context: keys that the token attends to, itself included; (length + 1) / 2 is the mean over a prompt.
        active_mlp_experts: mean number per token; 1 for a dense baseline.
        active_attention_experts: likewise; 1 for plain attention.

    Raises:
        ValueError: the vocabulary is not known.
    """
    return _forward(model, context, active_mlp_experts, active_attention_experts)


def _forward(model: ModelConfig, keys: float, mlp_experts: float, attention_experts: float) -> Flops:
    layers, hidden = model.num_hidden_layers, model.hidden_size
    channels = model.num_attention_heads * model.head_dim * attention_experts / model.num_attention_experts
    matrices = 3 if model.gated_mlp else 2
    return Flops(
        attention_projections=layers * 2 * hidden * (2 * channels + 2 * model.num_key_value_heads * model.head_dim),
        attention_scores=layers * 2 * 2 * channels * keys,
        routers=layers
        * (
            router_flops(model, model.num_attention_experts) * model.has_attention_router
            + router_flops(model, model.num_experts) * model.has_mlp_router
        ),
        mlp=layers * 2 * matrices * hidden * mlp_experts * model.moe_intermediate_size,
        logits=2 * hidden * model.padded_vocab_size,
    )


def router_flops(model: ModelConfig, num_experts: int) -> float:
    """One router's forward pass over one token."""
    if model.router_type == "linear":
        return 2 * model.hidden_size * num_experts
    return 2 * model.router_hidden_size * (model.hidden_size + num_experts)
