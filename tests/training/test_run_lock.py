"""One job at a time in a run folder, also where the file system knows no locks."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from dsmoe_megatron.errors import TrainingError
from dsmoe_megatron.training import run_lock
from dsmoe_megatron.training.run_lock import LOCK, RunLock

BEAT_SECONDS = 0.05


@dataclass
class Holder:
    """A process that holds a run folder, and the child that has inherited its descriptors."""

    process: BaseProcess
    connection: Connection
    child: int

    def stop(self) -> None:
        """Suspend it, as a suspended node does; it stands still when this returns."""
        os.kill(self.process.pid or 0, signal.SIGSTOP)
        os.waitpid(self.process.pid or 0, os.WUNTRACED)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def kill_child(self) -> None:
        if self.child:
            os.kill(self.child, signal.SIGKILL)
        self.child = 0


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


@pytest.fixture
def start_holder(tmp_path: Path) -> Iterator[Callable[[], Holder]]:
    """Starts holders of `tmp_path`; whatever becomes of the test, none of their processes is left."""
    context = multiprocessing.get_context("fork")
    holders = []

    def start() -> Holder:
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=(tmp_path, theirs), daemon=True)
        process.start()
        holders.append(Holder(process, ours, ours.recv()))
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill_child()  # it has inherited what join waits for
        holder.kill()


def refusal(run_dir: Path) -> str:
    with pytest.raises(TrainingError) as refused:
        RunLock(run_dir, BEAT_SECONDS).acquire()
    return str(refused.value)


def test_a_second_job_is_told_who_holds_the_folder(
    tmp_path: Path, start_holder: Callable[[], Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    holder = start_holder()

    text = refusal(tmp_path)

    assert (
        f"{tmp_path}: another job trains in this folder (process {holder.process.pid} on {os.uname().nodename}" in text
    )
    assert "job 4711, since 20" in text
    holder.connection.send("release")
    holder.kill_child()
    holder.process.join()
    RunLock(tmp_path, BEAT_SECONDS).acquire()


def test_a_killed_holder_blocks_nobody_even_if_its_children_live(
    tmp_path: Path, start_holder: Callable[[], Holder]
) -> None:
    holder = start_holder()
    holder.kill()

    lock = RunLock(tmp_path, beat_seconds=3600)  # no waiting: the lock of this kernel says all
    lock.acquire()

    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def start_elsewhere(start_holder: Callable[[], Holder], monkeypatch: pytest.MonkeyPatch) -> Holder:
    """A holder under another kernel, as on another node; the file server's lock is this kernel's here."""
    with monkeypatch.context() as patched:
        patched.setattr(run_lock, "_kernel", lambda: "another kernel")
        return start_holder()


def test_the_lock_of_a_node_that_is_gone_is_waited_for(
    tmp_path: Path,
    start_holder: Callable[[], Holder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    holder = start_elsewhere(start_holder, monkeypatch)
    holder.kill_child()
    holder.stop()  # it beats no more; the server lets go of its lock later
    let_go = threading.Timer(5 * BEAT_SECONDS, holder.process.kill)
    let_go.start()

    lock = RunLock(tmp_path, BEAT_SECONDS)
    lock.acquire()

    let_go.join()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert "for it to beat or to let go" in capsys.readouterr().err
    lock.release()


def test_a_locked_folder_is_refused_while_its_holder_beats_or_never_lets_go(
    tmp_path: Path, start_holder: Callable[[], Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = start_elsewhere(start_holder, monkeypatch)
    assert f"process {holder.process.pid}" in refusal(tmp_path)

    holder.stop()
    assert f"process {holder.process.pid}" in refusal(tmp_path)


def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of a mount without locks cannot be made here: its answer is."""

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)


def test_without_locks_a_beating_holder_is_respected(
    tmp_path: Path, start_holder: Callable[[], Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch)
    holder = start_holder()

    assert f"process {holder.process.pid}" in refusal(tmp_path)

    holder.kill()
    RunLock(tmp_path, BEAT_SECONDS).acquire()


def test_a_holder_that_is_overtaken_ends(
    tmp_path: Path, start_holder: Callable[[], Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch)
    holder = start_holder()
    holder.stop()  # it beats no more
    lock = RunLock(tmp_path, BEAT_SECONDS)
    lock.acquire()

    os.kill(holder.process.pid or 0, signal.SIGCONT)
    holder.kill_child()
    holder.process.join(10)

    assert holder.process.exitcode == 1
    time.sleep(3 * BEAT_SECONDS)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert (tmp_path / LOCK).read_text() == ""
