"""What one rank of a layout holds: its share of the parameters, and with whom it shares them.

All ranks of a pipeline stage hold equally much, because every split is even: heads and vocabulary over the
tensor-parallel ranks, the MLP's hidden units over the (expert-tensor x expert) ranks. Nothing here imports torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import prod
from typing import Literal

from dsmoe_megatron.config import Config, ModelConfig
from dsmoe_megatron.config_rules import data_parallel_size

FLOAT32 = 4
ParameterKind = Literal["attention", "routers", "norms", "embeddings", "mlp", "experts"]


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one rank holds, all model chunks of its pipeline stage together."""

    attention: int
    """Query, key, value and output projections."""
    routers: int
    norms: int
    embeddings: int
    """Embedding of the first stage, output layer of the last; tied ones are there twice unless one stage has both."""
    mlp: int
    """MLP weights that are replicated as all of the above are, over the data- and context-parallel ranks: a dense
    baseline's, and sparse-trained experts without expert parallelism."""
    experts: int
    """MLP weights that are replicated over the expert-data-parallel ranks: all that training densely marks so."""

    @property
    def dense(self) -> int:
        """Replicated over the data- and context-parallel ranks."""
        return self.total - self.experts

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class LocalWeight:
    """One parameter as a rank holds it, under megatron-core's name within the module that owns it."""

    name: str
    kind: ParameterKind
    shape: tuple[int, ...]


def rank_parameters(config: Config, pipeline_rank: int) -> RankParameters:
    """Parameters of each rank of a pipeline stage.

    Args:
        config: recipe that config_rules accepted, with a known vocabulary size.
        pipeline_rank: from 0.

    Raises:
        ValueError: the vocabulary size is unknown.
    """
    layers = config.parallel.layers_per_stage(config.model.num_hidden_layers)[pipeline_rank]
    counts = dict.fromkeys((field.name for field in fields(RankParameters)), 0)
    for weight in layer_weights(config):
        counts[weight.kind] += layers * prod(weight.shape)
    for weight in weights_outside_layers(config, pipeline_rank):
        counts[weight.kind] += prod(weight.shape)
    return RankParameters(**counts)


def layer_weights(config: Config) -> list[LocalWeight]:
    """Every parameter of one transformer layer on one rank."""
    model, tensor = config.model, config.parallel.tensor
    hidden, channels = model.hidden_size, model.num_attention_heads * model.head_dim
    qkv_channels = channels + 2 * model.num_key_value_heads * model.head_dim
    weights = [
        *_norm("input_layernorm", model),
        LocalWeight("self_attention.linear_qkv.weight", "attention", (qkv_channels // tensor, hidden)),
        LocalWeight("self_attention.linear_proj.weight", "attention", (hidden, channels // tensor)),
        *_norm("pre_mlp_layernorm", model),
        *_mlp(config),
    ]
    if model.has_attention_router:
        weights += _router("self_attention.router", model, model.num_attention_experts)
    if model.has_mlp_router:
        weights += _router("mlp.router", model, model.num_experts)
    return weights


def weights_outside_layers(config: Config, pipeline_rank: int) -> list[LocalWeight]:
    """Embedding, final norm and output layer, where the stage has them."""
    model = config.model
    first, last = pipeline_rank == 0, pipeline_rank == config.parallel.pipeline - 1
    vocabulary = (model.padded_vocab_size // config.parallel.tensor, model.hidden_size)
    weights = []
    if first:
        weights.append(LocalWeight("embedding.word_embeddings.weight", "embeddings", vocabulary))
    if last:
        weights += _norm("decoder.final_layernorm", model)
    if last and not (first and model.tie_word_embeddings):
        weights.append(LocalWeight("output_layer.weight", "embeddings", vocabulary))
    return weights


def _norm(name: str, model: ModelConfig) -> list[LocalWeight]:
    vectors = ("weight", "bias") if model.norm_type == "layernorm" else ("weight",)
    return [LocalWeight(f"{name}.{vector}", "norms", (model.hidden_size,)) for vector in vectors]


def _router(name: str, model: ModelConfig, num_experts: int) -> list[LocalWeight]:
    hidden, width = model.hidden_size, model.router_hidden_size
    if model.router_type == "linear":
        return [LocalWeight(f"{name}.weight", "routers", (num_experts, hidden))]
    return [
        LocalWeight(f"{name}.fc1.weight", "routers", (width, hidden)),
        LocalWeight(f"{name}.fc2.weight", "routers", (num_experts, width)),
    ]


def _mlp(config: Config) -> Iterator[LocalWeight]:
    model, parallel = config.model, config.parallel
    kind: ParameterKind = "experts" if experts_are_reduced_apart(config) else "mlp"
    hidden, units = model.hidden_size, model.intermediate_size // mlp_ranks(config)
    prefixes = ["mlp"]
    if model.expert_training == "sparse":
        units = model.moe_intermediate_size // parallel.tensor_of_experts
        local_experts = model.num_experts // parallel.expert
        prefixes = [f"mlp.experts.local_experts.{expert}" for expert in range(local_experts)]
    for prefix in prefixes:
        yield LocalWeight(f"{prefix}.linear_fc1.weight", kind, ((mlp_matrices(model) - 1) * units, hidden))
        yield LocalWeight(f"{prefix}.linear_fc2.weight", kind, (hidden, units))


def optimizer_shards(config: Config, world_size: int) -> tuple[int, int]:
    """How many ranks share one copy of the optimizer's state, of the dense parameters and of `experts`.

    They are also the ranks over which the gradients are reduced.
    """
    of_stage = world_size // config.parallel.pipeline
    return of_stage // config.parallel.tensor, of_stage // mlp_ranks(config)


def micro_batches_per_step(config: Config, world_size: int) -> int:
    """Micro-batches that one data-parallel replica runs in a step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * data_parallel_size(config, world_size))


def element_bytes(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.train.precision == "bf16" else FLOAT32


def mlp_ranks(config: Config) -> int:
    """Ranks over which one layer's MLP weights are split."""
    parallel = config.parallel
    if not config.model.has_mlp_router:
        return parallel.tensor
    return parallel.tensor_of_experts * parallel.expert


def experts_are_reduced_apart(config: Config) -> bool:
    """Whether megatron-core reduces the MLP's gradients over the expert-data-parallel ranks (`allreduce = False`).

    The densely trained layer asks for it in every layout, megatron-core's own only where experts are split.
    """
    model = config.model
    return model.has_mlp_router and (model.expert_training == "dense" or config.parallel.expert > 1)


def mlp_matrices(model: ModelConfig) -> int:
    """Matrices of an expert: up and down, and the gate of a gated one."""
    return 3 if model.gated_mlp else 2


def routed_experts(model: ModelConfig) -> list[int]:
    """The number of experts of each router of a layer, the attention's first."""
    attention = [model.num_attention_experts] if model.has_attention_router else []
    return attention + ([model.num_experts] if model.has_mlp_router else [])


def router_weights(model: ModelConfig, num_experts: int) -> int:
    """Weights of one router."""
    return sum(prod(weight.shape) for weight in _router("router", model, num_experts))
