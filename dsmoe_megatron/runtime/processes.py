"""When processes end: ranks with torchrun, their helpers with them, and everything orderly on a signal to stop.

SIGTERM is what torchrun hands on and what schedulers send before they kill; SIGUSR1 is what a SLURM job can ask for
some minutes ahead (`#SBATCH --signal=B:USR1@300`).
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1


class StopSignals:
    """Remembers that a signal to stop has come.

    A handler does nothing else, so that it may come at any moment: during data preparation, validation, a save, or a
    second time.
    """

    def __init__(self) -> None:
        self.received = 0

    def listen(self, others: Sequence[signal.Signals] = ()) -> None:
        """Take these signals from now on, all of them: the second of two must not kill what the first began.

        Args:
            others: beside STOP_SIGNALS.
        """
        for number in (*STOP_SIGNALS, *others):
            signal.signal(number, self._remember)

    def ignore(self) -> None:
        """Let no further signal end this process: Python takes handlers, but not this, back before it exits."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.received = number


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; end at once if it has ended already.

    torchrun starts its workers in sessions of their own: when it is killed they would live on, holding devices and
    the run folder. Linux only (prctl PR_SET_PDEATHSIG); elsewhere nothing is asked.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    started_by = multiprocessing.parent_process()  # None unless Python started this process
    if os.getppid() != parent or not (started_by is None or started_by.is_alive()) or _lost_torchrun():
        os._exit(1)


def stop_with_parent() -> None:
    """For the start of a process (`preexec_fn`): it is told to stop when its parent ends, however that ends.

    Linux only, as end_with_parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _lost_torchrun() -> bool:
    """Whether this is a worker of torchrun's that init has taken in; in a container torchrun may be init itself."""
    if os.getppid() != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    return b"torch" not in Path("/proc/1/cmdline").read_bytes()


def serve_this_rank(_number: int = 0) -> None:
    """For the start of a rank's helper processes (data loaders): end with the rank, not before it.

    Schedulers send stop signals to all processes of a job at once, and a rank needs its helpers for its last save.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
