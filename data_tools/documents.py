"""Reads documents out of raw corpora: .jsonl files, plain or compressed, and trees of source files.

Reading is in two halves so that it can be spread over processes: `read_chunks` streams about a megabyte at a time from
the disk, `extract_documents` turns such a chunk into texts.
"""

import glob
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe_megatron.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
DEFAULT_EXTENSIONS = (
    ".c", ".cc", ".cpp", ".cs", ".cu", ".cuh", ".go", ".h", ".hpp", ".java", ".js", ".jl", ".kt", ".lua", ".md", ".php",
    ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".ts", ".txt", ".yaml", ".yml",
)  # fmt: skip
MAX_FILE_BYTES = 1_000_000  # longer source files are mostly generated tables and bundles
CHUNK_BYTES = 1 << 20
READ_BYTES = 1 << 16  # of the file; small because a compressed block may unpack to a thousand times its size
BINARY_PROBE_BYTES = 8192  # a NUL byte in the first ones makes a file binary, as for git


@dataclass(frozen=True)
class Source:
    """One input: a .jsonl file, or a folder of source files.

    Args:
        path: as it was found.
        files: what will be read, in this order.
        file_bytes: size of each file on the disk [bytes].
        left_out: files of a folder that will not be read, by reason.
        state: SHA-256 over names, sizes and modification times: another one means that the input has changed.
    """

    path: Path
    files: tuple[Path, ...]
    file_bytes: tuple[int, ...]
    left_out: dict[str, int]
    state: str

    @property
    def is_tree(self) -> bool:
        return self.files != (self.path,)

    @property
    def bytes(self) -> int:
        return sum(self.file_bytes)


@dataclass(frozen=True)
class Chunk:
    """A piece of one source as it is on the disk, decompressed.

    Args:
        source: index of its source.
        consumed: bytes of the files that it stands for, for the progress bar.
        lines: whole lines of a .jsonl file.
        first_line: number of the first of them, from 1.
        files: contents of source files.
    """

    source: int
    consumed: int
    lines: bytes = b""
    first_line: int = 1
    files: tuple[bytes, ...] = ()


@dataclass
class Documents:
    """What a chunk held.

    Args:
        texts: the documents in order; each can be written as UTF-8.
        skipped: documents left out, by reason: empty, malformed, binary.
        invalid_utf8: documents whose invalid bytes were replaced by U+FFFD.
        malformed: line number and complaint of each malformed line.
    """

    texts: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    invalid_utf8: int = 0
    malformed: list[tuple[int, str]] = field(default_factory=list)


def find_sources(patterns: Iterable[str], extensions: Iterable[str] = DEFAULT_EXTENSIONS) -> list[Source]:
    """The sources that the patterns name: in the patterns' order, sorted within each, each path once.

    Args:
        patterns: paths or globs (`**` too) of .jsonl files and folders.
        extensions: of the files taken from folders, with their dot; upper or lower case is the same.

    Raises:
        DataError: a pattern names nothing, or a file that is no .jsonl file.
    """
    wanted = frozenset(extension.lower() for extension in extensions)
    paths: dict[Path, None] = {}
    for pattern in patterns:
        # Path.glob knows no absolute patterns
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not found:
            raise DataError(f"--input {pattern}: no such file or folder")
        paths.update(dict.fromkeys(map(Path, found)))
    return [_tree(path, wanted) if path.is_dir() else _jsonl(path) for path in paths]


def _jsonl(path: Path) -> Source:
    if not path.name.endswith(JSONL_SUFFIXES):
        raise DataError(
            f"--input {path}: not a {', '.join(JSONL_SUFFIXES)} file; for source files pass the folder and --extensions"
        )
    status = path.stat()
    state = _state([(path.name, status)])
    return Source(path, (path,), (status.st_size,), {}, state)


def _tree(folder: Path, extensions: frozenset[str]) -> Source:
    """The regular files of a folder, sorted; hidden folders (.git) are not entered, links not followed."""
    kept: list[tuple[Path, os.stat_result]] = []
    left_out: Counter[str] = Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in sorted(names)):
            status = path.lstat()
            if path.suffix.lower() not in extensions:
                left_out["other_extension"] += 1
            elif not path.is_file() or path.is_symlink():
                left_out["not_regular"] += 1
            elif status.st_size > MAX_FILE_BYTES:
                left_out["too_large"] += 1
            else:
                kept.append((path, status))
    state = _state([(path.relative_to(folder).as_posix(), status) for path, status in kept])
    files = tuple(path for path, _ in kept)
    return Source(folder, files, tuple(status.st_size for _, status in kept), dict(left_out), state)


def _state(entries: list[tuple[str, os.stat_result]]) -> str:
    listing = "".join(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n" for name, status in entries)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def read_chunks(sources: list[Source]) -> Iterator[Chunk]:
    """Everything in the sources, in order, in chunks of about CHUNK_BYTES.

    Raises:
        DataError: a file cannot be read, or its compressed stream is damaged or ends too early.
    """
    for number, source in enumerate(sources):
        try:
            yield from (_tree_chunks if source.is_tree else _jsonl_chunks)(number, source)
        except OSError as error:
            raise DataError(f"{error.filename or source.path}: {error.strerror or error}") from error


def _tree_chunks(number: int, source: Source) -> Iterator[Chunk]:
    contents: list[bytes] = []
    consumed = 0
    for path, size in zip(source.files, source.file_bytes, strict=True):
        contents.append(path.read_bytes())
        consumed += size
        if consumed >= CHUNK_BYTES:
            yield Chunk(number, consumed, files=tuple(contents))
            contents, consumed = [], 0
    if contents:
        yield Chunk(number, consumed, files=tuple(contents))


def _jsonl_chunks(number: int, source: Source) -> Iterator[Chunk]:
    pending: list[bytes] = []
    pending_bytes = consumed = 0
    first_line = 1
    for block, block_consumed in _blocks(source.path):
        pending.append(block)
        pending_bytes += len(block)
        consumed += block_consumed
        # joined only when a line ends, so that a very long line is not copied again and again
        if pending_bytes < CHUNK_BYTES or b"\n" not in block:
            continue
        content = b"".join(pending)
        end = content.rindex(b"\n") + 1
        yield Chunk(number, consumed, content[:end], first_line)
        first_line += content.count(b"\n", 0, end)
        pending, pending_bytes, consumed = [content[end:]], len(content) - end, 0
    yield Chunk(number, consumed, b"".join(pending), first_line)


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks, each with the bytes of the file that it came from."""
    with path.open("rb") as file:
        if path.suffix == ".jsonl":
            while block := file.read(CHUNK_BYTES):
                yield block, len(block)
            return
        decompressor, inside = _decompressor(path), False
        while packed := file.read(READ_BYTES):
            consumed = len(packed)
            while packed:
                if not inside and not (packed := packed.lstrip(b"\0")):
                    break  # zeros after the last member are padding (tape blocks)
                try:
                    block, inside = decompressor.decompress(packed), True
                except Exception as error:  # zlib.error or zstandard.ZstdError
                    raise DataError(f"{path}: damaged compressed data ({error}): fetch the file again") from error
                yield block, consumed
                packed, consumed = decompressor.unused_data, 0
                if decompressor.eof:  # one file may hold several compressed streams one after the other
                    decompressor, inside = _decompressor(path), False
        if inside:
            raise DataError(f"{path}: the compressed data ends too early: fetch the file again")


def _decompressor(path: Path) -> Any:
    """An object with decompress, eof and unused_data: unlike the libraries' file readers it tells a cut stream."""
    if path.suffix == ".gz":
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def extract_documents(chunk: Chunk, text_key: str = "text") -> Documents:
    """The texts in a chunk. Documents of white space alone count as empty, blank lines do not count."""
    documents = Documents()
    for content in chunk.files:
        if b"\0" in content[:BINARY_PROBE_BYTES]:
            documents.skipped["binary"] += 1
        else:
            _keep(_decode(content, documents), documents)
    for number, line in enumerate(chunk.lines.split(b"\n"), start=chunk.first_line):
        if not line.strip():
            continue
        text, complaint = _text_of_line(line, text_key, documents)
        if complaint:
            documents.skipped["malformed"] += 1
            documents.malformed.append((number, complaint))
        else:
            _keep(text, documents)
    return documents


def _keep(text: str, documents: Documents) -> None:
    if text.strip():
        documents.texts.append(text)
    else:
        documents.skipped["empty"] += 1


def _decode(content: bytes, documents: Documents) -> str:
    """UTF-8 without its byte-order mark. An invalid byte is replaced: one stray name should not cost a document."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        documents.invalid_utf8 += 1
        return content.decode("utf-8", "replace").removeprefix("\ufeff")


def _text_of_line(line: bytes, text_key: str, documents: Documents) -> tuple[str, str]:
    """The line's text and "", or "" and what is wrong with the line."""
    try:
        record = json.loads(_decode(line, documents))
    except (ValueError, RecursionError) as error:
        return "", f"not JSON ({error})"
    if not isinstance(record, dict):
        return "", "not a JSON object"
    if text_key not in record:
        return "", f"no key {text_key!r} (keys: {', '.join(list(record)[:8])}); see --text-key"
    text = record[text_key]
    if not isinstance(text, str):
        return "", f"the value of {text_key!r} is no string"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a pair, escaped: "\ud83d"
        documents.invalid_utf8 += 1
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, ""
