"""Faults that a training run meets, each put into a real one."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dsmoe_megatron.run_folder import step_folders
from tests.faults.training_job import TrainingJob

Strike = Callable[[TrainingJob, random.Random], None]


@dataclass(frozen=True)
class Injection:
    """One kind of fault.

    Attributes:
        strike: puts it into a job, which it may start itself, and takes it out again once the job has ended.
        saves: the run saves before it ends, so that no step is lost.
        refuses: the run says what is wrong in one line and ends, instead of training.
        takes_a_checkpoint: the newest checkpoint is damaged, and steps of it are lost.
        possible: whether there is anything to damage in the run as it is.
    """

    strike: Strike
    saves: bool = False
    refuses: bool = False
    takes_a_checkpoint: bool = False
    possible: Callable[[TrainingJob], bool] = lambda _: True


def _some_steps(job: TrainingJob, chance: random.Random) -> None:
    job.start()
    job.wait_for_introduction()
    job.wait_for_step(min(job.begins_after + chance.randint(1, 6), job.config.train.steps - 1))


def kill_rank(job: TrainingJob, chance: random.Random) -> None:
    _some_steps(job, chance)
    job.rank(chance.randrange(job.processes)).kill()


def kill_torchrun(job: TrainingJob, chance: random.Random) -> None:
    _some_steps(job, chance)
    os.kill(job.torchrun(), signal.SIGKILL)


def kill_at_start(job: TrainingJob, chance: random.Random) -> None:
    """Somewhere between the first process and the first step."""
    job.start()
    time.sleep(chance.uniform(0.1, 4.0))
    if chance.random() < 0.5:
        with contextlib.suppress(AssertionError):  # torchrun has not started it yet
            job.rank(chance.randrange(job.processes)).kill()
            return
    os.kill(job.torchrun(), signal.SIGKILL)


def _files_of_a_save(job: TrainingJob) -> int:
    """Files in the checkpoint that is being written; -1 if none is."""
    with contextlib.suppress(FileNotFoundError):
        for folder in (job.run_dir / "checkpoints").glob("*.unfinished"):
            return len(list(folder.iterdir()))
    return -1


def kill_during_save(job: TrainingJob, chance: random.Random) -> None:
    """As soon as so many of its files are there: before, between and after the shards."""
    job.start()
    files, rank = chance.randint(0, 6), chance.randrange(job.processes + 1)
    victim = job.torchrun
    if rank < job.processes:
        job.wait_for_introduction()
        pid = job.rank(rank).pid
        victim = lambda: pid  # noqa: E731
    job.wait_until(lambda: _files_of_a_save(job) >= files or job.last_step() >= job.config.train.steps)
    os.kill(victim(), signal.SIGKILL)


def signal_to_rank(job: TrainingJob, chance: random.Random) -> None:
    _some_steps(job, chance)
    job.rank(chance.randrange(job.processes)).send_signal(chance.choice([signal.SIGTERM, signal.SIGUSR1]))


def signals_to_torchrun(job: TrainingJob, chance: random.Random) -> None:
    """Twice: the second arrives during the save."""
    _some_steps(job, chance)
    os.kill(job.torchrun(), signal.SIGTERM)
    with contextlib.suppress(AssertionError):  # it may have ended before
        job.wait_until(lambda: _files_of_a_save(job) >= 0, seconds=5)
    with contextlib.suppress(ProcessLookupError):
        os.kill(job.torchrun(), signal.SIGTERM)


def stop_rank(job: TrainingJob, chance: random.Random) -> None:
    _some_steps(job, chance)
    job.rank(chance.randrange(job.processes)).suspend()


def _flip_a_byte(path: Path, chance: random.Random) -> None:
    with path.open("r+b") as file:
        place = chance.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << chance.randrange(8))]))


def corrupt_index_cache(job: TrainingJob, chance: random.Random) -> None:
    _flip_a_byte(chance.choice(_sample_indices(job)), chance)
    signal_to_rank(job, chance)


def _sample_indices(job: TrainingJob) -> list[Path]:
    return sorted((job.run_dir / "cache").glob("*/*.npy"))


def _has_sample_indices(job: TrainingJob) -> bool:
    return bool(_sample_indices(job))


def corrupt_checkpoint(job: TrainingJob, chance: random.Random) -> None:
    """The next start finds it and goes on from the checkpoint before."""
    folder = job.run_dir / "checkpoints" / (job.run_dir / "latest").read_text().strip()
    _flip_a_byte(chance.choice(sorted(folder.glob("*.distcp"))), chance)
    signal_to_rank(job, chance)


def _has_one_before(job: TrainingJob) -> bool:
    return len(step_folders(job.run_dir)) > 1


def truncate_data(job: TrainingJob, chance: random.Random) -> None:
    tokens = Path(f"{job.config.data.train[0].prefix}.bin")
    size = tokens.stat().st_size
    whole = tokens.with_suffix(".whole")
    shutil.copy2(tokens, whole)
    os.truncate(tokens, chance.randrange(size))
    try:
        job.start().end()
    finally:
        whole.replace(tokens)


@contextlib.contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Root may write whatever permissions say: a read-only mount stops it too."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _until_a_save_fails(job: TrainingJob) -> None:
    job.wait_until(lambda: "cannot save" in job.printed())


def read_only_checkpoints(job: TrainingJob, chance: random.Random) -> None:
    """It becomes so under a run that trains, until a save fails; then the run is stopped."""
    folder = job.run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    _some_steps(job, chance)
    with _read_only(folder):
        _until_a_save_fails(job)
    job.rank(chance.randrange(job.processes)).send_signal(signal.SIGTERM)


def full_disk(job: TrainingJob, chance: random.Random) -> None:
    """What is left of the run's disk is filled until a save fails; then the run is stopped."""
    _some_steps(job, chance)
    filler = job.run_dir / "somebody_elses_file"
    try:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        _until_a_save_fails(job)
    finally:
        filler.unlink()
    job.rank(chance.randrange(job.processes)).send_signal(signal.SIGTERM)


INJECTIONS = {
    "SIGKILL of a rank": Injection(kill_rank),
    "SIGKILL of torchrun": Injection(kill_torchrun),
    "SIGKILL at the start": Injection(kill_at_start),
    "SIGKILL during a save": Injection(kill_during_save),
    "SIGTERM or SIGUSR1 to a rank": Injection(signal_to_rank, saves=True),
    "SIGTERM to torchrun, twice": Injection(signals_to_torchrun, saves=True),
    "SIGSTOP of a rank": Injection(stop_rank),
    "corrupted checkpoint": Injection(
        corrupt_checkpoint, saves=True, takes_a_checkpoint=True, possible=_has_one_before
    ),
    "corrupted index cache": Injection(corrupt_index_cache, saves=True, possible=_has_sample_indices),
    "truncated .bin": Injection(truncate_data, refuses=True),
    "read-only checkpoint folder": Injection(read_only_checkpoints, saves=True),
    "full disk": Injection(full_disk, saves=True),
}
NEED_MOUNTS = ("read-only checkpoint folder", "full disk")
