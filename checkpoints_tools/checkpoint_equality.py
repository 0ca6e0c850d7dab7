"""Whether two training checkpoints hold the same, bit by bit, whatever layouts they were saved under."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.distributed_checkpoint import OPTIMIZER, DistributedCheckpoint

LAYERS = "decoder.layers."  # stacked along the first axis; compared one by one, so that memory is a layer's
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_differences(first: Path, second: Path) -> Iterator[str]:
    """What differs between two step folders, one line per tensor: names, shapes, types, bits.

    Weights always; the optimizer's tensors where both have any.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    one, other = DistributedCheckpoint(first), DistributedCheckpoint(second)
    names = [_compared_names(one, other), _compared_names(other, one)]
    for folder, missing in ((second, names[0] - names[1]), (first, names[1] - names[0])):
        for name in sorted(missing):
            yield f"{folder}: {name}: is missing"
    both = sorted(names[0] & names[1])
    # no bar where nobody watches it
    with tqdm(total=len(both), unit="tensor", desc="compared", leave=False, disable=not sys.stderr.isatty()) as bar:
        for name in both:
            difference = _difference(one, other, name)
            if difference:
                yield f"{second}: {name}: {difference}"
            bar.update()


def compared_tensors(first: Path, second: Path) -> int:
    """How many tensors both have."""
    one, other = DistributedCheckpoint(first), DistributedCheckpoint(second)
    return len(_compared_names(one, other) & _compared_names(other, one))


def _compared_names(checkpoint: DistributedCheckpoint, other: DistributedCheckpoint) -> set[str]:
    names = set(checkpoint.tensor_shapes)
    if any(name.startswith(OPTIMIZER) for name in other.tensor_shapes):
        return names
    return {name for name in names if not name.startswith(OPTIMIZER)}


def _difference(one: DistributedCheckpoint, other: DistributedCheckpoint, name: str) -> str | None:
    shape, dtype = one.tensor_shapes[name], one.tensor_dtypes[name]
    if other.tensor_shapes[name] != shape:
        return f"has shape {other.tensor_shapes[name]}, not {shape}"
    if other.tensor_dtypes[name] != dtype:
        return f"is {other.tensor_dtypes[name]}, not {dtype}"
    layers: list[int | None] = list(range(shape[0])) if LAYERS in name else [None]
    differing, largest, places = 0, 0.0, []
    for layer in layers:
        tensors = [checkpoint.read(name, layer) for checkpoint in (one, other)]
        count, difference = _compare(*tensors)
        if count:
            differing, largest = differing + count, max(largest, difference)
            places.append(layer)
    if not differing:
        return None
    where = "" if LAYERS not in name else f", first in layer {places[0]}"
    total = torch.Size(shape).numel()
    return f"differs in {differing:,} of {total:,} values{where}, by up to {largest:.3g}"


def _compare(one: Tensor, other: Tensor) -> tuple[int, float]:
    """Values whose bits differ, and the largest difference."""
    bits = BITS[one.dtype.itemsize]
    if torch.equal(one.view(bits), other.view(bits)):
        return 0, 0.0
    count = int((one.view(bits) != other.view(bits)).sum())
    return count, float((one.double() - other.double()).abs().max())
