"""Finds the inputs of a dataset and cuts them into tasks that can be worked on side by side.

A source is what the user named: a file, a folder of source files, a dataset of the Hugging Face hub. A piece is a part
of one source that can be read on its own; a task is a run of pieces. The tasks, one after the other, are the input in
its order, however many there are.
"""

import glob
import hashlib
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.opening import REMOTE, open_parquet
from dsmoe_megatron.errors import DataError

Kind = Literal["jsonl", "compressed", "parquet", "tree", "hub"]

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".jsonl.gz": "compressed", ".jsonl.zst": "compressed", ".parquet": "parquet",
}  # fmt: skip
DEFAULT_EXTENSIONS = (
    ".c", ".cc", ".cpp", ".cs", ".cu", ".cuh", ".go", ".h", ".hpp", ".java", ".js", ".jl", ".kt", ".lua", ".md", ".php",
    ".pl", ".py", ".pyi", ".r", ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".ts", ".txt", ".yaml", ".yml",
)  # fmt: skip
MAX_FILE_BYTES = 1_000_000  # longer source files are mostly generated tables and bundles
HUB = "hf:"

TASKS_PER_WORKER = 4  # so that the workers end at about the same time
SMALLEST_TASK, LARGEST_TASK = 4 << 20, 512 << 20  # bytes on the disk
MAX_PARTS = 16  # of a compressed file, as each part unpacks all that comes before it
COMPRESSED_READ_BYTES = 1 << 16  # small, because a compressed block may unpack to a thousand times its size
TREE_FILES_PER_PIECE = 4096


@dataclass(frozen=True)
class Source:
    """One input.

    Args:
        path: as it was found; a URL where it is not on this machine.
        kind: how it is read.
        files: what will be read, in this order; of a folder relative to it, else the path itself.
        file_bytes: size of each file as it is stored [bytes].
        left_out: files of a folder that will not be read, by reason.
        state: SHA-256 over names, sizes and modification times: another one means that the input has changed.
    """

    path: str
    kind: Kind
    files: tuple[str, ...]
    file_bytes: tuple[int, ...]
    left_out: dict[str, int]
    state: str

    @property
    def bytes(self) -> int:
        return sum(self.file_bytes)


@dataclass(frozen=True)
class Piece:
    """A part of a source that can be read on its own.

    Args:
        source: number of its source.
        kind: of the source.
        path: of the source.
        start: where it begins: a byte of the stored file (jsonl, compressed), a row group (parquet), a shard (hub).
        stop: where it ends; None: where the source ends.
        files: files of a folder, relative to it.
        bytes: size as it is stored [bytes], for the progress bar.
    """

    source: int
    kind: Kind
    path: str
    start: int
    stop: int | None
    files: tuple[str, ...]
    bytes: int


def find_sources(
    patterns: Iterable[str],
    extensions: Iterable[str] = DEFAULT_EXTENSIONS,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> list[Source]:
    """The sources that the patterns name: in the patterns' order, sorted within each, each file once.

    Args:
        patterns: paths or globs (`**` too) of .jsonl, .jsonl.gz, .jsonl.zst and .parquet files and of folders; URLs
            that fsspec knows (s3://..., hf://datasets/...), globs too; `hf:NAME[:CONFIG[:SPLIT]]`, a hub's dataset.
        extensions: of the files taken from folders, with their dot; upper or lower case is the same.
        max_file_bytes: larger files of a folder are left out [bytes].

    Raises:
        DataError: a pattern names nothing, or a file of another kind.
    """
    wanted = frozenset(extension.lower() for extension in extensions)
    found: dict[str, Source] = {}
    taken: set[str] = set()  # real paths of files
    for pattern in patterns:
        if pattern.startswith(HUB) and REMOTE not in pattern:
            found.setdefault(pattern, _hub_source(pattern))
        elif REMOTE in pattern:
            for path, details in _remote_files(pattern):
                found.setdefault(path, _file_source(path, int(details["size"]), _remote_state(path, details)))
        else:
            for path in _local_paths(pattern):
                # a file reached over a link is the same file, and a loop of links reaches it again and again
                real = os.path.realpath(path)
                if real not in found and real not in taken:
                    found[real] = source = _local_source(path, wanted, max_file_bytes, taken)
                    # of a folder's files none is reached over a link
                    taken.update([real] if source.kind != "tree" else (f"{real}/{file}" for file in source.files))
    return list(found.values())


def _local_paths(pattern: str) -> list[str]:
    try:
        paths = [pattern] if Path(pattern).exists() else sorted(_expand(pattern))
    except OSError as error:  # too long a name, or a folder that may not be entered
        raise DataError(f"--input {pattern}: {error.strerror or error}") from error
    if not paths:
        raise DataError(f"--input {pattern}: no such file or folder")
    return paths


def _expand(pattern: str) -> Iterator[str]:
    """The paths that a pattern names. `**` enters each folder once: glob would follow two links that lead back up along
    every way there is, 2^40 of them."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.glob(pattern)  # noqa: PTH207  # Path.glob knows no absolute patterns
        return
    cut = parts.index("**")
    before, after = "/".join(parts[:cut]), parts[cut + 1 :]
    for start in glob.glob(f"{before}/") if cut else [""]:  # noqa: PTH207
        for folder in _folders_below(start):
            if not after and folder:
                yield folder
            yield from _expand(glob.escape(folder) + ("/".join(after) if after else "*"))


def _folders_below(start: str) -> Iterator[str]:
    """A folder and those in it, hidden ones left out, links followed; each once, with a slash at its end."""
    entered: set[str] = set()
    for place, folders, _ in os.walk(start or ".", onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield "" if not start and place == "." else f"{place.removeprefix('' if start else './').rstrip('/')}/"


def _local_source(path: str, extensions: frozenset[str], max_file_bytes: int, taken: Set[str]) -> Source:
    try:
        if Path(path).is_dir():
            return _tree_source(path, extensions, max_file_bytes, taken)
        status = Path(path).stat()
    except OSError as error:
        raise DataError(f"--input {error.filename or path}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"--input {path}: not a regular file")
    return _file_source(path, status.st_size, _state([(Path(path).name, status.st_size, status.st_mtime_ns)]))


def _file_source(path: str, size: int, state: str) -> Source:
    for suffix, kind in SUFFIXES.items():
        if path.endswith(suffix):
            return Source(path, kind, (path,), (size,), {}, state)
    raise DataError(
        f"--input {path}: not a {', '.join(SUFFIXES)} file; for source files pass the folder and --extensions"
    )


def _tree_source(folder: str, extensions: frozenset[str], max_file_bytes: int, taken: Set[str]) -> Source:
    """The regular files of a folder, sorted; hidden folders (.git) are not entered, links not followed. `taken`: real
    paths of files that other sources hold."""
    real = os.path.realpath(folder)
    kept: list[tuple[str, int, int]] = []
    left_out: Counter[str] = Counter()
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(place, name) for name in sorted(names)):
            status, inside = path.lstat(), path.relative_to(folder).as_posix()
            if path.suffix.lower() not in extensions:
                left_out["other_extension"] += 1
            elif not stat.S_ISREG(status.st_mode):
                left_out["not_regular"] += 1
            elif status.st_size > max_file_bytes:
                left_out["too_large"] += 1
            elif f"{real}/{inside}" in taken:
                left_out["reached_before"] += 1
            else:
                kept.append((inside, status.st_size, status.st_mtime_ns))
    files, sizes = tuple(name for name, _, _ in kept), tuple(size for _, size, _ in kept)
    return Source(folder, "tree", files, sizes, dict(left_out), _state(kept))


def _refuse(error: OSError) -> None:
    """os.walk alone would pass over a folder that it cannot read."""
    raise error


def _remote_files(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files on another machine: URL and what their file system tells of each."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        names = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        entries = [(system.unstrip_protocol(name), system.info(name)) for name in names]
    except FileNotFoundError as error:
        raise DataError(f"--input {pattern}: no such file") from error
    except Exception as error:  # every protocol has errors of its own
        raise DataError(f"--input {pattern}: {error or type(error).__name__}") from error
    files = [(name, details) for name, details in entries if details.get("type") == "file"]
    if not files:
        raise DataError(f"--input {pattern}: no such file")
    unsized = [name for name, details in files if details.get("size") is None]
    if unsized:
        raise DataError(f"--input {unsized[0]}: its server does not tell its size")
    yield from files


def _remote_state(path: str, details: dict[str, Any]) -> str:
    """Whatever the file system tells of a version: an entity tag, a checksum, a time."""
    told = [str(details[key]) for key in ("ETag", "etag", "LastModified", "mtime", "blob_id") if details.get(key)]
    return _state([(path, int(details["size"]), *told)])


def _hub_source(spec: str) -> Source:
    shards, state = open_hub_dataset(spec)
    count = shards.num_shards
    return Source(spec, "hub", tuple(str(number) for number in range(count)), (0,) * count, {}, _state([(spec, state)]))


def open_hub_dataset(spec: str) -> tuple[Any, str]:
    """A dataset of the Hugging Face hub (or a folder in its layout), to be streamed, and the name of its version.

    Args:
        spec: hf:NAME[:CONFIG[:SPLIT]]; the split is train where none is named.

    Raises:
        DataError: the library is missing, or gives no such dataset.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"--input {spec} needs the package datasets: pip install datasets") from error

    name, config, split = [*spec.removeprefix(HUB).split(":"), "", ""][:3]
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        dataset = builder.as_streaming_dataset(split=split or "train")
    except Exception as error:  # the library, the hub and the network have errors of their own
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"--input {spec}: no such dataset ({reason})") from error
    return dataset, f"{builder.config_id} {builder.hash}"


def _state(entries: Iterable[Sequence[object]]) -> str:
    listing = "".join("\0".join(map(str, entry)) + "\n" for entry in entries)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def cut_tasks(sources: Sequence[Source], workers: int) -> list[list[Piece]]:
    """The tasks of an input: enough of them to keep the workers busy, none too large to be begun again.

    Args:
        sources: the inputs.
        workers: processes that will share the work. What is in the dataset does not depend on it.
    """
    total = sum(source.bytes for source in sources)
    size = min(max(total // (TASKS_PER_WORKER * workers), SMALLEST_TASK), LARGEST_TASK)
    compressed = sum(source.kind == "compressed" for source in sources)
    parts = max(1, workers // compressed) if compressed else 1
    tasks: list[list[Piece]] = []
    pending: list[Piece] = []
    pending_bytes = 0
    for number, source in enumerate(sources):
        for piece in _cut_source(number, source, size, parts):
            pending.append(piece)
            pending_bytes += piece.bytes
            if pending_bytes >= size or piece.kind == "hub":
                tasks.append(pending)
                pending, pending_bytes = [], 0
    return [*tasks, pending] if pending else tasks


def _cut_source(number: int, source: Source, size: int, parts: int) -> Iterator[Piece]:
    if source.kind == "tree":
        yield from _cut_tree(number, source, size)
        return
    if source.kind == "hub":
        count, unit = len(source.files), 1
    elif source.kind == "jsonl":
        count, unit = math.ceil(source.bytes / size), size
    elif source.kind == "compressed":
        count = min(parts, math.ceil(source.bytes / SMALLEST_TASK), MAX_PARTS)
        # parts begin where the reader fetches a block
        unit = math.ceil(source.bytes / max(count, 1) / COMPRESSED_READ_BYTES) * COMPRESSED_READ_BYTES
    else:
        groups = _row_groups(source.path) if source.bytes > size else 1
        unit = max(1, round(groups * size / max(source.bytes, 1)))
        count = math.ceil(groups / unit)
    count = max(count, 1)
    for part in range(count):
        stop = None if part == count - 1 and source.kind != "hub" else (part + 1) * unit
        yield Piece(number, source.kind, source.path, part * unit, stop, (), source.bytes // count)


def _cut_tree(number: int, source: Source, size: int) -> Iterator[Piece]:
    files: list[str] = []
    total = 0
    for file, file_bytes in zip(source.files, source.file_bytes, strict=True):
        files.append(file)
        total += file_bytes
        if total >= size or len(files) == TREE_FILES_PER_PIECE:
            yield Piece(number, "tree", source.path, 0, None, tuple(files), total)
            files, total = [], 0
    if files:
        yield Piece(number, "tree", source.path, 0, None, tuple(files), total)


def _row_groups(path: str) -> int:
    """Number of row groups of a parquet file; 1 of one that cannot be read, which its reader will say."""
    try:
        with open_parquet(path) as file:
            return int(file.metadata.num_row_groups)
    except DataError:
        return 1
