"""Watches the tasks of a run: a progress bar over all of them, and an eye on workers that were killed."""

import json
import os
import platform
import signal
import sys
import threading
from types import TracebackType
from typing import Any

from tqdm import tqdm

from data_tools.work_folder import TaskFolder, WorkFolder

INTERVAL_SECONDS = 0.5


class ProgressWatcher:
    """Reads what the tasks tell of themselves, in a thread of its own, while the context is open.

    A worker that was killed (out of memory, say) would be waited for forever: then the main thread is interrupted.

    Args:
        folder: of the run.
        total: bytes of the stored input.
    """

    def __init__(self, folder: WorkFolder, total: int) -> None:
        self._folder, self._total = folder, total
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.killed = False
        """Whether a worker was killed."""

    def __enter__(self) -> "ProgressWatcher":
        self._usual_handler = signal.signal(signal.SIGINT, self._interrupted)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        signal.signal(signal.SIGINT, self._usual_handler)

    def _interrupted(self, *_: object) -> None:
        self._stop.set()  # the workers that are ended now were not killed
        raise KeyboardInterrupt

    def _watch(self) -> None:
        tasks = {task.path.name: task for task in self._folder.tasks()}
        told: dict[str, dict[str, Any]] = {}
        first = 0  # tokens and text bytes of an earlier run do not count for the speed
        # no bar where nobody watches it
        with tqdm(total=self._total, unit="B", unit_scale=True, desc="input", disable=not sys.stderr.isatty()) as bar:
            while True:
                last_look = self._stop.wait(INTERVAL_SECONDS)
                for name, task in list(tasks.items()):
                    if self._is_finished(task, told):
                        del tasks[name]
                consumed = sum(each["consumed"] for each in told.values())
                if not bar.n and consumed:
                    first = sum(each["text_bytes"] for each in told.values())
                    bar.initial = consumed
                text = sum(each["text_bytes"] for each in told.values())
                tokens = sum(each["tokens"] for each in told.values())
                speed = (text - first) / 1e6 / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"{speed:.1f} MB/s of text, {tokens:,} tokens", refresh=False)
                bar.update(consumed - bar.n)
                if last_look:
                    return

    def _is_finished(self, task: TaskFolder, told: dict[str, dict[str, Any]]) -> bool:
        """Take in what a task tells of itself, and whether nothing of it is left."""
        try:
            progress = json.loads(task.progress_path.read_bytes())
        except (OSError, ValueError):  # not begun, or being written just now
            return False
        told[task.path.name] = progress
        if progress["finished"]:
            return True
        if progress["host"] != platform.node() or _is_alive(progress["pid"]):
            return False
        # its segments are asked only now: reading all of them at every look would be work for every worker
        if not task.finished and not self._stop.is_set():
            self.killed = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return task.finished


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True
