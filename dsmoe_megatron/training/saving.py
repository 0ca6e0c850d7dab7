"""Saving beside the training: a checkpoint is copied, written and put in its place while the next steps run.

A save goes through three phases, each begun on all ranks together:

1. `start`: the ranks agree on who writes what. Then a thread of each rank copies its tensors to host memory, which the
   next optimizer step waits for (`before_update`): forward and backward passes change neither weights nor moments.
2. The threads write, hash and sync the shards.
3. When every rank is done, a thread of rank 0 writes what remains, the manifest last, syncs, gives the folder its name
   and moves `latest`.

`poll`, once per step, finds out whether a phase is over. Without `checkpoint.asynchronous` the same is done at once.
"""

import contextlib
import dataclasses
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.core import save_config as save_format

from dsmoe_megatron.checkpoint_manifest import entry_of, write_manifest
from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import save_config
from dsmoe_megatron.durable import sync, write_durably
from dsmoe_megatron.errors import TrainingError
from dsmoe_megatron.json_text import json_text
from dsmoe_megatron.run_folder import CHECKPOINTS, LATEST, Progress, step_folder_name, step_folders
from dsmoe_megatron.runtime.distributed import raised_on_every_rank
from dsmoe_megatron.training.engines.protocol import Engine
from dsmoe_megatron.training.retention import UNFINISHED, forget_old, put_in_place
from dsmoe_megatron.training.shard_writing import HostCopies, ShardPlanner, ShardWriter, Written


@dataclass(frozen=True)
class SaveReport:
    """What came of a save; the same on every rank.

    Attributes:
        step: that was saved.
        folder: of the checkpoint.
        save_s: from its beginning until `latest` was moved [seconds].
        save_stall_s: of these, how long training stood still on rank 0 [seconds].
        bytes: of the checkpoint.
        failure: why there is no such checkpoint; None if there is.
        newest: name of the newest whole checkpoint of the run, if any.
    """

    step: int
    folder: Path
    save_s: float
    save_stall_s: float
    bytes: int
    failure: str | None
    newest: str | None

    def line(self) -> dict[str, Any]:
        """As a line of metrics.jsonl."""
        line = {"step": self.step, "save_s": self.save_s, "save_stall_s": self.save_stall_s}
        return line | ({"save_bytes": self.bytes} if self.failure is None else {"save_failure": self.failure})

    def __str__(self) -> str:
        if self.failure is None:
            return (
                f"saved {self.folder} in {self.save_s:.1f} s, {self.bytes / 1e6:,.0f} MB; "
                f"training stood still for {self.save_stall_s:.2f} s of it"
            )
        return f"cannot save {self.folder}: {self.failure}; the newest whole checkpoint is {self.newest or 'none'}"


@dataclass
class _Save:
    """A save that is not over. Its thread pickles what was written: thousands of entries need not keep training."""

    step: int
    folder: Path
    progress: str
    began: float
    stall_s: float = 0.0
    still_since: float = 0.0
    writer: ShardWriter | None = None
    copied: "Future[None] | None" = None
    written: "Future[bytes] | None" = None
    published: "Future[tuple[float, int]] | None" = None

    @property
    def unfinished(self) -> Path:
        return self.folder.with_name(self.folder.name + UNFINISHED)


class CheckpointSaver:
    """Owns the saving of a run: at most one save at a time. Every rank calls each method at the same point.

    Args:
        engine: to save.
        config: of the run; goes into the checkpoint.
        run_dir: exists.
        report: told of every save, on every rank, when it is over.
    """

    def __init__(self, engine: Engine, config: Config, run_dir: Path, report: Callable[[SaveReport], object]) -> None:
        self.engine, self.config, self.run_dir, self.report = engine, config, run_dir, report
        self._planner, self._memory = ShardPlanner(), HostCopies()
        # a thread begins on device 0, where it would take memory of another rank's
        self._thread = ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device, (torch.cuda.current_device(),))
        self._save: _Save | None = None
        self._last: SaveReport | None = None

    def start(self, progress: Progress) -> None:
        """Begin to save; a save that still runs is completed first. A failure is reported, not raised."""
        self.complete()
        if self._last is not None and self._last.failure is None and self._last.step == progress.step:
            return  # it is there already
        folder = self.run_dir / CHECKPOINTS / step_folder_name(progress.step)
        text = json_text(dataclasses.asdict(progress), indent=2)  # as it is now
        save = self._save = _Save(progress.step, folder, text, time.perf_counter())
        with _standing_still(save):
            failure = _from_rank_0(lambda: _make_empty(save.unfinished))
            if failure is not None:
                self._end(save, failure)
                return
            writer = save.writer = self._planner.plan(self.engine.sharded_state(), save.unfinished)
            if self.config.checkpoint.asynchronous:
                save.copied = self._thread.submit(writer.copy, self._memory)
            save.written = self._thread.submit(_write, writer, save.copied)
        if not self.config.checkpoint.asynchronous:
            self.complete()

    def before_update(self) -> None:
        """Wait until weights and optimizer state may change."""
        if self._save is not None and self._save.copied is not None:
            with _standing_still(self._save):
                self._save.copied.exception()  # which is reported when the save is over

    def poll(self) -> None:
        """Carry a running save on if its phase is over on all ranks; returns at once otherwise."""
        save = self._save
        if save is None:
            return
        with _standing_still(save):
            phase = save.published or save.written
            running = torch.tensor(int(phase is not None and not phase.done()))
            dist.all_reduce(running)
            if not running:
                self._advance(save)

    def complete(self) -> None:
        """Wait until a save that runs is over. A failure is reported, not raised."""
        while self._save is not None:
            with _standing_still(self._save):
                self._advance(self._save)

    def finish(self) -> None:
        """Wait until a save that runs is over.

        Raises:
            TrainingError: the newest save failed; on every rank.
        """
        self.complete()
        if self._last is not None and self._last.failure is not None:
            with raised_on_every_rank():
                raise TrainingError(str(self._last))

    def _advance(self, save: _Save) -> None:
        """Wait for this rank's part of a phase, and begin the next one together with the others."""
        if save.written is not None:
            self._begin_publishing(save, save.written)
        else:
            self._end(save, _from_rank_0(lambda: save.published and save.published.result()))

    def _begin_publishing(self, save: _Save, written: "Future[bytes]") -> None:
        error = written.exception()
        mine = written.result() if error is None else _cause(error)
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, gathered)
        save.copied = save.written = None
        if gathered is not None:
            save.published = self._thread.submit(self._publish, save, gathered)

    def _publish(self, save: _Save, gathered: list[bytes | str]) -> tuple[float, int]:
        """On rank 0: complete the folder, sync it, put it in its place, move `latest`; returns seconds and bytes."""
        for rank, part in enumerate(gathered):
            if isinstance(part, str):
                raise TrainingError(f"{part} (rank {rank})")
        parts: list[Written] = [pickle.loads(part) for part in gathered if isinstance(part, bytes)]  # of our own ranks
        folder, writer = save.unfinished, save.writer
        assert writer is not None
        assert writer.contents is not None
        writer.finish(writer.contents, [part.results for part in parts])
        save_format(CheckpointingConfig("torch_dist", 1), str(folder))
        save_config(self.config, folder / "config.yaml")
        (folder / "progress.json").write_text(save.progress, encoding="utf-8")
        entries = {name: entry for part in parts for name, entry in part.entries.items()}
        for path in sorted(folder.iterdir()):
            if path.name not in entries:
                sync(path)
                entries[path.name] = entry_of(path)
        write_manifest(folder, entries, dist.get_world_size())
        put_in_place(folder, save.folder)
        write_durably(self.run_dir / LATEST, save.folder.name + "\n")
        seconds = time.perf_counter() - save.began
        forget_old(self.run_dir, save.step, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every)
        return seconds, sum(entry.bytes for entry in entries.values())

    def _end(self, save: _Save, failure: str | None) -> None:
        now = time.perf_counter()
        figures: list[Any] = [now - save.began, 0, save.stall_s + now - save.still_since, None]
        if dist.get_rank() == 0:
            if failure is not None:  # what a full disk has taken of it is in the way of the next one
                shutil.rmtree(save.unfinished, ignore_errors=True)
            elif save.published is not None:
                figures[:2] = save.published.result()
            figures[3] = newest_name(self.run_dir)
        dist.broadcast_object_list(figures, src=0)
        seconds, size, stall, newest = figures
        self._save = None
        self._last = SaveReport(save.step, save.folder, seconds, stall, size, failure, newest)
        self.report(self._last)


@contextlib.contextmanager
def _standing_still(save: _Save) -> Iterator[None]:
    """Training waits for the save meanwhile."""
    save.still_since = time.perf_counter()
    try:
        yield
    finally:
        save.stall_s += time.perf_counter() - save.still_since


def newest_name(run_dir: Path) -> str | None:
    """Name of the newest whole checkpoint of a run folder."""
    return next((folder.name for folder in step_folders(run_dir)), None)


def _write(writer: ShardWriter, copied: "Future[None] | None") -> bytes:
    """What was written, pickled."""
    if copied is not None:
        copied.result()
    return pickle.dumps(writer.write())


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _from_rank_0(action: Callable[[], object]) -> str | None:
    """Do it on rank 0; why it failed there is returned on every rank."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:  # whatever it is, the others must not wait for this rank
            failure[0] = _cause(error)
    dist.broadcast_object_list(failure, src=0)
    return failure[0]


def _cause(error: BaseException) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].strip()
