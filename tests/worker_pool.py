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
from pathlib import Path
from typing import Any

JOB_TIMEOUT_SECONDS = 120
# megatron-core's DDP sits in a cycle through autograd's C++ nodes that nothing collects, so the groups of a finished
# job stay alive, each with threads of gloo; a hundred jobs would leave thousands of them
JOBS_PER_WORKER = 10


class WorkerPool:
    """Processes that wait for jobs.

    Args:
        size: processes; a job of a smaller world leaves the others idle.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.stores = tempfile.TemporaryDirectory(prefix="worker_pool_")
        self.jobs = 0
        self.workers: list[_Worker] = []

    def run(self, world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `job(*arguments)` on every rank of a fresh process group.

        Returns:
            What each rank returned, by rank.

        Raises:
            RuntimeError: a rank failed or did not answer; the message holds every rank's traceback.
        """
        if world_size > self.size:
            raise ValueError(f"a world of {world_size} in a pool of {self.size}")
        if not self.workers:
            self.workers = [_Worker(rank) for rank in range(self.size)]
        self.jobs += 1
        store = str(Path(self.stores.name) / f"job_{self.jobs}")
        for worker in self.workers[:world_size]:
            worker.connection.send((store, world_size, job, arguments))
        answers = [worker.answer() for worker in self.workers[:world_size]]
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            self._stop()  # what a failed job left in its processes must not reach the next one
            raise RuntimeError("\n".join(failures))
        for rank, worker in enumerate(self.workers):
            if worker.jobs == JOBS_PER_WORKER:
                worker.stop()
                self.workers[rank] = _Worker(rank)
        return [result for _, result in answers]

    def _stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()

    def close(self) -> None:
        self._stop()
        self.stores.cleanup()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, rank: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(rank, theirs))
        self.process.start()
        self.jobs = 0

    def answer(self) -> tuple[bool, Any]:
        """(whether the job failed, its result or the reason)."""
        self.jobs += 1
        if not self.connection.poll(JOB_TIMEOUT_SECONDS):
            return True, f"no answer within {JOB_TIMEOUT_SECONDS} s"
        try:
            answer: tuple[bool, Any] = self.connection.recv()
        except (EOFError, OSError):
            return True, "the worker ended"
        return answer

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


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
