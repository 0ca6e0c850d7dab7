"""How many parameters a model has, and how many of them fire, from the recipe alone.

"Without embeddings" leaves out the embedding and the output layer, as the figures of arXiv 2404.05567 do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.planning.ranks import mlp_matrices, router_weights


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the whole model, all layers together."""

    attention_experts: int
    """Query and output projections (of plain attention as well)."""
    key_value: int
    """Key and value projections, shared by all attention experts."""
    attention_routers: int
    mlp_experts: int
    """All experts' MLPs (the one MLP of a dense baseline)."""
    mlp_routers: int
    norms: int
    """Two per layer and the final one."""
    embeddings: int | None
    """Embedding and output layer in padded rows; None while the vocabulary is unknown."""

    @property
    def total_without_embeddings(self) -> int:
        return self.attention_experts + self.mlp_experts + self.always_active

    @property
    def always_active(self) -> int:
        """What every token uses whichever experts are chosen, embeddings left out."""
        return self.key_value + self.attention_routers + self.mlp_routers + self.norms

    @property
    def total(self) -> int | None:
        return None if self.embeddings is None else self.total_without_embeddings + self.embeddings


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters by part, of a recipe's model section that config_rules accepted."""
    layers, hidden = model.num_hidden_layers, model.hidden_size
    vectors_per_norm = 2 if model.norm_type == "layernorm" else 1
    return ParameterCount(
        attention_experts=layers * 2 * hidden * model.num_attention_heads * model.head_dim,
        key_value=layers * 2 * hidden * model.num_key_value_heads * model.head_dim,
        attention_routers=layers * router_weights(model, model.num_attention_experts) * model.has_attention_router,
        mlp_experts=layers * mlp_matrices(model) * hidden * model.intermediate_size,
        mlp_routers=layers * router_weights(model, model.num_experts) * model.has_mlp_router,
        norms=(2 * layers + 1) * vectors_per_norm * hidden,
        embeddings=_embeddings(model),
    )


def active_parameters(
    model: ModelConfig,
    active_mlp_experts: float | Sequence[float],
    active_attention_experts: float | Sequence[float],
) -> float:
    """Parameters without embeddings that one token uses.

    Args:
        model: the recipe's model section.
        active_mlp_experts: mean active MLP experts per token, in every layer or one value per layer; 1 for a dense
            baseline.
        active_attention_experts: likewise; 1 for plain attention.

    Raises:
        ValueError: a list is not one value per layer, or a value is outside 0 to the number of experts.
    """
    count = count_parameters(model)
    mlp_share = _mean_share(model, active_mlp_experts, model.num_experts)
    attention_share = _mean_share(model, active_attention_experts, model.num_attention_experts)
    return count.always_active + mlp_share * count.mlp_experts + attention_share * count.attention_experts


def active_share(
    model: ModelConfig,
    active_mlp_experts: float | Sequence[float],
    active_attention_experts: float | Sequence[float],
) -> float:
    """active_parameters over all parameters without embeddings, 0 to 1."""
    active = active_parameters(model, active_mlp_experts, active_attention_experts)
    return active / count_parameters(model).total_without_embeddings


def _embeddings(model: ModelConfig) -> int | None:
    if model.vocab_size is None:
        return None
    matrices = 1 if model.tie_word_embeddings else 2
    return matrices * model.padded_vocab_size * model.hidden_size


def _mean_share(model: ModelConfig, active: float | Sequence[float], num_experts: int) -> float:
    """Mean over layers of active experts / experts; all layers are of one size, so the mean is exact."""
    per_layer = list(active) if isinstance(active, Sequence) else [active] * model.num_hidden_layers
    if len(per_layer) != model.num_hidden_layers:
        raise ValueError(f"{len(per_layer)} values of active experts for {model.num_hidden_layers} layers")
    if not all(0 <= value <= num_experts for value in per_layer):
        raise ValueError(f"active experts {per_layer} are not all from 0 to {num_experts}")
    return sum(per_layer) / (len(per_layer) * num_experts)
