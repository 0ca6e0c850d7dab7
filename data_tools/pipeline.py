"""The steps of datatrove's pipeline that make encoded segments out of a task: read, encode, keep.

A stopped task goes on after the last chunk that one of its segments holds.
"""

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import multiprocess
import numpy as np
from datatrove.pipeline.base import PipelineStep

from data_tools.documents import SHOWN_COMPLAINTS, DocumentRules, Documents, extract_documents, utf8_bytes
from data_tools.encoding import FAST, Encoder, check_against_reference, stored_tokenizer
from data_tools.opening import UnreadableInputError
from data_tools.reading import Chunk, Digest, read_piece
from data_tools.sources import Piece
from data_tools.work_folder import Counts, EncodedSet, TaskFolder, WorkFolder
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import Tokenizer

SEGMENT_TEXT_BYTES = 256 << 20  # encoded documents of a worker wait in memory for no more text
SEGMENT_SECONDS = 60  # nor longer, so that a stopped run loses no more
PROGRESS_SECONDS = 0.5
CHUNKS_PER_CHECK = 4  # of which one is held against the tokenizer's own library
RECORDS_BEFORE_VERDICT = 1000  # the malformed share is judged early only from here on


@dataclass
class NumberedChunk:
    """A chunk of a task.

    Args:
        number: of the chunk, from 0.
        chunk: as it was read; None after the last one.
        digests: of the task's pieces, after the last one.
    """

    number: int
    chunk: Chunk | None
    digests: list[str | None] = field(default_factory=list)


@dataclass
class EncodedChunk:
    """What became of a chunk.

    Args:
        number: of the chunk.
        finished: whether it stands for the end of the task.
        digests: of the task's pieces, at its end.
        sets: its documents.
        counts: what else became of its records.
        consumed: bytes of the stored input.
    """

    number: int
    finished: bool
    digests: list[str | None]
    sets: dict[str, EncodedSet] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    consumed: int = 0


def rules_of(plan: dict[str, Any]) -> DocumentRules:
    """How records become documents in the run of a plan."""
    return DocumentRules.from_options(plan["manifest"]["options"])


class TaskStep(PipelineStep):
    """A step that knows the folder of the run.

    Args:
        prefix: of the dataset; everything else is in its work folder.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def folder(self) -> WorkFolder:
        return WorkFolder(self.prefix)


class ReadTask(TaskStep):
    """Gives the chunks of a task that no segment holds yet, and at its end one without content."""

    type = "READER"
    name = "pieces of the input"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[NumberedChunk]:
        folder = self.folder()
        rules = rules_of(folder.plan())
        task = folder.task(rank)
        segments = task.segments()
        done = segments[-1].chunks if segments else 0
        number = 0
        digests: list[str | None] = []
        for piece in task.pieces():
            digest, damaged = Digest(), False
            for chunk in _readable_chunks(piece, rules, digest):
                damaged = damaged or bool(chunk.damage)
                if number >= done:
                    yield NumberedChunk(number, chunk)
                number += 1
            digests.append(None if piece.kind == "hub" or damaged else digest.hexdigest())
        yield NumberedChunk(number, None, digests)


def _readable_chunks(piece: Piece, rules: DocumentRules, digest: Digest) -> Iterator[Chunk]:
    """The chunks of a piece. Where a file cannot be read to its end and the rules say to keep the rest, one chunk tells
    so; the next files of a folder follow.

    Raises:
        DataError: a file cannot be read to its end, and the rules say to stop there.
    """
    left: Piece | None = piece
    while left is not None:
        read, damage = 0, ""
        try:
            for chunk in read_piece(left, rules.columns, digest):
                read += len(chunk.records)
                yield chunk
        except UnreadableInputError as error:
            if rules.damaged_files == "stop":
                raise DataError(f"{error}, or see --damaged-files") from error
            damage = str(error)
        if damage:
            yield Chunk(piece.source, piece.path, "value", damage=damage)
        left = replace(left, files=left.files[read + 1 :]) if damage and piece.kind == "tree" else None


class EncodeDocuments(TaskStep):
    """Makes documents of the records of a chunk, and ids of the documents."""

    type = "TOKENIZER"
    name = "ids of the documents"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[EncodedChunk]:
        folder = self.folder()
        plan = folder.plan()
        rules = rules_of(plan)
        tokenizer, encoder = stored_tokenizer(
            str(folder.tokenizer_path),
            plan["manifest"]["tokenizer"]["fingerprint"],
            rules.special_tokens,
            plan["encoder"],
        )
        for numbered in data:
            encoded = EncodedChunk(numbered.number, numbered.chunk is None, numbered.digests)
            if numbered.chunk is not None:
                chunk, numbered.chunk = numbered.chunk, None  # so that one chunk is in memory at a time
                documents = extract_documents(chunk, rules)
                encoded.consumed = chunk.consumed
                encoded.counts = counts_of(chunk, documents)
                encoded.sets = encode_documents(documents, chunk.source, plan, encoder, tokenizer)
                if encoder.name == FAST and numbered.number % CHUNKS_PER_CHECK == 0 and documents.texts:
                    text = documents.texts[numbered.number % len(documents.texts)]
                    check_against_reference(encoder, tokenizer, text, numbered.number)
            yield encoded


def counts_of(chunk: Chunk, documents: Documents) -> Counts:
    """What became of the records that gave no document."""
    counts = Counts(invalid_utf8=documents.invalid_utf8, split=documents.split, complaints=documents.complaints)
    counts.skip(chunk.source, documents.skipped)
    if chunk.damage:
        counts.skip(chunk.source, {"damaged_file": 1})
        counts.complaints.append(chunk.damage)
    return counts


def encode_documents(
    documents: Documents, source: int, plan: dict[str, Any], encoder: Encoder, tokenizer: Tokenizer
) -> dict[str, EncodedSet]:
    """The documents' ids, by set; all under "" where sets do not become datasets of their own.

    Args:
        documents: of one chunk.
        source: that they are from.
        plan: of the run.
        encoder: of the tokenizer.
        tokenizer: bounds the ids.

    Raises:
        DataError: an id is not of the vocabulary.
    """
    if not documents.texts:
        return {}
    ids, counts = encoder.encode(documents.texts)
    if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.spec} gave id {int(ids.max())}, which is not below its vocabulary of"
            f" {tokenizer.vocab_size}: the tokenizer's files contradict each other"
        )
    ids, lengths = _append_ends(ids, counts, plan["end_of_document_id"], np.dtype(plan["dtype"]))
    if not rules_of(plan).one_dataset_per_set:
        return {"": _one_set(documents, range(len(lengths)), ids, lengths, source, plan["with_paths"])}

    stops = np.cumsum(lengths, dtype=np.int64)
    members: dict[str, list[int]] = {}
    for number, name in enumerate(documents.sets):
        members.setdefault(name, []).append(number)
    sets = {}
    for name, numbers in members.items():
        own_ids = np.concatenate([ids[stops[number] - lengths[number] : stops[number]] for number in numbers])
        sets[name] = _one_set(documents, numbers, own_ids, lengths[numbers], source, plan["with_paths"])
    return sets


def _append_ends(ids: Any, counts: Any, end: int | None, dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """Put the end after the ids of each document."""
    if end is None:
        return ids.astype(dtype), counts.astype(np.int32)
    lengths = (counts + 1).astype(np.int32)
    last = np.cumsum(lengths, dtype=np.int64) - 1
    with_ends = np.empty(len(ids) + len(counts), dtype)
    is_end = np.zeros(len(with_ends), np.bool_)
    is_end[last] = True
    with_ends[last] = end
    with_ends[~is_end] = ids
    return with_ends, lengths


def _one_set(
    documents: Documents, numbers: Sequence[int], ids: Any, lengths: Any, source: int, with_paths: bool
) -> EncodedSet:
    encoded = EncodedSet([ids], [lengths])
    if with_paths:
        encoded.paths = [json.dumps(documents.names[number]).encode() + b"\n" for number in numbers]
    encoded.text_bytes = sum(utf8_bytes(documents.texts[number]) for number in numbers)
    encoded.documents[source] = len(lengths)
    return encoded


class KeepSegments(TaskStep):
    """Brings the encoded documents to the disk, many chunks at a time."""

    type = "WRITER"
    name = "segments"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        folder = self.folder()
        task = folder.task(rank)
        progress = TaskProgress(task, folder.plan()["max_malformed"])
        if progress.finished:
            return
        _leave_interrupts_to_the_parent()
        with single_threaded_tokenizers():
            for encoded in data:
                progress.add(encoded)
                if encoded.finished or progress.segment_is_full():
                    progress.write_segment(encoded.finished, encoded.digests)
                progress.tell()
                if parent_is_dead():
                    sys.exit(1)
        yield from ()


class TaskProgress:
    """What is done of a task, and what of it is not on the disk yet.

    Args:
        task: its folder; what is in there counts.
        max_malformed: share of the documents that may be malformed records.
    """

    def __init__(self, task: TaskFolder, max_malformed: float) -> None:
        self.task, self.max_malformed = task, max_malformed
        segments = task.segments()
        self.segments = len(segments)
        self.finished = bool(segments) and segments[-1].finished
        self.kept_chunks = self.chunks = segments[-1].chunks if segments else 0
        self.consumed = segments[-1].consumed if segments else 0
        self.documents = self.text_bytes = self.tokens = self.malformed = 0
        self.first_complaint = ""
        itemsize = np.dtype(np.int32).itemsize
        for segment in segments:
            for extent in segment.sets.values():
                self.documents += extent.lengths[1] // itemsize
                self.text_bytes += extent.text_bytes
                self.tokens += extent.tokens
            self._judge(segment.counts)  # after its documents, of which the malformed ones are a share
        self._begin_segment()
        self.told = 0.0

    def _begin_segment(self) -> None:
        self.sets: dict[str, EncodedSet] = {}
        self.counts = Counts()
        self.pending_text_bytes = 0
        self.begun = time.monotonic()

    def add(self, encoded: EncodedChunk) -> None:
        """Take a chunk in.

        Raises:
            DataError: too much of the input is malformed.
        """
        self.chunks = encoded.number + (not encoded.finished)
        self.consumed += encoded.consumed
        self.counts.add(encoded.counts, SHOWN_COMPLAINTS)
        for name, documents in encoded.sets.items():
            self.sets.setdefault(name, EncodedSet()).add(documents)
            self.documents += sum(map(len, documents.lengths))
            self.tokens += sum(map(len, documents.ids))
            self.text_bytes += documents.text_bytes
            self.pending_text_bytes += documents.text_bytes
        self._judge(encoded.counts)

    def _judge(self, counts: Counts) -> None:
        self.malformed += counts.all_skipped["malformed"]
        self.first_complaint = self.first_complaint or next(iter(counts.complaints), "")
        require_few_malformed(
            self.malformed, self.documents, self.max_malformed, self.first_complaint, RECORDS_BEFORE_VERDICT
        )

    def segment_is_full(self) -> bool:
        old = time.monotonic() - self.begun > SEGMENT_SECONDS
        return old or self.pending_text_bytes >= SEGMENT_TEXT_BYTES

    def write_segment(self, finished: bool, digests: list[str | None]) -> None:
        """Bring what is pending to the disk."""
        progress = {"first": self.kept_chunks, "chunks": self.chunks, "consumed": self.consumed}
        self.task.write_segment(
            self.segments, self.sets, self.counts, progress | {"finished": finished, "digests": digests}
        )
        self.segments += 1
        self.kept_chunks, self.finished = self.chunks, finished
        self._begin_segment()

    def tell(self) -> None:
        """Leave word of the progress for whoever watches it, now and then."""
        if (now := time.monotonic()) - self.told < PROGRESS_SECONDS and not self.finished:
            return
        self.told = now
        told: dict[str, Any] = {"consumed": self.consumed, "tokens": self.tokens, "text_bytes": self.text_bytes}
        told |= {"finished": self.finished, "pid": os.getpid(), "host": platform.node()}
        self.task.progress_path.write_text(json.dumps(told), encoding="utf-8")


def require_few_malformed(malformed: int, documents: int, share: float, first: str, at_least: int) -> None:
    """Stop a run whose input is not what it was taken for.

    Args:
        malformed: malformed records.
        documents: good ones.
        share: how much of all may be malformed.
        first: the first malformed one.
        at_least: records to take the share of where fewer have been read so far.

    Raises:
        DataError: it is more.
    """
    read = documents + malformed
    if malformed > share * max(read, at_least):
        raise DataError(
            f"{malformed} of {read} documents read are malformed, more than --max-malformed {share}; the first: {first}"
        )


@contextmanager
def single_threaded_tokenizers() -> Iterator[None]:
    """Each worker is a process; the tokenizers library would take every core for each of them."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of a terminal; the parent ends its workers."""
    if multiprocess.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def parent_is_dead() -> bool:
    """Whether this is a worker whose parent was killed."""
    parent = multiprocess.parent_process()
    return parent is not None and not parent.is_alive()
