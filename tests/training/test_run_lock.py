"""One job at a time in a run folder, also where the file system knows no locks."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from dsmoe_megatron.errors import TrainingError
from dsmoe_megatron.training.run_lock import LOCK, RunLock

BEAT_SECONDS = 0.05


def hold(run_dir: Path, connection: Connection) -> None:
    """Hold the folder until told otherwise, with a child that inherits every descriptor."""
    lock = RunLock(run_dir, BEAT_SECONDS)
    lock.acquire()
    child = os.fork()
    if child == 0:
        signal.pause()
    connection.send(child)
    connection.recv()
    lock.release()


def started_holder(run_dir: Path) -> tuple[BaseProcess, Connection, int]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    holder = context.Process(target=hold, args=(run_dir, theirs), daemon=True)
    holder.start()
    return holder, ours, ours.recv()


def refusal(run_dir: Path) -> str:
    with pytest.raises(TrainingError) as refused:
        RunLock(run_dir, BEAT_SECONDS).acquire()
    return str(refused.value)


def test_a_second_job_is_told_who_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    holder, connection, child = started_holder(tmp_path)

    text = refusal(tmp_path)

    assert f"{tmp_path}: another job trains in this folder (process {holder.pid} on {os.uname().nodename}" in text
    assert "job 4711, since 20" in text
    connection.send("release")
    holder.join()
    RunLock(tmp_path, BEAT_SECONDS).acquire()
    os.kill(child, signal.SIGKILL)


def test_a_killed_holder_blocks_nobody_even_if_its_children_live(tmp_path: Path) -> None:
    holder, _, child = started_holder(tmp_path)
    holder.kill()
    holder.join()

    lock = RunLock(tmp_path, beat_seconds=3600)  # no waiting: the lock of this kernel says all
    lock.acquire()

    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    os.kill(child, signal.SIGKILL)


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of a mount without locks cannot be made here: its answer is."""

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_without_locks_a_beating_holder_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch)
    holder, _, child = started_holder(tmp_path)

    assert f"process {holder.pid}" in refusal(tmp_path)

    holder.kill()
    holder.join()
    RunLock(tmp_path, BEAT_SECONDS).acquire()
    os.kill(child, signal.SIGKILL)


def test_a_holder_that_is_overtaken_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_locks(monkeypatch)
    holder, _, child = started_holder(tmp_path)
    os.kill(holder.pid or 0, signal.SIGSTOP)  # a suspended node: it beats no more
    lock = RunLock(tmp_path, BEAT_SECONDS)
    lock.acquire()

    os.kill(holder.pid or 0, signal.SIGCONT)
    os.kill(child, signal.SIGKILL)  # it has inherited what join waits for
    holder.join(10)

    assert holder.exitcode == 1
    time.sleep(3 * BEAT_SECONDS)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert (tmp_path / LOCK).read_text() == ""
