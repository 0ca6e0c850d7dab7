"""What one whole process costs: processor time of it and its children, time by the clock, peak resident memory.

    python -I -S benchmarks/process_usage.py REPORT.json COMMAND ...

The command is started by this small script in a process of its own, since Linux counts the memory of the process that
starts another one towards the new one's peak: started from a program that holds torch, everything would seem to need
hundreds of megabytes. So this file imports the standard library alone.

A process's usage reaches only the one that waits for it. Python's fork server, for one, is waited for by nobody, and
its workers would cost nothing. So the small script adopts what the command leaves behind, and waits for all of it.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


@dataclass(frozen=True)
class Usage:
    """One run of one command.

    Args:
        processor: user and system time of the process and all its children [s].
        wall: time by the clock [s].
        peak_bytes: resident memory at its peak, of the largest of these processes.
    """

    processor: float
    wall: float
    peak_bytes: int


class CommandError(Exception):
    """A measured command ended with an error; the message is the last line that it wrote."""


def measured(command: Sequence[str], environment: dict[str, str], folder: Path, report: Path) -> Usage:
    """Run a command to its end.

    Args:
        command: program and arguments.
        environment: variables beside those of this process.
        folder: that it runs in.
        report: file that the small script may write to, beside it a log with what the command wrote.

    Raises:
        CommandError: the command ended with an error.
    """
    log = report.with_suffix(".log")
    with log.open("wb") as output:
        launcher = [sys.executable, "-I", "-S", __file__, str(report), *command]
        variables = {**os.environ, **environment}
        subprocess.run(launcher, check=True, stdout=output, stderr=output, env=variables, cwd=folder)
    contents = json.loads(report.read_text(encoding="utf-8"))
    if contents.pop("exit_code") != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        raise CommandError(next((line for line in reversed(lines) if line.strip()), "no output"))
    return Usage(**contents)


def _launch(report: Path, command: Sequence[str]) -> None:
    _adopt_orphans()
    started = time.perf_counter()
    exit_code = subprocess.call(command)
    wall = time.perf_counter() - started
    _wait_for_all()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # the sum of times, the largest of peaks
    spent = Usage(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * 1024)
    report.write_text(json.dumps({"exit_code": exit_code, **asdict(spent)}), encoding="utf-8")


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _wait_for_all() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    _launch(Path(sys.argv[1]), sys.argv[2:])
