"""Initial weights that depend on the seed and on nothing else: not on the layout, the device or the order of building.

Every parameter is a slice of a global tensor that megatron-core's sharded state dict describes. The global tensor of
one layer is drawn on the host, from a generator seeded with (seed, its key, the layer), and each rank keeps its slice.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from dsmoe_megatron.config import ModelConfig

OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(chunks: Sequence[GPTModel], model: ModelConfig, seed: int) -> None:
    """Fill every parameter: norms with one (biases zero), the rest normal.

    Args:
        chunks: model chunks of this rank, not yet wrapped.
        model: initializer_range is the standard deviation; output projections use it over sqrt(2 x layers).
        seed: the run's.

    Raises:
        RuntimeError: a parameter is not covered by the sharded state dict.
    """
    for chunk in chunks:
        filled = sum(_fill(shard, model, seed) for shard in _shards(chunk))
        expected = sum(parameter.numel() for parameter in chunk.parameters())
        if filled != expected:
            raise RuntimeError(
                f"initialised {filled} of {expected} weights: a parameter is missing from the state dict"
            )


def _shards(chunk: GPTModel) -> Iterable[ShardedTensor]:
    state = chunk.sharded_state_dict()
    apply_factories(state)  # splits gated fc1 weights into [gate, up]
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor) and value.data is not None)


def _fill(shard: ShardedTensor, model: ModelConfig, seed: int) -> int:
    data: Tensor = shard.data
    if data.is_meta:  # built for its shapes alone
        return data.numel()
    if "norm" in shard.key:
        data.fill_(0.0 if shard.key.endswith(".bias") else 1.0)
        return data.numel()
    std = model.initializer_range
    if shard.key.endswith(OUTPUT_PROJECTIONS):
        std /= math.sqrt(2 * model.num_hidden_layers)
    # layers (and, sparse-trained, experts) are stacked along leading axes that no single tensor has
    stacked = shard.prepend_axis_num
    shape, index = shard.global_shape[stacked:], shard.global_offset[:stacked]
    generator = torch.Generator().manual_seed(_tensor_seed(seed, shard.key, index))
    whole = torch.randn(shape, generator=generator, dtype=torch.float32)
    data.copy_(whole[shard.global_slice()[stacked:]].view_as(data).mul_(std))
    return data.numel()


def _tensor_seed(seed: int, key: str, index: Sequence[int]) -> int:
    digest = hashlib.sha256(f"{seed}/{key}/{tuple(index)}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
