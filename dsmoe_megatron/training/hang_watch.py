"""A run that does not get on ends, and says where every rank was.

Each rank has a thread that counts the seconds since the run's last step, or whatever else `beat` was called for. After
`limit_s` of them it writes the stacks of all threads to RUN_DIR/stacks, waits until the others have done so, says in
one line which ranks were not waiting for others, and ends the process; torchrun ends what is left. A process that is
stopped, or whose interpreter something holds, cannot write: that it does not answer is said in its place.

Seconds are counted, not read from a clock: a job that its scheduler suspends and continues has not hung.
"""

import contextlib
import faulthandler
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

STACKS = "stacks"
LONGEST_GRACE_SECONDS = 10.0  # in which the ranks, which hang together, write their stacks
WAITING_FILES = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication.py")
NAMED_RANKS = 4  # in the line; the stacks have them all


def grace_seconds(limit_s: float) -> float:
    return min(LONGEST_GRACE_SECONDS, limit_s / 2)


class HangWatch:
    """Ends a process whose run does not get on.

    Args:
        run_dir: where stacks are written.
        limit_s: longest time without a beat [s].
        rank: of this process.
        ranks: of the run.
    """

    def __init__(self, run_dir: Path, limit_s: float, rank: int, ranks: int) -> None:
        self.folder, self.limit_s, self.rank, self.ranks = run_dir / STACKS, limit_s, rank, ranks
        self.place, self.silent_s = "the start", 0.0
        self.ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the time of the block."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier start
        main_thread = threading.get_ident()
        thread = threading.Thread(target=self._watch, args=(main_thread,), name="hang watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ended.set()

    def beat(self, place: str) -> None:
        """The run has got on, and comes to `place`."""
        self.place, self.silent_s = place, 0.0

    def _watch(self, main_thread: int) -> None:
        tick = min(1.0, self.limit_s / 10)
        while not self.ended.wait(tick):
            self.silent_s += tick
            if self.silent_s >= self.limit_s:
                self._end(main_thread)

    def _end(self, main_thread: int) -> None:
        frame = sys._current_frames().get(main_thread)
        with contextlib.suppress(OSError):
            self._write_stacks(_whereabouts(frame))
        time.sleep(grace_seconds(self.limit_s))
        if self.silent_s < self.limit_s or self.ended.is_set():
            return  # it was only slow
        with contextlib.suppress(OSError), (self.folder / "report.txt").open("x", encoding="utf-8") as file:
            line = self._report()
            print(line, file=sys.stderr, flush=True)
            file.write(line + "\n")
        os._exit(1)

    def _write_stacks(self, whereabouts: str) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"rank_{self.rank:05d}.txt"
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(f"{whereabouts}\nrank {self.rank} on {socket.gethostname()}, process {os.getpid()}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        unfinished.rename(path)

    def _report(self) -> str:
        """Who waits is a victim; who does not, or says nothing, is what they wait for."""
        elsewhere, silent = [], []
        for rank in range(self.ranks):
            path = self.folder / f"rank_{rank:05d}.txt"
            if not path.is_file():
                silent.append(str(rank))
                continue
            whereabouts, who, *_ = path.read_text(encoding="utf-8").splitlines()
            if not whereabouts.startswith("waits"):
                elsewhere.append(f"{who} {whereabouts}")
        causes = elsewhere[:NAMED_RANKS]
        if silent:
            causes.append(f"rank {', '.join(silent[:NAMED_RANKS])} does not answer (stopped, killed or its node lost)")
        return (
            f"dsmoe-megatron: error: no progress for {self.limit_s / 60:g} minutes (train.timeout_minutes) after "
            f"{self.place}: {'; '.join(causes) or 'every rank waits for others'}; the stacks of the ranks are in "
            f"{self.folder}"
        )


def _whereabouts(frame: FrameType | None) -> str:
    """`waits in all_reduce` within a collective, else the function that runs."""
    if frame is None:
        return "has ended"
    innermost = f"is in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in WAITING_FILES):
            return f"waits in {frame.f_code.co_name}"
        frame = frame.f_back
    return innermost
