"""Distributed jobs over gloo, in processes forked from one server that has torch and megatron-core loaded.

Loading them costs seconds, a fork a fraction of one. Every job has processes of its own: what it leaves behind (gloo's
threads, which megatron-core's DDP keeps alive in a cycle that nothing collects) ends with them.
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


class WorkerPool:
    """Runs jobs on as many fresh processes as each asks for."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.worker_preload"])
        self.stores = tempfile.TemporaryDirectory(prefix="worker_pool_")
        self.jobs = 0

    def run(self, world_size: int, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run `job(*arguments)` on every rank of a fresh process group.

        Returns:
            What each rank returned, by rank.

        Raises:
            RuntimeError: a rank failed or did not answer; the message holds every rank's traceback.
        """
        self.jobs += 1
        store = str(Path(self.stores.name) / f"job_{self.jobs}")
        workers = [_Worker(self.context, rank, world_size, store, job, arguments) for rank in range(world_size)]
        try:
            answers = [worker.answer() for worker in workers]
        finally:
            for worker in workers:
                worker.stop()
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        self.stores.cleanup()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, context: Any, *job: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *job))
        self.process.start()
        theirs.close()

    def answer(self) -> tuple[bool, Any]:
        """(whether the job failed, its result or the reason)."""
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
        self.connection.close()


def _work(
    connection: Connection, rank: int, world_size: int, store: str, job: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    from dsmoe_megatron.runtime.processes import end_with_parent

    end_with_parent()
    try:
        connection.send((False, _in_process_group(rank, world_size, store, job, arguments)))
    except BaseException:
        connection.send((True, traceback.format_exc()))
    connection.poll(None)  # tensors are handed over while this process lives; `stop` ends it


def _in_process_group(rank: int, world_size: int, store: str, job: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    import torch.distributed as dist

    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    return job(*arguments)
