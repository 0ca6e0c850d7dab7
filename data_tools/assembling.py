"""Puts the segments of a run together: PREFIX.bin, PREFIX.idx and, last, PREFIX.manifest.json.

Ids are copied as they are, in the order of the tasks; only the index is made anew. A run that makes one dataset is
followed while its tasks are at work, so that the disk has little left to do at the end.
"""

import hashlib
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from data_tools.documents import SHOWN_COMPLAINTS
from data_tools.indexed_dataset import PATHS, IndexedDatasetWriter
from data_tools.manifest import existing_manifest, manifest_path, write_manifest
from data_tools.pipeline import require_few_malformed, rules_of
from data_tools.work_folder import Counts, Segment, WorkFolder
from dsmoe_megatron.errors import DataError

COPY_BYTES = 8 << 20
FOLLOWING_SECONDS = 0.2


@dataclass
class FinishedRun:
    """All that the tasks left.

    Args:
        plan: of the run.
        segments: of all tasks, in order.
        digests: SHA-256 of each piece of each source; None where it has none.
        counts: of the whole input.
    """

    plan: dict[str, Any]
    segments: list[Segment] = field(default_factory=list)
    digests: dict[int, list[str | None]] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def sets(self) -> list[str]:
        """Names of the sets that have documents."""
        return sorted({name for segment in self.segments for name in segment.sets})

    def documents(self, name: str) -> Counter[int]:
        """Documents of a set, by source."""
        total: Counter[int] = Counter()
        for segment in self.segments:
            if name in segment.sets:
                total.update(segment.sets[name].documents)
        return total


def collect(folder: WorkFolder) -> FinishedRun:
    """Read what the tasks left.

    Raises:
        DataError: a task is not finished.
    """
    run = FinishedRun(folder.plan())
    for number, task in enumerate(folder.tasks()):
        segments = task.segments()
        if not segments or not segments[-1].finished:
            raise DataError(f"{task.path} (task {number}) is not finished: give the same command again to go on")
        run.segments += segments
        for piece, digest in zip(task.pieces(), segments[-1].digests, strict=True):
            run.digests.setdefault(piece.source, []).append(digest)
        for segment in segments:
            run.counts.add(segment.counts, SHOWN_COMPLAINTS)
    for number, source in enumerate(run.plan["manifest"]["sources"]):
        skipped = run.counts.skipped.get(number, Counter())
        if source["kind"] == "compressed" and skipped["damaged_file"]:
            skipped["damaged_file"] = 1  # every part behind the damage has met it
        run.counts.skip(number, source["left_out"])
    return run


def require_documents(run: FinishedRun) -> None:
    """Refuse an input that is malformed in too large a part, or gave nothing.

    Raises:
        DataError: it is.
    """
    malformed, documents = run.counts.all_skipped["malformed"], sum(run.documents(name).total() for name in run.sets())
    first = next(iter(run.counts.complaints), "")
    require_few_malformed(malformed, documents, run.plan["max_malformed"], first, at_least=1)
    if not documents:
        sources = ", ".join(source["path"] for source in run.plan["manifest"]["sources"])
        raise DataError(f"no document in {sources} (left out: {dict(run.counts.all_skipped)})")


class Assembly:
    """Makes the datasets of a run. Used as a context manager; nothing has its name before `finish`.

    Args:
        prefix: of the dataset.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix, self._folder = prefix, WorkFolder(prefix)
        self._followed: IndexedDatasetWriter | None = None
        self._segments = 0  # that have been followed
        self._fault: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_following()
        if self._followed is not None:
            self._followed.__exit__(kind, error, trace)

    def follow(self) -> None:
        """Put the segments of the tasks together as they come, in a thread. Sets of their own wait for the end: there
        may be more of them than files can be open."""
        if not rules_of(self._folder.plan()).one_dataset_per_set:
            self._followed = self._writer(self._prefix).__enter__()
            self._thread.start()

    def _follow(self) -> None:
        assert self._followed is not None
        try:
            for task in self._folder.tasks():
                last, number = None, 0
                while last is None or not last.finished:
                    segment = task.next_segment(last, number)
                    if segment is not None:
                        _append_segment(self._followed, segment, "")
                        last, number = segment, number + 1
                        self._segments += 1
                    elif self._stop.wait(FOLLOWING_SECONDS):
                        return
        except (OSError, DataError) as error:  # told at the end: the tasks themselves may still finish
            self._fault = error

    def _stop_following(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Make the datasets of what the tasks left, and remove the work folder.

        Returns:
            The manifest of each, by its prefix.

        Raises:
            DataError: a task is not finished, the input gave nothing that could be a dataset, two sets would have one
                name, or another dataset is there.
            OSError: of the disk.
        """
        self._stop_following()
        if self._fault is not None:
            raise self._fault
        run = collect(self._folder)
        if not run.sets():
            self._folder.remove()  # there is nothing in it to go on with
        require_documents(run)
        prefixes = self._prefixes(run)
        manifests = {}
        for name, prefix in prefixes.items():
            if self._followed is not None:
                manifests[prefix] = self._complete(self._followed, prefix, name, run)
            else:
                with self._writer(prefix) as writer:
                    manifests[prefix] = self._complete(writer, prefix, name, run)
        self._folder.remove()
        return manifests

    def _prefixes(self, run: FinishedRun) -> dict[str, str]:
        """Where each set's dataset lies."""
        names = run.sets()
        prefixes = {name: prefix_of_set(self._prefix, name) for name in names}
        if len(set(prefixes.values())) < len(prefixes):
            raise DataError(f"two of the sets {', '.join(names)} would be written under one name: choose with --sets")
        if not run.plan["overwrite"]:
            for each in prefixes.values():
                existing_manifest(each, run.plan["manifest"])
        return prefixes

    def _complete(self, writer: IndexedDatasetWriter, prefix: str, name: str, run: FinishedRun) -> dict[str, Any]:
        """Write what is missing of a dataset, and its manifest."""
        for segment in run.segments[self._segments :]:
            _append_segment(writer, segment, name)
        files = writer.seal()
        manifest_path(prefix).unlink(missing_ok=True)  # an old manifest must never vouch for new files
        writer.publish()
        return write_manifest(prefix, run.plan["manifest"], _results(name, run, files))

    def _writer(self, prefix: str) -> IndexedDatasetWriter:
        plan = self._folder.plan()
        return IndexedDatasetWriter(prefix, np.dtype(plan["dtype"]), plan["with_paths"], self._folder.path)


def prefix_of_set(prefix: str, name: str) -> str:
    """Where the dataset of a set lies: PREFIX_NAME, what is no letter, digit, dot or dash made a dash."""
    return f"{prefix}_{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}" if name else prefix


def _append_segment(writer: IndexedDatasetWriter, segment: Segment, name: str) -> None:
    """Copy the documents of one set."""
    if name not in segment.sets:
        return
    extent = segment.sets[name]
    buffer = memoryview(bytearray(COPY_BYTES))  # one for all: a new one for each block costs more than the copying
    with segment.path.open("rb") as file:
        for suffix, (begin, size) in (("bin", extent.ids), (PATHS, extent.paths)):
            file.seek(begin)
            while size:
                if not (count := file.readinto(buffer[: min(size, COPY_BYTES)])):
                    raise DataError(f"{segment.path} has been cut: give the same command again")
                writer.append(suffix, buffer[:count])
                size -= count
        begin, size = extent.lengths
        file.seek(begin)
        writer.append_lengths(np.frombuffer(file.read(size), np.int32))


def _results(name: str, run: FinishedRun, files: dict[str, Any]) -> dict[str, Any]:
    """The part of the manifest that is known after the work."""
    documents = run.documents(name)
    everything = sum((run.documents(each) for each in run.sets()), Counter())
    sources: list[dict[str, Any]] = []
    for number in range(len(run.plan["manifest"]["sources"])):
        skipped = Counter(run.counts.skipped.get(number, {}))
        if others := everything[number] - documents[number]:
            skipped["other_set"] += others
        digest = source_digest(run.digests.get(number, []))
        sources.append({"documents": documents[number], "skipped": dict(skipped), "sha256": digest})
    return {
        "documents": documents.total(),
        "tokens": sum(segment.sets[name].tokens for segment in run.segments if name in segment.sets),
        "text_bytes": sum(segment.sets[name].text_bytes for segment in run.segments if name in segment.sets),
        "dtype": run.plan["dtype"],
        "set": name or None,
        "all_sets": [each for each in run.sets() if each],
        "encoder": run.plan["encoder"],
        "skipped": dict(sum((Counter(source["skipped"]) for source in sources), Counter[str]())),
        "malformed_first": run.counts.complaints,
        "invalid_utf8_replaced": _of_set(run.counts.invalid_utf8, name),
        "long_documents_split": _of_set(run.counts.split, name),
        "files": files,
        "sources": sources,
    }


def _of_set(counts: Counter[str], name: str) -> int:
    """What one dataset has of a count by set: all of it where there is only one."""
    return counts[name] if name else counts.total()


def source_digest(digests: list[str | None]) -> str | None:
    """SHA-256 of a source: of its bytes, where it was read in one piece; else of the hexadecimal digests of its pieces,
    one a line. None where a piece has none (a dataset of the hub, a file that could not be read to its end)."""
    known = [digest for digest in digests if digest is not None]
    if not known or len(known) < len(digests):
        return None
    return known[0] if len(known) == 1 else hashlib.sha256("\n".join(known).encode()).hexdigest()
