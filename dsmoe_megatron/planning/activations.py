"""Which tensors of one micro-batch a rank keeps for the backward pass, and what comes on top while it runs.

Derived from what autograd saves in model/ and in megatron-core's layers, as tables from a tensor's name to its bytes.
Kernels of the two devices differ: a CPU writes out in float32 what CUDA's keep in registers. memory.py says what of
this was measured. The peak is looked for at those moments of the backward pass that can be it. Dropout's masks are left
out.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Literal

from dsmoe_megatron.config import Config
from dsmoe_megatron.planning.ranks import FLOAT32, element_bytes, mlp_ranks

DeviceType = Literal["cuda", "cpu"]
Table = dict[str, int]
# torch.get_rng_state() on a CPU, which a checkpointed region remembers twice: the default and the tracked state
CPU_RANDOM_STATES = 2 * 5056


@dataclass(frozen=True)
class Moment:
    """A point in the backward pass of one layer, or of what follows the last layer.

    Attributes:
        name: what is being computed.
        born: bytes that are alive beside what the forward pass keeps.
        freed: bytes of this layer that the forward pass kept and that are free by then.
        logits: bytes of `born` that are of the vocabulary's width.
    """

    name: str
    born: int
    freed: int = 0
    logits: int = 0


class LayerActivations:
    """Tables of one rank, for one micro-batch.

    Args:
        config: recipe that config_rules accepted, with a known vocabulary size.
        device: whose kernels.

    Attributes:
        own_tokens: tokens whose residual stream this rank holds: sequence x micro-batch over context- and, with
            sequence parallelism, tensor-parallel ranks.
        tokens: tokens that its heads and its part of the vocabulary see.
        unit_tokens: tokens that its MLP units see; expert parallelism gathers them over the ranks that split the units.
        element: bytes of an element of weights and activations.
    """

    def __init__(self, config: Config, device: DeviceType) -> None:
        model, parallel, train = config.model, config.parallel, config.train
        self.config, self.model, self.on_cpu = config, model, device == "cpu"
        self.element = element_bytes(config)
        self.casts_on_cpu = self.on_cpu and self.element < FLOAT32
        self.tokens = train.micro_batch_size * train.sequence_length // parallel.context
        self.own_tokens = self.tokens // parallel.tensor if parallel.sequence else self.tokens
        ranks = mlp_ranks(config)
        self.gathers_units = parallel.splits_experts_apart or parallel.sequence
        self.unit_tokens = self.own_tokens * ranks if parallel.splits_experts_apart else self.tokens

        self.hidden_row = model.hidden_size * self.element
        self.query_row = model.num_attention_heads // parallel.tensor * model.head_dim * self.element
        self.key_row = max(model.num_key_value_heads // parallel.tensor, 1) * model.head_dim * self.element
        self.unit_row = model.intermediate_size // ranks * self.element
        self.vocabulary_here = model.padded_vocab_size // parallel.tensor

    # what the forward pass keeps ----------------------------------------------------------------------------------

    @cached_property
    def attention(self) -> Table:
        """From the layer's input to the output projection's input."""
        model, parallel = self.model, self.config.parallel
        context, routed = parallel.context, model.has_attention_router
        heads = self.tokens * self.query_row
        keys = self.tokens * context * self.key_row
        recomputed = self.config.train.recompute == "selective"
        # pieces of the queries are attended to one by one and joined
        in_pieces = context > 1 or self.config.data.separate_documents
        # above the number of key/value heads megatron-core gathers the whole projection and takes a slice
        ranks = parallel.tensor if parallel.tensor <= model.num_key_value_heads else 1
        qkv_heads = (model.num_attention_heads + 2 * model.num_key_value_heads) // ranks
        angles = self.tokens // self.config.train.micro_batch_size * model.head_dim * self.element
        table = {
            "input": self.own_tokens * self.hidden_row,
            **self._norm(),
            "cosines and sines for queries and keys": 4 * angles,
            "rotated queries": heads,
        }
        if context == 1:
            # the values are a view of the projection
            table["query, key and value projection"] = self.tokens * qkv_heads * model.head_dim * self.element
            table["rotated keys"] = keys
        elif self._expands_keys:
            table["keys and values for each head"] = sum(self._expanded_keys())
        else:
            table["keys and values of the whole sequence"] = 2 * keys
        if not recomputed:
            table["heads' outputs"] = heads
            table["log-sum-exps"] = self.tokens * model.num_attention_heads // parallel.tensor * FLOAT32
        elif self.on_cpu:
            table["random states"] = CPU_RANDOM_STATES
        if not routed and (in_pieces or recomputed):
            table["joined outputs"] = heads
        if routed:
            table |= self._router(model.num_attention_experts, self.tokens if parallel.sequence else 0)
            table["gated heads"] = heads
        return table

    @cached_property
    def mlp(self) -> Table:
        """From the MLP's residual input to the second product's input."""
        model = self.model
        if model.expert_training == "sparse":
            return self._sparse_mlp()
        units = self.unit_tokens * self.unit_row
        table = {"input": self.own_tokens * self.hidden_row, **self._norm(), "second product's input": units}
        if model.gated_mlp:
            table |= {"gate and up projection": 2 * units, "activated gate": units}
            if not model.has_mlp_router:
                # megatron-core's own MLP adds an offset, which is zero, to the upper half
                table["up projection with offset"] = units
        else:
            table["first product"] = units
        if model.has_mlp_router:
            table |= self._router(model.num_experts, self.unit_tokens if self.gathers_units else 0)
            units_per_rank = model.intermediate_size // mlp_ranks(self.config)
            blocks_per_expert = model.moe_intermediate_size // gcd(model.moe_intermediate_size, units_per_rank)
            if blocks_per_expert > 1:
                table["block scores"] = self.unit_tokens * model.num_experts * blocks_per_expert * FLOAT32
        return table

    @cached_property
    def after_last_layer(self) -> Table:
        """The final norm, which is the output layer's input."""
        return {"input": self.own_tokens * self.hidden_row, **self._norm()}

    @cached_property
    def layer(self) -> int:
        """Bytes of one whole layer."""
        return sum(self.attention.values()) + sum(self.mlp.values())

    def checkpointed_layer(self) -> int:
        """Bytes of one layer that is computed again: its input."""
        return self.own_tokens * self.hidden_row + (CPU_RANDOM_STATES if self.on_cpu else 0)

    def _norm(self) -> Table:
        statistics = self.own_tokens * FLOAT32
        output = {"normalised input": self.own_tokens * self.hidden_row}
        if self.model.norm_type == "layernorm":
            return {**output, "mean and deviation": 2 * statistics}
        kept = {**output, "root mean square": statistics}
        if self.on_cpu:
            # composed of single operations, in float32
            in_float32 = self.own_tokens * self.model.hidden_size * FLOAT32
            kept["input over root mean square"] = in_float32
            if self.casts_on_cpu:
                kept["input in float32"] = in_float32
        return kept

    def _router(self, num_experts: int, gathered_tokens: int) -> Table:
        """Log-scores of the own tokens and, where the gated units see others', of those; all in float32."""
        table = {
            "log-scores": (self.own_tokens + gathered_tokens) * num_experts * FLOAT32,
            "shares of the mutual information": self.own_tokens * FLOAT32,
        }
        if self.model.router_type == "mlp":
            table["router's first product, before and after GeLU"] = (
                2 * self.own_tokens * self.model.router_hidden_size * FLOAT32
            )
        return table

    def _sparse_mlp(self) -> Table:
        """megatron-core's MoELayer, as if every expert got the same number of tokens."""
        model, parallel = self.model, self.config.parallel
        split = parallel.tensor_of_experts
        # every chosen expert has its own copy of a token; tensor-parallel experts gather them
        copies = self.own_tokens * model.num_experts_per_tok * split
        units = copies * model.moe_intermediate_size // split * self.element
        return {
            "input": self.own_tokens * self.hidden_row,
            **self._norm(),
            "scores, before and after the choice, and for the loss": 4 * self.own_tokens * model.num_experts * FLOAT32,
            "dispatched tokens": copies * self.hidden_row,
            "first products": (2 if model.gated_mlp else 1) * units,
            "activated units": (3 if model.gated_mlp else 1) * units,
            "units times scores": units,
        }

    @property
    def _expands_keys(self) -> bool:
        """On a CPU, queries that have a prefix of keys get keys and values written out for each query head."""
        return self.on_cpu and self.model.num_attention_heads > self.model.num_key_value_heads

    def _expanded_keys(self) -> tuple[int, int]:
        """Of a context-parallel rank's two chunks of queries, which see 2 x context + 1 chunks of keys together.

        The first rank's see one chunk less; of the others the second's are dealt the least evenly, as 2 and the rest.
        """
        keys_and_values = self.tokens * self.query_row  # of one chunk, which has half of the rank's tokens
        return 2 * keys_and_values, (2 * self.config.parallel.context - 1) * keys_and_values

    # what comes on top in the backward pass -----------------------------------------------------------------------

    def layer_moments(self) -> list[Moment]:
        """Of one layer's backward pass, the MLP's before the attention's."""
        return [*self._mlp_moments(), *self._attention_moments()]

    def _mlp_moments(self) -> Iterable[Moment]:
        model = self.model
        residual = self.own_tokens * self.hidden_row
        all_tokens = self.unit_tokens * self.hidden_row if self.gathers_units else 0
        units = self.unit_tokens * self.unit_row
        matrix = self._weight_gradient(model.hidden_size * model.intermediate_size // mlp_ranks(self.config))
        first_matrix = matrix * (2 if model.gated_mlp else 1)
        if model.expert_training == "sparse":
            copies = self.mlp["dispatched tokens"]
            yield Moment("experts' products", residual + 2 * copies + first_matrix // model.num_experts)
            return
        yield Moment("MLP's second product", residual + all_tokens + units + matrix)
        if model.has_mlp_router and self.casts_on_cpu:
            yield Moment("MLP's gate", residual + units + self._in_float32_twice(units))
        yield Moment("MLP's activation", residual + (2 if model.gated_mlp else 1) * units)
        kept_units = (4 if model.gated_mlp else 2) * units
        gradient = (2 if model.gated_mlp else 1) * units
        to_input = all_tokens + residual
        yield Moment("MLP's first product", residual + gradient + to_input + first_matrix, freed=kept_units)

    def _attention_moments(self) -> Iterable[Moment]:
        model, parallel = self.model, self.config.parallel
        residual = self.own_tokens * self.hidden_row
        all_tokens = self.tokens * self.hidden_row if parallel.sequence else 0
        heads = self.tokens * self.query_row
        keys = self.tokens * parallel.context * self.key_row
        after_mlp = sum(self.mlp.values())
        matrix = self._weight_gradient(model.hidden_size * self.query_row // self.element)
        recomputed = 0
        if self.config.train.recompute == "selective":
            recomputed = heads + self.tokens * model.num_attention_heads // parallel.tensor * FLOAT32
        yield Moment("output projection", residual + all_tokens + heads + matrix, freed=after_mlp)
        if model.has_attention_router and self.casts_on_cpu:
            yield Moment("heads' gate", residual + heads + self._in_float32_twice(heads), freed=after_mlp)
        # of the heads' outputs, which a gate writes into the gated heads' memory
        gradient = 0 if model.has_attention_router else heads
        if self.on_cpu:
            copied = heads if self.config.train.micro_batch_size > 1 else 0
            by_head = 2 * max(self._expanded_keys()) if parallel.context > 1 and self._expands_keys else 2 * keys
            kernel = copied + heads + by_head + self._cpu_attention_block()
        else:
            # flash attention sums the queries' gradient in float32, and the keys' and values' head by head
            expanded = 2 * heads * parallel.context if model.num_attention_heads > model.num_key_value_heads else 0
            kernel = heads + heads // self.element * FLOAT32 + 2 * keys + expanded
        yield Moment("core attention", residual + gradient + recomputed + kernel, freed=after_mlp)

    def _cpu_attention_block(self) -> int:
        """torch's flash attention works on blocks of queries x keys in float32, two per thread; here of one thread."""
        queries = self.tokens // self.config.train.micro_batch_size
        block = 256 if queries >= 768 else 64 if queries >= 192 else 32
        return 2 * min(block, queries) * min(512, queries * self.config.parallel.context) * FLOAT32

    def output_moments(self) -> list[Moment]:
        """Of the output layer and the loss; the softmax is computed, in float32, in the logits' place or in a copy."""
        elements = self.tokens * self.vocabulary_here
        logits = elements * self.element
        with_copy = logits + elements * FLOAT32 if self.element < FLOAT32 else logits
        residual = self.own_tokens * self.hidden_row
        to_input = self.tokens * self.hidden_row + (residual if self.config.parallel.sequence else 0)
        matrix = self._weight_gradient(self.vocabulary_here * self.model.hidden_size)
        return [
            Moment("loss", with_copy, logits=with_copy),
            Moment("output layer", logits + to_input + matrix, logits=logits),
        ]

    def embedding_moment(self) -> Moment:
        """The end of a micro-batch's backward pass on the first stage."""
        matrix = self._weight_gradient(self.vocabulary_here * self.model.hidden_size)
        return Moment("embedding", self.tokens * self.hidden_row + matrix)

    def gather_buffer(self) -> int:
        """megatron-core's buffer for tokens gathered before a product; it stays from the first step on."""
        gathered = [self.tokens] if self.config.parallel.sequence else []
        if self.gathers_units and self.model.expert_training == "dense":
            gathered.append(self.unit_tokens)
        return max(gathered, default=0) * self.hidden_row

    def _weight_gradient(self, elements: int) -> int:
        """Until it is added to the float32 buffer, for which a CPU makes a float32 copy."""
        return elements * (self.element + (FLOAT32 if self.casts_on_cpu else 0))

    def _in_float32_twice(self, size: int) -> int:
        return 2 * size // self.element * FLOAT32
