"""Traces of chosen steps by torch's profiler, for chrome://tracing or Perfetto, with what memory held in them."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dsmoe_megatron.config import ProfileConfig
from dsmoe_megatron.runtime.live_memory import peak_of_allocations

MEMORY_EVENTS = 1_000_000
STEPS_BY_DEFAULT = 3


class StepProfiler:
    """Records steps `first_step` to `last_step`; a profiler that fails is given up with one line.

    Args:
        section: what to record.
        folder: of the traces; made when the first one is written.
        device: of this rank.
        rank: of this process.
    """

    def __init__(self, section: ProfileConfig, folder: Path, device: torch.device, rank: int) -> None:
        self.section, self.folder, self.device, self.rank = section, folder, device, rank
        first = section.first_step or 0
        last = section.last_step or first + STEPS_BY_DEFAULT - 1
        chosen = section.first_step is not None and (rank == 0 or section.every_rank)
        self.steps = range(first, last + 1) if chosen else range(0)
        self.profiler: profile | None = None
        self.recorded: list[int] = []

    def before(self, step: int) -> None:
        """The step is about to be taken."""
        if step in self.steps and self.profiler is None:
            self._or_give_up(self._start)

    def after(self, step: int) -> None:
        """The step has been taken."""
        if self.profiler is None:
            return
        self.recorded.append(step)
        if step + 1 not in self.steps:
            self._or_give_up(self._finish)

    def close(self) -> None:
        """The run has ended, perhaps before the last chosen step."""
        if self.profiler is not None and self.recorded:
            self._or_give_up(self._finish)

    def _or_give_up(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever goes wrong here, the run is worth more
            self.steps, self.profiler = range(0), None
            text = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: rank {self.rank}: the profiler is off, the run goes on without it: {text}", flush=True)

    def _start(self) -> None:
        on_cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        if self.section.memory and on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        profiler = profile(activities=activities, profile_memory=self.section.memory)
        profiler.start()
        self.profiler = profiler

    def _finish(self) -> None:
        assert self.profiler is not None
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        name = f"steps_{self.recorded[0]:08d}_to_{self.recorded[-1]:08d}_rank_{self.rank:05d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, unfinished = self.folder / f"{name}.json.gz", self.folder / f".{name}.json.gz"
        profiler.export_chrome_trace(str(unfinished))
        unfinished.replace(trace)
        print(f"rank {self.rank}: profile in {trace}", flush=True)
        if self.section.memory:
            self._memory(trace, self.folder / f"{name}.memory.pickle")

    def _memory(self, trace: Path, snapshot: Path) -> None:
        """On a GPU the allocator's history; on a CPU, which has none, the peak that the trace's events add up to."""
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
            print(f"rank {self.rank}: memory history in {snapshot}, for pytorch.org/memory_viz", flush=True)
            return
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            peak = peak_of_allocations(json.load(file)["traceEvents"], self.device)
        text = f"tensors made in these steps held {peak / 2**20:,.1f} MiB at the highest point"
        print(f"rank {self.rank}: {text}; a memory history is CUDA's alone", flush=True)
