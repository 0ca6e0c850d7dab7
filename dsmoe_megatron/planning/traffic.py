"""What one rank sends in a training step, collective by collective, from the recipe alone.

The collectives are those that megatron-core 0.16.1 and model/ start, counted on gloo in tests/planning/test_traffic.py.
What a rank sends follows from ring algorithms: of a tensor of n bytes over g ranks, (g - 1) / g x n for an all-gather,
a reduce-scatter or a balanced all-to-all, twice that for an all-reduce. Single numbers (loss, gradient norm, token
counts, the sparse baseline's routing tables) are left out. Sparse-trained experts are taken to be evenly used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_rules import data_parallel_size
from dsmoe_megatron.planning.ranks import (
    FLOAT32,
    element_bytes,
    experts_are_reduced_apart,
    micro_batches_per_step,
    mlp_ranks,
    optimizer_shards,
    rank_parameters,
)

Parallelism = Literal["tensor", "sequence", "expert", "context", "pipeline", "data"]
Operation = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]
CROSS_ENTROPY_REDUCTIONS = 3
"""Vocabulary-parallel cross-entropy reduces maximum, predicted logit and sum of exponentials, each [tokens]."""


@dataclass(frozen=True)
class Group:
    """Ranks r, r + stride, ... that communicate; megatron-core's order of ranks is tensor, context, data, pipeline."""

    size: int
    stride: int


@dataclass(frozen=True)
class Transfer:
    """One kind of collective of a rank's step.

    Attributes:
        parallelism: that needs it.
        operation: what is done.
        group: ranks that take part.
        payload: of one call, the whole tensor: gathered, or before it is scattered [bytes].
        calls: per step.
    """

    parallelism: Parallelism
    operation: Operation
    group: Group
    payload: float
    calls: int

    @property
    def sent(self) -> float:
        """Bytes that this rank sends per step."""
        if self.operation == "send":
            return self.payload * self.calls
        rings = 2 if self.operation == "all_reduce" else 1
        return rings * self.payload * self.calls * (self.group.size - 1) / self.group.size


def step_traffic(config: Config, world_size: int, pipeline_rank: int) -> list[Transfer]:
    """Every kind of transfer that a rank of this pipeline stage takes part in.

    Args:
        config: recipe that config_rules accepted, with a known vocabulary size.
        world_size: processes.
        pipeline_rank: from 0.

    Raises:
        ValueError: the vocabulary size is unknown.
    """
    plan = _Plan(config, world_size, pipeline_rank)
    found = (
        *plan.attention(),
        *plan.mlp(),
        *plan.routers(),
        *plan.embedding_and_loss(),
        *plan.pipeline(),
        *plan.gradients_and_parameters(),
    )
    return [each for each in found if each.calls and (each.group.size > 1 or each.operation == "send")]


class _Plan:
    """Sizes that several kinds of transfers share; `tokens` are a micro-batch's on one rank, `tokens_held` after SP."""

    def __init__(self, config: Config, world_size: int, pipeline_rank: int) -> None:
        self.config, self.model, self.parallel = config, config.model, config.parallel
        self.world_size, self.pipeline_rank = world_size, pipeline_rank
        parallel = config.parallel
        self.element = element_bytes(config)
        self.tokens = config.train.micro_batch_size * config.train.sequence_length // parallel.context
        self.tokens_held = self.tokens // parallel.tensor if parallel.sequence else self.tokens
        self.micro_batches = micro_batches_per_step(config, world_size)
        self.layers = parallel.layers_per_stage(config.model.num_hidden_layers)[pipeline_rank]
        self.passes = self.layers * self.micro_batches
        self.forwards = 2 if config.train.recompute == "full" else 1
        self.tensor_group = Group(parallel.tensor, 1)
        self.context_group = Group(parallel.context, parallel.tensor)
        self.data_group = Group(data_parallel_size(config, world_size), parallel.tensor * parallel.context)
        self.tensor_or_sequence: Parallelism = "sequence" if parallel.sequence else "tensor"
        self.expert_tensor = parallel.tensor_of_experts
        # the MLP then has a group of its own, with sequence parallelism over it
        self.mlp_apart = parallel.splits_experts_apart
        self.mlp_group = Group(mlp_ranks(config), 1) if self.mlp_apart else self.tensor_group
        self.mlp_parallelism: Parallelism = "expert" if self.mlp_apart else self.tensor_or_sequence

    def _linear_pair(self, parallelism: Parallelism, group: Group, split: bool, tokens: int) -> Iterator[Transfer]:
        """A column-parallel linear and the row-parallel one that follows, in every layer.

        Args:
            split: the tokens are split over the group outside of the pair.
            tokens: that the pair computes on.
        """
        payload = tokens * self.model.hidden_size * self.element
        if not split:
            yield Transfer(parallelism, "all_reduce", group, payload, self.passes * (self.forwards + 1))
            return
        # forward input, the same again for the weight's gradient, and the gradient of the output
        yield Transfer(parallelism, "all_gather", group, payload, self.passes * (self.forwards + 2))
        yield Transfer(parallelism, "reduce_scatter", group, payload, self.passes * (self.forwards + 1))

    def attention(self) -> Iterator[Transfer]:
        model, parallel = self.model, self.parallel
        yield from self._linear_pair(self.tensor_or_sequence, self.tensor_group, parallel.sequence, self.tokens)
        if parallel.tensor > model.num_key_value_heads:
            # megatron-core gathers the projections and cuts out the heads of the rank
            channels = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
            payload = self.tokens * channels * self.element
            yield Transfer(
                self.tensor_or_sequence, "all_gather", self.tensor_group, payload, self.passes * self.forwards
            )
            yield Transfer(self.tensor_or_sequence, "reduce_scatter", self.tensor_group, payload, self.passes)
        kv_heads_here = max(model.num_key_value_heads // parallel.tensor, 1)
        payload = self.tokens * parallel.context * kv_heads_here * model.head_dim * self.element
        gathers = 1 if self.config.train.recompute == "none" else 2
        yield Transfer("context", "all_gather", self.context_group, payload, 2 * self.passes * gathers)
        yield Transfer("context", "reduce_scatter", self.context_group, payload, 2 * self.passes)

    def mlp(self) -> Iterator[Transfer]:
        if self.model.expert_training == "sparse":
            yield from self._dispatched_experts()
            return
        split = self.parallel.sequence or self.mlp_apart
        tokens = self.tokens_held * self.mlp_group.size if split else self.tokens
        yield from self._linear_pair(self.mlp_parallelism, self.mlp_group, split, tokens)

    def _dispatched_experts(self) -> Iterator[Transfer]:
        """megatron-core's all-to-all dispatcher: tokens go to their experts' ranks and come back."""
        calls = self.passes * (self.forwards + 1)
        choices = self.tokens_held * self.model.num_experts_per_tok
        exchange = Group(self.parallel.expert, self.expert_tensor)
        gather = Group(self.expert_tensor, 1)
        hidden = self.model.hidden_size * self.element
        yield Transfer("expert", "all_to_all", exchange, choices * hidden, 2 * calls)
        yield Transfer("expert", "all_to_all", exchange, choices * FLOAT32, calls)
        yield Transfer("expert", "all_gather", gather, choices * gather.size * hidden, calls)
        yield Transfer("expert", "reduce_scatter", gather, choices * gather.size * hidden, calls)

    def routers(self) -> Iterator[Transfer]:
        """Scores go to the ranks that the gated units are split over; the mean scores of the loss are summed."""
        if self.model.has_attention_router:
            experts, group = self.model.num_attention_experts, self.tensor_group
            yield from self._scores(experts, group, self.parallel.sequence, self.tensor_or_sequence)
        if self.model.has_mlp_router and self.model.expert_training == "dense":
            split = self.parallel.sequence or self.mlp_apart
            yield from self._scores(self.model.num_experts, self.mlp_group, split, self.mlp_parallelism)

    def _scores(self, experts: int, group: Group, split: bool, parallelism: Parallelism) -> Iterator[Transfer]:
        tokens = self.tokens_held * group.size if split else self.tokens
        payload = tokens * experts * FLOAT32
        if split:
            yield Transfer(parallelism, "all_gather", group, payload, self.passes * self.forwards)
            yield Transfer(parallelism, "reduce_scatter", group, payload, self.passes)
        else:
            yield Transfer(parallelism, "all_reduce", group, payload, self.passes)
        mean_score = (experts + 1) * FLOAT32
        if self.parallel.sequence:
            yield Transfer("sequence", "all_reduce", self.tensor_group, mean_score, self.passes)
        yield Transfer("context", "all_reduce", self.context_group, mean_score, self.passes)
        if self.model.mi_scope == "data_parallel":
            yield Transfer("data", "all_reduce", self.data_group, mean_score, self.passes)

    def embedding_and_loss(self) -> Iterator[Transfer]:
        group, parallelism, calls = self.tensor_group, self.tensor_or_sequence, self.micro_batches
        payload = self.tokens * self.model.hidden_size * self.element
        first, last = self.pipeline_rank == 0, self.pipeline_rank == self.parallel.pipeline - 1
        if self.parallel.sequence:
            yield Transfer(parallelism, "reduce_scatter", group, payload, calls * (first + last))
            yield Transfer(parallelism, "all_gather", group, payload, calls * (first + 2 * last))
        else:
            yield Transfer(parallelism, "all_reduce", group, payload, calls * (first + last))
        reductions = CROSS_ENTROPY_REDUCTIONS * calls * last
        yield Transfer(parallelism, "all_reduce", group, self.tokens * FLOAT32, reductions)

    def pipeline(self) -> Iterator[Transfer]:
        stages, chunks = self.parallel.pipeline, self.parallel.virtual_pipeline
        if stages == 1:
            return
        group = Group(2, self.world_size // stages)
        payload = self.tokens_held * self.model.hidden_size * self.element
        first, last = self.pipeline_rank == 0, self.pipeline_rank == stages - 1
        # outputs go on from all chunks but the model's last, gradients back from all but its first
        yield Transfer("pipeline", "send", group, payload, self.micro_batches * (2 * chunks - first - last))
        if self.model.tie_word_embeddings and (first or last):
            embedding = self.model.padded_vocab_size // self.parallel.tensor * self.model.hidden_size * FLOAT32
            yield Transfer("pipeline", "all_reduce", Group(2, group.stride * (stages - 1)), embedding, 1)

    def gradients_and_parameters(self) -> Iterator[Transfer]:
        """Once per step: float32 gradients to the ranks that own them, weights back in the model's dtype."""
        parameters = rank_parameters(self.config, self.pipeline_rank)
        if self.parallel.sequence:
            replicated = (parameters.norms + parameters.routers) * FLOAT32
            yield Transfer("sequence", "all_reduce", self.tensor_group, replicated, 1)
        dense_ranks, expert_ranks = optimizer_shards(self.config, self.world_size)
        # each of the chained optimizers, one for experts and one for the rest, gathers all weights when it is done;
        # gathering that overlaps with the next forward pass happens once
        gathers = 2 if experts_are_reduced_apart(self.config) and not self.parallel.overlap else 1
        for count, group in (
            (parameters.dense, Group(dense_ranks, self.parallel.tensor)),
            (parameters.experts, Group(expert_ranks, mlp_ranks(self.config))),
        ):
            yield Transfer("data", "reduce_scatter", group, count * FLOAT32, int(count > 0))
            yield Transfer("data", "all_gather", group, count * self.element, gathers * (count > 0))
