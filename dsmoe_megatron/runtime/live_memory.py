"""How many bytes of tensors are alive in a step, from the profiler's record of allocations: not the process's size."""

import contextlib
import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class LiveBytes:
    """Bytes of the tensors that are alive.

    Attributes:
        before: when the step begins: weights, gradient buffers, optimizer state, the batch.
        own_peak: what the step holds beyond that at its highest point: activations, their gradients, temporaries.
        peak: both together.
    """

    before: int
    own_peak: int
    peak: int


def live_bytes(build: Callable[[], Callable[[], object]], device: torch.device) -> LiveBytes:
    """Of a model's second step: the optimizer's state exists from the first one on.

    Args:
        build: makes the model, and returns what takes one step.
        device: of the tensors that count.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    gc.collect()
    of_others = storage_bytes(device)
    step = build()
    step()
    with no_garbage_collection():
        before = storage_bytes(device) - of_others
        with profile(activities=activities, profile_memory=True) as profiler:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        own_peak = peak_of_allocations(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], device)
    return LiveBytes(before, own_peak, before + own_peak)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not before the block's end: what is freed in it must not depend on what ran before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def storage_bytes(device: torch.device) -> int:
    """Of all tensors that Python knows, views and their base counted once."""
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device == device)
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_of_allocations(events: Sequence[dict[str, Any]], device: torch.device) -> int:
    """The highest running total of the allocations and frees in a Chrome trace of the profiler."""
    device_type = 1 if device.type == "cuda" else 0  # c10::DeviceType
    moves = (event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == device_type)
    alive: dict[int, int] = {}
    total = peak = 0
    for move in sorted(moves, key=lambda move: move["ts"]):
        address, size = move["args"]["Addr"], move["args"]["Bytes"]
        # what is freed counts only if it was born here. A block still there at an address that is given out again was
        # freed unseen: gloo's thread, which the profiler does not watch, was the last to hold it
        total -= alive.pop(address, 0)
        if size > 0:
            alive[address] = size
            total += size
        peak = max(peak, total)
    return peak
