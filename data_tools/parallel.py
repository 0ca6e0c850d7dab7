"""A map over worker processes that keeps the order and holds only a few items at a time."""

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from dsmoe_megatron.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

BUFFERED_PER_WORKER = 4  # results that may wait for a slow one before them


class WorkerError(Exception):
    """An error in a worker, with the worker's traceback as its message."""


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(function, items)`, computed by `workers` processes; in this process where that is one.

    Each worker gets `function` once, so it may carry something large, and has at most one item. A worker whose parent
    has died reads the end of its pipe and ends.

    Args:
        function: can be pickled.
        workers: processes.

    Raises:
        DataError: a worker was killed.
        WorkerError: `function` raised.
    """
    if workers == 1:
        yield from map(function, items)
        return

    # not fork: this process has threads (the progress bar's, the tokenizer's)
    context = get_context("spawn")
    idle: list[Connection] = []
    processes = []
    try:
        with _interrupt_blocked():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, function), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                idle.append(ours)
        yield from _dispatch(idle, iter(items), limit=BUFFERED_PER_WORKER * workers)
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal; workers started here inherit the mask and leave it to the parent."""
    resource_tracker.ensure_running()  # its start unblocks the signal, so it must not come later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _dispatch(idle: list[Connection], items: Iterator[Any], limit: int) -> Iterator[Any]:
    """Give items to idle workers and yield the results in the items' order."""
    busy: dict[Connection, int] = {}  # connection -> number of its item
    finished: dict[int, Any] = {}
    given = yielded = 0
    more = True
    while True:
        while more and idle and given < yielded + limit:
            try:
                item = next(items)
            except StopIteration:
                more = False
                break
            connection = idle.pop()
            _talk(connection.send, item)
            busy[connection] = given
            given += 1
        if not busy:  # then all that was given has been yielded, so nothing is left to give either
            return
        ready = wait(list(busy))
        for connection in [connection for connection in busy if connection in ready]:
            result = _talk(connection.recv)
            if isinstance(result, WorkerError):
                raise result
            finished[busy.pop(connection)] = result
            idle.append(connection)
        while yielded in finished:
            yield finished.pop(yielded)
            yielded += 1


def _talk(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (EOFError, OSError) as error:
        raise DataError("a worker process was killed (out of memory?): try again with fewer --workers") from error


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """A worker: answer every item until the pipe ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result = function(item)
        except Exception:
            result = WorkerError(traceback.format_exc())
        try:
            connection.send(result)
        except OSError:
            return
