"""PREFIX.work/: what an unfinished run keeps, so that it goes on where it was stopped.

plan.json               what the dataset is to be made of; another plan is not continued
tokenizer.json          the tokenizer itself, for machines that do not have its files
tasks/NNNNN/pieces.json what the task reads
tasks/NNNNN/segment_NNNN.data and .json
                        encoded documents, in order; the .json is written last and tells that both are whole
tasks/NNNNN/progress    how far the task is and who works on it; only for people to watch
lock                    held by the process that works here
executor/               datatrove's own: which tasks are completed, statistics, logs
"""

import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.indexed_dataset import dataset_path, sync, sync_folder, write_whole
from data_tools.sources import Piece
from dsmoe_megatron.errors import DataError


@dataclass
class EncodedSet:
    """Encoded documents of one set.

    Args:
        ids: of all documents, one after the other, in the dataset's dtype, [ids].
        lengths: ids per document, [documents].
        paths: of the files that the documents are, a JSON string each; none where no source is a folder.
        text_bytes: bytes of UTF-8 that they were encoded from.
        documents: number of documents of each source.
    """

    ids: list[npt.NDArray[Any]] = field(default_factory=list)
    lengths: list[npt.NDArray[np.int32]] = field(default_factory=list)
    paths: list[bytes] = field(default_factory=list)
    text_bytes: int = 0
    documents: Counter[int] = field(default_factory=Counter)

    def add(self, other: "EncodedSet") -> None:
        """Take in what followed."""
        self.ids += other.ids
        self.lengths += other.lengths
        self.paths += other.paths
        self.text_bytes += other.text_bytes
        self.documents.update(other.documents)


@dataclass
class Counts:
    """What became of the records, apart from the documents.

    Args:
        skipped: records left out, by source and reason.
        invalid_utf8: documents whose invalid bytes were replaced, by set.
        split: parts that long documents were cut into, above one each, by set.
        complaints: the first malformed records, "place: what is wrong".
    """

    skipped: dict[int, Counter[str]] = field(default_factory=dict)
    invalid_utf8: Counter[str] = field(default_factory=Counter)
    split: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    def skip(self, source: int, reasons: dict[str, int]) -> None:
        if reasons:
            self.skipped.setdefault(source, Counter()).update(reasons)

    def add(self, other: "Counts", complaints: int) -> None:
        """Take in what followed; of the complaints only so many are kept."""
        for source, reasons in other.skipped.items():
            self.skip(source, reasons)
        self.invalid_utf8.update(other.invalid_utf8)
        self.split.update(other.split)
        new = [complaint for complaint in other.complaints if complaint not in self.complaints]
        self.complaints += new[: max(0, complaints - len(self.complaints))]

    @property
    def all_skipped(self) -> Counter[str]:
        return sum(self.skipped.values(), Counter())


@dataclass(frozen=True)
class SetExtent:
    """Where a segment keeps the documents of one set: begin and length of each table in its .data [bytes]."""

    ids: tuple[int, int]
    lengths: tuple[int, int]
    paths: tuple[int, int]
    tokens: int
    text_bytes: int
    documents: dict[int, int]


@dataclass(frozen=True)
class Segment:
    """A stretch of a task that is whole on the disk.

    Args:
        path: of its .data.
        first: chunks of the task that were done before.
        chunks: chunks that are done with this one.
        consumed: bytes of the stored input that they stand for.
        finished: whether nothing of the task is left.
        digests: SHA-256 of each piece of a finished task; None where the source has none.
        sets: by name.
        counts: of this stretch.
    """

    path: Path
    first: int
    chunks: int
    consumed: int
    finished: bool
    digests: list[str | None]
    sets: dict[str, SetExtent]
    counts: Counts


class WorkFolder:
    """The folder of an unfinished run.

    Args:
        prefix: of the dataset.
    """

    def __init__(self, prefix: str) -> None:
        self.path = dataset_path(prefix, "work")
        self.plan_path = self.path / "plan.json"
        self.tokenizer_path = self.path / "tokenizer.json"
        self.executor_path = self.path / "executor"
        self.lock_path = self.path / "lock"

    def task(self, number: int) -> "TaskFolder":
        return TaskFolder(self.path / "tasks" / f"{number:05d}")

    def tasks(self) -> Iterator["TaskFolder"]:
        return (self.task(number) for number in range(int(self.plan()["tasks"])))

    def plan(self) -> dict[str, Any]:
        """The plan of the run in this folder.

        Raises:
            DataError: it is damaged.
        """
        try:
            plan: dict[str, Any] = json.loads(self.plan_path.read_bytes())
        except ValueError as error:
            raise DataError(f"{self.plan_path} is damaged: begin anew with --overwrite") from error
        return plan

    def has_segments(self) -> bool:
        return any(self.path.glob("tasks/*/segment_*.json"))

    def create(self, plan: dict[str, Any], tokenizer_state: dict[str, Any], tasks: list[list[Piece]]) -> None:
        """Begin a run. The plan is written last: without it the folder counts for nothing."""
        self.plan_path.unlink(missing_ok=True)
        for path in (self.path / "tasks", self.executor_path):
            if path.exists():
                shutil.rmtree(path)
        for number, pieces in enumerate(tasks):
            folder = self.task(number).path
            folder.mkdir(parents=True)
            content = json.dumps([asdict(piece) for piece in pieces])
            (folder / "pieces.json").write_text(content, encoding="utf-8")
        # json, not orjson: a path of the tokenizer's may have bytes that are no UTF-8
        self.tokenizer_path.write_bytes(json.dumps(tokenizer_state).encode())
        write_whole(self.plan_path, json.dumps(plan | {"tasks": len(tasks)}).encode())

    def update_plan(self, **values: Any) -> None:
        """Change what does not decide the content of the dataset."""
        write_whole(self.plan_path, json.dumps(self.plan() | values).encode())

    def remove(self) -> None:
        if self.path.exists():
            self.plan_path.unlink(missing_ok=True)  # first: what is left is no run any more
            shutil.rmtree(self.path)


class TaskFolder:
    """The folder of one task.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress_path = path / "progress"

    def pieces(self) -> list[Piece]:
        entries = json.loads((self.path / "pieces.json").read_bytes())
        return [Piece(**entry | {"files": tuple(entry["files"])}) for entry in entries]

    def segments(self) -> list[Segment]:
        """The whole segments, in order. One that lacks a byte, or does not go on where the one before ends (a worker
        that was given up wrote it), ends the list: what follows is made again."""
        found: list[Segment] = []
        while (segment := self.next_segment(found[-1] if found else None, len(found))) is not None:
            found.append(segment)
        return found

    def next_segment(self, last: Segment | None, number: int) -> Segment | None:
        """The whole segment that goes on after the last of `number` ones, if there is one."""
        segment = self._read_segment(number)
        goes_on = segment is not None and segment.first == (last.chunks if last else 0)
        return segment if goes_on else None

    @property
    def finished(self) -> bool:
        segments = self.segments()
        return bool(segments) and segments[-1].finished

    def _data_path(self, number: int) -> Path:
        return self.path / f"segment_{number:04d}.data"

    def _read_segment(self, number: int) -> Segment | None:
        path = self._data_path(number)
        try:
            record = json.loads(path.with_suffix(".json").read_bytes())
            if path.stat().st_size != record["bytes"]:
                return None
        except (FileNotFoundError, ValueError):
            return None
        counts = record["counts"]
        skipped = {int(source): Counter(reasons) for source, reasons in counts["skipped"].items()}
        by_set = {name: Counter(counts[name]) for name in ("invalid_utf8", "split")}
        return Segment(
            path,
            record["first"],
            record["chunks"],
            record["consumed"],
            record["finished"],
            record["digests"],
            {name: _read_extent(extent) for name, extent in record["sets"].items()},
            Counts(**counts | by_set | {"skipped": skipped}),
        )

    def write_segment(
        self,
        number: int,
        sets: dict[str, EncodedSet],
        counts: Counts,
        progress: dict[str, Any],
    ) -> None:
        """Bring a segment to the disk, whole or not at all.

        Args:
            number: from 0, in the order of the task.
            sets: its documents.
            counts: what else became of its records.
            progress: first, chunks, consumed, finished and digests, see `Segment`.
        """
        path = self._data_path(number)
        # a name of its own, since a worker that was given up as lost may still be writing
        unfinished = path.with_name(f"{path.stem}.{platform.node()}.{os.getpid()}.tmp")
        try:
            with unfinished.open("wb") as file:
                extents = {name: _write_tables(file, documents) for name, documents in sets.items()}
                sync(file)
                size = file.tell()
            unfinished.replace(path)
            record = progress | {"bytes": size, "sets": extents, "counts": vars(counts)}
            with unfinished.open("wb") as file:
                file.write(json.dumps(record).encode())
                sync(file)
            unfinished.replace(path.with_suffix(".json"))
            sync_folder(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        """Remove what a killed worker left."""
        for path in self.path.glob("*.tmp"):
            path.unlink(missing_ok=True)
        self.progress_path.unlink(missing_ok=True)


def _write_tables(file: BinaryIO, documents: EncodedSet) -> dict[str, Any]:
    tables: dict[str, Any] = {"text_bytes": documents.text_bytes, "documents": documents.documents}
    tables["tokens"] = sum(map(len, documents.ids))
    blocks_of: dict[str, list[Any]] = {"ids": documents.ids, "lengths": documents.lengths, "paths": documents.paths}
    for name, blocks in blocks_of.items():
        begin = file.tell()
        for block in blocks:
            file.write(block)
        tables[name] = (begin, file.tell() - begin)
    return tables


def _read_extent(entry: dict[str, Any]) -> SetExtent:
    return SetExtent(
        tuple(entry["ids"]),
        tuple(entry["lengths"]),
        tuple(entry["paths"]),
        entry["tokens"],
        entry["text_bytes"],
        {int(source): count for source, count in entry["documents"].items()},
    )
