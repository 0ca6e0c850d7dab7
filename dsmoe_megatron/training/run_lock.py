"""One job at a time in a run folder.

Two jobs that write one run folder destroy it: each takes the other's metrics back and clears the other's checkpoints.
Two things keep them apart, since no single one does on every file system:

- A lock of the kernel on `run.lock` (fcntl; NFS and Lustre with `-o flock` carry it to other nodes). It is released
  when its holder ends, however that ends, and is not shared by processes that the holder forks, as one by flock is.
- A heartbeat in the same file, for mounts where such locks are unknown or hold on one node alone (Lustre without
  `-o flock` or with `-o localflock`, BeeGFS, NFS with `local_lock`). Who gets the lock but finds the record of another
  host waits to see whether that goes on beating. Clocks are not compared. A holder that finds another's record in the
  place of its own ends its run, so that of two that slipped through one stops.

A job that ends in order leaves no record, so that only the successor of one that was killed on another node waits. A
file server may keep the lock of a node that is gone for a while (NFS: its lease, 90 s): a lock whose holder does not
beat is asked for again until then.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from dsmoe_megatron.errors import TrainingError
from dsmoe_megatron.runtime.distributed import raised_on_every_rank

LOCK = "run.lock"
RECORD_BYTES = 512  # of fixed length, so that one write replaces it
BEAT_SECONDS = 5.0
# beats may be late: a loaded node, a slow file server
BEATS_TO_WAIT = 4
BEATS_OF_A_LEASE = 24  # two minutes
HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
LOCKS_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextlib.contextmanager
def one_job_in(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for the time of the block; rank 0 does so for all.

    Raises:
        TrainingError: another job holds it; on every rank.
    """
    lock = RunLock(run_dir)
    with raised_on_every_rank():
        if dist.get_rank() == 0:
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


class RunLock:
    """The lock of one run folder.

    Args:
        run_dir: exists.
        beat_seconds: between two heartbeats.
    """

    def __init__(self, run_dir: Path, beat_seconds: float = BEAT_SECONDS) -> None:
        self.path, self.beat_seconds = run_dir / LOCK, beat_seconds
        self.record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "kernel": _kernel(),
            "token": uuid.uuid4().hex,
            "beats": 0,
        }
        self.descriptor = -1
        self.ending = threading.Event()
        self.heart: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            TrainingError: another job has it, or the file cannot be written.
        """
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            locked = self._lock()
            before = self._read()
            # among the processes of one kernel its lock knows better than any record
            is_of_this_kernel = bool(before) and before["kernel"] == self.record["kernel"]
            if locked is False and is_of_this_kernel:
                self._refuse(before)
            elif locked is False:
                self._wait_for_release(before)
            elif before and not (locked and is_of_this_kernel):
                self._wait_for_silence(before)
            self._beat()
        except OSError as error:
            raise TrainingError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self.heart = threading.Thread(target=self._keep_beating, name="run lock", daemon=True)
        self.heart.start()

    def _lock(self) -> bool | None:
        """Lock the file; False where another has the lock, None where the file system knows no locks."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LOCKS_UNKNOWN:
                return None
            if error.errno in HELD_BY_ANOTHER:
                return False
            raise
        return True

    def _wait_for_release(self, before: dict[str, Any]) -> None:
        """Ask for the lock again until a lease is over; refuse if its holder beats, or has it still then."""
        seconds = BEATS_OF_A_LEASE * self.beat_seconds
        message = f"{self.path}: locked by another job ({_description(before)}): waiting up to {seconds:.0f} s"
        print(f"{message} for it to beat or to let go", file=sys.stderr, flush=True)
        for _ in range(BEATS_OF_A_LEASE):
            time.sleep(self.beat_seconds)
            now = self._read()
            if now and now != before:
                self._refuse(now)
            if self._lock():
                return
        self._refuse(before)

    def _wait_for_silence(self, before: dict[str, Any]) -> None:
        """Refuse if the holder that `before` speaks of is alive."""
        for _ in range(BEATS_TO_WAIT):
            time.sleep(self.beat_seconds)
            now = self._read()
            if now and now != before:
                self._refuse(now)

    def _refuse(self, holder: dict[str, Any]) -> NoReturn:
        raise TrainingError(
            f"{self.path.parent}: another job trains in this folder ({_description(holder)}): wait for it or end it, "
            "or set train.run_dir to another folder"
        )

    def _read(self) -> dict[str, Any]:
        """The record; empty if there is none, or none that is whole."""
        try:
            record = json.loads(os.pread(self.descriptor, RECORD_BYTES, 0))
        except ValueError:
            return {}
        return record if isinstance(record, dict) and record.keys() == self.record.keys() else {}

    def _beat(self) -> None:
        self.record["beats"] += 1
        os.pwrite(self.descriptor, json.dumps(self.record).ljust(RECORD_BYTES - 1).encode() + b"\n", 0)

    def _keep_beating(self) -> None:
        while not self.ending.wait(self.beat_seconds):
            with contextlib.suppress(OSError):  # a full disk, or a file server that is away: the lock is held still
                holder = self._read()
                if holder and holder["token"] != self.record["token"]:
                    self._end_at_once(holder)
                self._beat()

    def _end_at_once(self, holder: dict[str, Any]) -> NoReturn:
        """Whatever this job would still write would damage the other's run."""
        message = f"error: {self.path.parent}: another job has taken this folder over ({_description(holder)})"
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def release(self) -> None:
        """Leave no record and give the lock back."""
        self.ending.set()
        if self.heart is not None:
            self.heart.join()
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, 0)
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _kernel() -> str:
    """What processes that share a kernel, and so its locks, have in common, containers included."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text(encoding="ascii").strip() if boot.is_file() else socket.gethostname()


def _description(holder: dict[str, Any]) -> str:
    if not holder:
        return "it has left no record"
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
