"""Worker processes that are started once and then run many distributed jobs over gloo, each with its own world size.

Starting torch and megatron-core costs seconds; a layout costs a fraction of one when its process groups are set up and
torn down in processes that are already there.
"""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

JOB_TIMEOUT_SECONDS = 120


class WorkerPool:
    """Processes that wait for jobs.

    Args:
        size: processes; a job of a smaller world leaves the others idle.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.stores = tempfile.TemporaryDirectory(prefix="worker_pool_")
        self.jobs = 0
        self.connections: list[Connection] = []
        self.processes: list[SpawnProcess] = []

    def run(self, world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `job(*arguments)` on every rank of a fresh process group.

        Returns:
            What each rank returned, by rank.

        Raises:
            RuntimeError: a rank failed or did not answer; the message holds every rank's traceback.
        """
        if world_size > self.size:
            raise ValueError(f"a world of {world_size} in a pool of {self.size}")
        if not self.processes:
            self._start()
        self.jobs += 1
        store = str(Path(self.stores.name) / f"job_{self.jobs}")
        for connection in self.connections[:world_size]:
            connection.send((store, world_size, job, arguments))
        answers = [self._answer(rank) for rank in range(world_size)]
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            self._stop()  # what a failed job left in its processes must not reach the next one
            raise RuntimeError("\n".join(failures))
        return [result for _, result in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs))
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self.connections[rank].poll(JOB_TIMEOUT_SECONDS):
            return True, f"no answer within {JOB_TIMEOUT_SECONDS} s"
        try:
            answer: tuple[bool, Any] = self.connections[rank].recv()
        except (EOFError, OSError):
            return True, "the worker ended"
        return answer

    def _stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes.clear()
        self.connections.clear()

    def close(self) -> None:
        self._stop()
        self.stores.cleanup()


def _serve(rank: int, connection: Connection) -> None:
    import torch

    from dsmoe_megatron.runtime.distributed import end_with_parent, prepare_device

    end_with_parent()  # not a daemon, which could not start the processes that write checkpoints
    torch.set_num_threads(1)
    prepare_device()
    while True:
        try:
            store, world_size, job, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, _in_process_group(rank, world_size, store, job, arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))


def _in_process_group(rank: int, world_size: int, store: str, job: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    import torch.distributed as dist

    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    try:
        return job(*arguments)
    finally:
        dist.destroy_process_group()
