"""A recipe in two processes over gloo that take a training step when told to, and wait while others take their turn."""

import contextlib
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Run, paired_seconds, training_step
from dsmoe_megatron.config import Config
from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device
from dsmoe_megatron.runtime.live_memory import live_bytes
from dsmoe_megatron.runtime.processes import end_with_parent

PROCESSES = 2


class TwoProcesses:
    """One thread each.

    Args:
        config: what they train.
        store: path of a file that nothing else uses; they meet there.
    """

    def __init__(self, config: Config, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(PROCESSES):
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, config, rank, str(store)), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(connection)
            self.processes.append(process)

    def memory(self) -> list[dict[str, int]]:
        """LiveBytes of each process, by name; to be asked for before the first step."""
        return [dict(answer) for answer in self._all("memory")]

    def step(self) -> None:
        """One optimizer step in both."""
        self._all("step")

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _all(self, what: str) -> list[dict[str, int]]:
        for connection in self.connections:
            connection.send(what)
        return [connection.recv() for connection in self.connections]


@contextlib.contextmanager
def side_by_side(recipes: Mapping[str, Config]) -> Iterator[dict[str, TwoProcesses]]:
    """The processes of every recipe, by its name; none is left after the block."""
    with tempfile.TemporaryDirectory() as stores:
        contestants = {name: TwoProcesses(config, Path(stores) / name) for name, config in recipes.items()}
        try:
            yield contestants
        finally:
            for processes in contestants.values():
                processes.stop()


def step_times(contestants: Mapping[str, TwoProcesses], reference: str, repeats: int) -> dict[str, dict[str, Any]]:
    """Of each: the median of its steps' seconds, and their ratios to the reference's of the same repeat, sorted."""
    steps: dict[str, Run] = {name: processes.step for name, processes in contestants.items()}
    seconds = paired_seconds(steps, repeats, torch.device("cpu"))
    others = [each.wall for each in seconds[reference]]
    return {
        name: {
            "median_seconds": statistics.median(each.wall for each in own),
            "ratios": sorted(each.wall / other for each, other in zip(own, others, strict=True)),
        }
        for name, own in seconds.items()
    }


def step_header(reference: str) -> list[str]:
    """Columns of `step_cells`."""
    return ["step", f"of {reference}, median [min, max]"]


def step_cells(times: Mapping[str, Any]) -> list[str]:
    """One entry of `step_times` in a table."""
    ratios = times["ratios"]
    return [
        f"{times['median_seconds'] * 1e3:.0f} ms",
        f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
    ]


def _serve(connection: Connection, config: Config, rank: int, store: str) -> None:
    import torch.distributed as dist

    end_with_parent()
    torch.set_num_threads(1)
    device = prepare_device()
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=timeout)
    with model_parallel_groups(config.parallel, config.train.seed):
        step: Callable[[], object] | None = None

        def build() -> Callable[[], object]:
            nonlocal step
            step = step or training_step(config, device)
            return step

        while True:
            try:
                wanted = connection.recv()
            except EOFError:
                return
            if wanted == "memory":
                connection.send(asdict(live_bytes(build, device)))
            else:
                build()()
                connection.send({})
