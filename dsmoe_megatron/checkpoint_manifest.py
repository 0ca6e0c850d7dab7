"""manifest.json of a step folder: size and checksum of every other file in it. Written last, it vouches for them.

{"format": 1, "files": {name: {"bytes", "xxh3_128"}}, "processes": that saved it, or null, "versions": {...},
 "checksum": XXH3-128 over all of the above, see `_checksum`}

torch reads the values of a tensor without checking them: a flipped bit would be trained on. XXH3-128 finds accidents as
surely as SHA-256 does, at eight times its speed, which is what saving and loading are bound by; against somebody who
changes a file on purpose neither helps, since he can change the manifest too. `xxhsum -H2` agrees with the entries.
"""

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from dsmoe_megatron.durable import write_durably
from dsmoe_megatron.errors import CheckpointError, PassingError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
NOT_CHECKED = "of an earlier version, without a manifest: its values are not checked"
REPORTED_LIBRARIES = ("dsmoe-megatron", "torch", "megatron-core")
BLOCK_BYTES = 8 << 20
THREADS = 2  # per process

Advance = Callable[[int], object]
"""Is told how many more bytes have been read."""


@dataclass(frozen=True)
class FileEntry:
    """What a file must be.

    Attributes:
        bytes: its size.
        xxh3_128: of its content, in hexadecimal.
    """

    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """What a step folder must hold.

    Attributes:
        files: name to entry, the manifest itself left out.
        processes: that saved it; None if no training run did.
        versions: of Python and the libraries that wrote it.
    """

    files: dict[str, FileEntry]
    processes: int | None
    versions: dict[str, str | None]


def _ignore(count: int) -> None:
    pass


def entry_of(path: Path, advance: Advance = _ignore) -> FileEntry:
    """Read a file and describe it.

    Args:
        path: of the file.
        advance: for a progress bar.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(BLOCK_BYTES))
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
            advance(count)
    return FileEntry(size, digest.hexdigest())


def entries_of(folder: Path) -> dict[str, FileEntry]:
    """Describe every file of a folder, the manifest left out.

    Raises:
        OSError: one cannot be read.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(names, threads.map(lambda name: entry_of(folder / name), names), strict=True))


def write_manifest(folder: Path, files: Mapping[str, FileEntry], processes: int | None = None) -> None:
    """Vouch for the files of a folder.

    Args:
        folder: has them, synced.
        files: name to entry.
        processes: that saved them.

    Raises:
        OSError: it cannot be written.
    """
    versions = {"python": platform.python_version(), **{name: _version(name) for name in REPORTED_LIBRARIES}}
    content: dict[str, Any] = {
        "format": FORMAT,
        "files": {name: asdict(files[name]) for name in sorted(files)},
        "processes": processes,
        "versions": versions,
    }
    content["checksum"] = _checksum(content)
    write_durably(folder / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a step folder; None if it has none, as those from before there were manifests.

    Raises:
        CheckpointError: it is damaged or of another format.
        PassingError: it cannot be read.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from None
    except ValueError:
        raise CheckpointError(f"{path}: damaged: it is not JSON") from None
    if not isinstance(content, dict) or content.get("checksum") != _checksum(content):
        raise CheckpointError(f"{path}: damaged: its checksum is not that of its content")
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {content.get('format')!r}, where this version reads {FORMAT}")
    try:
        files = {_plain(name): FileEntry(**entry) for name, entry in content["files"].items()}
        return Manifest(files, content["processes"], dict(content["versions"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a manifest of a step folder ({error})") from None


def find_fault(folder: Path, name: str, entry: FileEntry, advance: Advance = _ignore) -> str | None:
    """What is wrong with a file of a step folder, in a line that names it; None if it is as it was written.

    Raises:
        PassingError: it cannot be read, which says nothing of what it holds.
    """
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            state = "truncated" if size < entry.bytes else "too long"
            return f"{path}: {state}: {size:,} bytes where the manifest says {entry.bytes:,}"
        if entry_of(path, advance) != entry:
            return f"{path}: damaged: its checksum is not the manifest's"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        raise _unreadable(path, error) from None
    return None


def find_faults(folder: Path, files: Mapping[str, FileEntry], advance: Advance = _ignore) -> list[str]:
    """What is wrong with these files of a step folder, a line each, by name.

    Raises:
        PassingError: one cannot be read.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        faults = threads.map(lambda name: find_fault(folder, name, files[name], advance), sorted(files))
        return [fault for fault in faults if fault is not None]


def _unreadable(path: Path, error: OSError) -> PassingError:
    return PassingError(
        f"{path}: cannot be read: {error.strerror or error}; if that lasts, move its folder away to do without it"
    )


def _plain(name: str) -> str:
    if PurePosixPath(name).name != name:
        raise ValueError(f"{name!r} is not a file of the folder")
    return name


def _checksum(content: Mapping[str, Any]) -> str:
    """XXH3-128 over the values, the checksum left out; their layout in the file does not count."""
    values = {name: value for name, value in content.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
