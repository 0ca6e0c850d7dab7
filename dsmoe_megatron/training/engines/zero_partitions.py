"""What a data-parallel rank owns under ZeRO, as parts of the global tensors that every engine saves and loads.

ZeRO lays the parameters of a group end to end and cuts the result (stages 1, 2), or cuts each parameter (stage 3).
Either way a rank owns ranges of parameters in row-major order, as under megatron-core's distributed optimizer: no
layout, size, stage or engine needs a conversion of another's checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from dsmoe_megatron.training.optimizer_shards import PREFIX, Place, shards_of_range


@dataclass(frozen=True)
class _Flat:
    """A master partition: what the optimizer sees as one tensor.

    Attributes:
        master: float32, flat.
        group: index of its parameter group.
    """

    master: Tensor
    group: int


@dataclass(frozen=True)
class _Fragment:
    """This rank's range of one parameter.

    Attributes:
        parameter: its values may lie elsewhere (stage 3).
        begin, end: of the range within the parameter.
        flat: partition that it is part of.
        start: of the range within the partition.
    """

    parameter: Tensor
    begin: int
    end: int
    flat: _Flat
    start: int

    def of(self, values: Tensor) -> Tensor:
        """The range in a tensor that is laid out as the partition."""
        return values.detach()[self.start : self.start + self.end - self.begin]


class ZeroPartitions:
    """Weights, master weights and moments of this rank, where they lie.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        places: of every parameter in the global tensors.

    Attributes:
        weights_are_apart: the weights too are in parts (stage 3).
    """

    def __init__(self, zero: Any, places: dict[Tensor, list[Place]]) -> None:
        self._zero, self._places = zero, places
        self.weights_are_apart = optimizer_of_stage_3(zero)
        self._fragments = list(_of_stage_3(zero) if self.weights_are_apart else _of_stage_1_and_2(zero))

    def sharded_weights(self) -> list[ShardedTensor]:
        """This rank's parts of the weights in stage 3."""
        return [shard for fragment in self._fragments for shard in self._shards(fragment, {"": _weights(fragment)})]

    def sharded_optimizer_state(self) -> dict[str, Any]:
        """In the form that megatron-core's optimizer has too: hyperparameters, step count, and parts of the state."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._inner.param_groups]
        for group in groups:
            group["step"] = self._step_count()
        state = [list(self._shards(fragment, self._states(fragment))) for fragment in self._fragments]
        return {"optimizer": {"param_groups": groups}, "param_state": state}

    def make_moments(self) -> None:
        """Let the optimizer make its state, which it has only after its first step, without changing a weight."""
        for flat in self._flats():
            if not self._inner.state.get(flat.master):
                self._step_without_change(flat)

    def set_step_count(self, count: int) -> None:
        for flat in self._flats():
            state = self._inner.state[flat.master]
            state["step"] = torch.full_like(state["step"], count) if torch.is_tensor(state["step"]) else count

    def weights_changed(self) -> None:
        """Have the next forward pass gather the weights anew, where ranks keep some of them whole (stage 3)."""
        if self.weights_are_apart:
            self._zero._partition_all_parameters()

    @property
    def _inner(self) -> Any:
        return self._zero.optimizer

    def _flats(self) -> list[_Flat]:
        return list({id(fragment.flat): fragment.flat for fragment in self._fragments}.values())

    def _step_count(self) -> int:
        return int(self._inner.state[self._fragments[0].flat.master]["step"])

    def _step_without_change(self, flat: _Flat) -> None:
        groups, gradient = self._inner.param_groups, flat.master.grad
        self._inner.param_groups = [{**groups[flat.group], "params": [flat.master], "lr": 0.0}]
        flat.master.grad = torch.zeros_like(flat.master)
        try:
            self._inner.step()
        finally:
            self._inner.param_groups, flat.master.grad = groups, gradient

    def _states(self, fragment: _Fragment) -> dict[str, Tensor]:
        state = self._inner.state[fragment.flat.master]
        values = {"param": fragment.flat.master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        return {f"{PREFIX}.{key}.": fragment.of(value) for key, value in values.items()}

    def _shards(self, fragment: _Fragment, states: dict[str, Tensor]) -> Iterator[ShardedTensor]:
        return shards_of_range(self._places[fragment.parameter], fragment.begin, fragment.end, states)


def optimizer_of_stage_3(zero: Any) -> bool:
    """Whether a ZeRO optimizer cuts the weights too."""
    return isinstance(zero, DeepSpeedZeroOptimizer_Stage3)


def _weights(fragment: _Fragment) -> Tensor:
    partition: Tensor = fragment.parameter.ds_tensor  # type: ignore[attr-defined]
    return partition.detach()[: fragment.end - fragment.begin]


def _of_stage_1_and_2(zero: Any) -> Iterator[_Fragment]:
    for index, (parameters, master) in enumerate(
        zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    ):
        flat = _Flat(master, index)
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # else it lies in other ranks' partitions
                begin, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                yield _Fragment(parameter, begin, begin + count, flat, mapping.hp_fragment_address.start)


def _of_stage_3(zero: Any) -> Iterator[_Fragment]:
    rank = dist.get_rank(zero.dp_process_group)
    for index, (parameters, master) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        flat, start = _Flat(master, zero.sub_group_to_group_id[index]), 0
        for parameter in parameters:
            size = parameter.partition_numel()
            begin = min(rank * size, parameter.ds_numel)  # the last ranks' parts may be padded, or padding alone
            yield _Fragment(parameter, begin, min(begin + size, parameter.ds_numel), flat, start)
            start += size
