"""The distributed optimizer's state as parts of global tensors, where it lies: nothing is gathered, nothing copied.

A data-parallel rank owns a range of a parameter's values in row-major order. A range of an array of d axes is at most
2d - 1 boxes, and torch's distributed checkpoint takes boxes of any size. So every rank saves and loads what it owns,
whatever the layout of the other side. megatron-core's own `fully_reshardable` format, whose names and global shapes
these are, gathers the state of all data-parallel ranks on each of them: three copies of it at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from dsmoe_megatron.training.optimizer import own_step_counts, wrapped_optimizers

STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")
PREFIX = "optimizer.state"


def sharded_optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[Any, Any]:
    """Hyperparameters and step count of each parameter group, and this rank's part of the state per parameter.

    Args:
        optimizer: megatron-core's distributed optimizer, or a chain of them.
        model_state: sharded tensors of all parameters, which say where in the global tensors they lie.

    Returns:
        For dist_checkpointing; its tensors are the optimizer's own, so that loading fills them in place.
    """
    optimizers = wrapped_optimizers(optimizer)
    if len(optimizers) > 1:
        optimizer._synchronize_steps()  # Transformer Engine's does not count the steps of empty groups
    states = [
        {**distributed.state_dict(), "param_state": _param_state(distributed, model_state)}
        for distributed in optimizers
    ]
    return states[0] if len(states) == 1 else dict(enumerate(states))


def load_step_count(optimizer: MegatronOptimizer, saved: dict[Any, Any]) -> None:
    """Take over what is no tensor of a saved state: how many steps were done. All else is the recipe's.

    Args:
        optimizer: its tensors are loaded.
        saved: what was saved of an optimizer, without tensors.
    """
    step = saved_step_count(saved)
    for distributed in wrapped_optimizers(optimizer):
        state = distributed.state_dict()
        for group in state["optimizer"]["param_groups"]:
            if step is not None:
                group["step"] = step
        distributed.load_state_dict(state)
    own_step_counts(optimizer)


def saved_step_count(saved: dict[Any, Any]) -> int | None:
    """How many steps a saved optimizer had done.

    It may be a chain: megatron-core's own MoELayer has a second optimizer under expert parallelism only.
    """
    states = [saved] if "optimizer" in saved else list(saved.values())
    groups = [group for state in states for group in state["optimizer"]["param_groups"]]
    return next((int(group["step"]) for group in groups if group.get("step") is not None), None)


def _param_state(distributed: Any, model_state: dict[str, Any]) -> list[list[ShardedTensor]]:
    places = places_of(model_state)
    return [
        list(
            shards_of_range(
                places[parameter], owned["param"].start, owned["param"].end, _states(distributed, parameter)
            )
        )
        for by_dtype in distributed.gbuf_ranges
        for buckets in by_dtype.values()
        for bucket in buckets
        for parameter, owned in bucket["param_map"].items()
    ]


def _states(distributed: Any, parameter: Tensor) -> dict[str, Tensor]:
    """This rank's range of the parameter's master weights and, after the first step, moments."""
    states = distributed._get_main_param_and_optimizer_states(parameter)
    return {f"{PREFIX}.{key}.": states[key].detach() for key in STATE_KEYS if key in states}


@dataclass(frozen=True)
class Place:
    """Where a run of a parameter's values, in row-major order, lies in a global tensor.

    Attributes:
        template: sharded tensor of the run, without its data.
        first: place of the run's first value within the parameter.
    """

    template: ShardedTensor
    first: int


def places_of(model_state: dict[str, Any]) -> dict[Tensor, list[Place]]:
    """Parameter -> where its values lie: in one global tensor, or, a gated projection, in two.

    Args:
        model_state: sharded tensors of all parameters.
    """
    bases, _ = extract_sharded_tensors_and_factories(model_state)
    return {base.data: [_place(part, base.data) for part in _parts(base)] for base in nested_values(bases)}


def _parts(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    return list(nested_values(base.build())) if isinstance(base, ShardedTensorFactory) else [base]


def _place(part: ShardedTensor, parameter: Tensor) -> Place:
    assert part.data is not None
    assert part.data.is_contiguous(), f"{part.key}: is cut along an inner axis"
    return Place(part.without_data(), part.data.storage_offset() - parameter.storage_offset())


def shards_of_range(
    places: Sequence[Place], begin: int, end: int, states: dict[str, Tensor]
) -> Iterator[ShardedTensor]:
    """What this data-parallel rank owns of a parameter: a sharded tensor per kind of state and box.

    Args:
        places: of the parameter.
        begin, end: the range of the parameter's values that is owned.
        states: prefix of the global tensor's name -> the state of that range, flat; shards are views of it.
    """
    for place in places:
        template, first = place.template, place.first
        start, stop = max(begin, first), min(end, first + math.prod(template.local_shape))
        for offsets, sizes in boxes(template.local_shape, start - first, max(start, stop) - first):
            count = math.prod(sizes)
            for prefix, values in states.items():
                box = values[start - begin : start - begin + count]
                yield _shard(prefix + template.key, box, template, offsets, sizes)
            start += count


def _shard(
    key: str, values: Tensor, part: ShardedTensor, offsets: Sequence[int], sizes: Sequence[int]
) -> ShardedTensor:
    prepended = part.prepend_axis_num
    shape = (*[1] * prepended, *sizes)
    within = (*[0] * prepended, *offsets)
    return ShardedTensor(
        key,
        values.view(shape),
        values.dtype,
        shape,
        part.global_shape,
        tuple(begin + offset for begin, offset in zip(part.global_offset, within, strict=True)),
        axis_fragmentations=None,  # not a regular grid
        # replicas are those of the parameter, except that every data-parallel rank owns another range
        replica_id=(*part.replica_id[:2], 0),
    )


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes that hold the values [begin, end) of a row-major array, in order: (offsets, sizes) of each."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield (begin,), (end - begin,)
        return
    row = math.prod(shape[1:])
    if begin % row:  # the rest of a row that is begun
        index, stop = begin // row, min(end, (begin // row + 1) * row)
        yield from _in_row(shape, index, begin, stop)
        begin = stop
    if whole := (end - begin) // row:
        yield (begin // row, *[0] * (len(shape) - 1)), (whole, *shape[1:])
        begin += whole * row
    if begin < end:
        yield from _in_row(shape, begin // row, begin, end)


def _in_row(
    shape: Sequence[int], index: int, begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    row = math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], begin - index * row, end - index * row):
        yield (index, *offsets), (1, *sizes)
