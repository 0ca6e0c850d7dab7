"""Sample indices on the disk: there whole or not at all, and checked before they are read.

megatron-core writes indices straight to their place and later loads whatever it finds there: what a killed run left, or
a failing disk changed, is trained on without a word. Here the indices of one blend are one folder:

    CACHE_DIR/train-5e1f.../           megatron-core's files, and record.json with size and SHA-256 of each
    CACHE_DIR/train-5e1f....building/  the same while it is made; it is renamed when all of it is written
    CACHE_DIR/train-5e1f....lock       locked by the process that makes it, so that jobs may share CACHE_DIR

The name is a hash of all that the indices follow from, so a folder never changes once it is there, and is read without
the lock. Every byte is read and checked before use, at the speed of SHA-256. That also finds what a power cut left of
files that had not reached the disk: they are not synced, which would cost a blend of 128 datasets a third of its build.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from dsmoe_megatron.errors import DataError
from dsmoe_megatron.training.run_lock import LOCKS_UNKNOWN

RECORD = "record.json"
RECORD_FORMAT = 1
READ_BYTES = 1 << 20
ARRAY_START = b"\x93NUMPY"  # numpy.load takes a file that begins otherwise for a pickle, and runs it

Say = Callable[[str], None]
Built = TypeVar("Built")


@dataclass(frozen=True)
class IndexCache:
    """The indices of one blend.

    Attributes:
        cache_dir: folder of many of them, which other jobs may use at the same time.
        name: what the indices are of, the beginning of their folder's name.
        inputs: all that they follow from, as JSON gives it back.
    """

    cache_dir: Path
    name: str
    inputs: dict[str, Any]

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()
        return self.cache_dir / f"{self.name}-{digest[:32]}"

    def files(self) -> dict[str, int]:
        """Name and bytes of the indices that are there and whole."""
        return {name: each["bytes"] for name, each in (_recorded_files(self.folder, self.inputs) or {}).items()}

    def fault(self) -> str | None:
        """Why the indices cannot be used, in a few words; None if they are whole. Reads every byte of them."""
        try:
            if not self.folder.exists():
                return "not there"
            if not (self.folder / RECORD).exists():
                return f"{RECORD} is missing, so the files may be half-written"
            files = _recorded_files(self.folder, self.inputs)
            if files is None:
                return f"{RECORD} is damaged, or of other indices"
            faults = (_file_fault(self.folder / name, recorded) for name, recorded in files.items())
            return next((fault for fault in faults if fault is not None), None)
        except OSError as error:
            return f"{error.filename or RECORD} cannot be read ({error.strerror or error})"

    def make(self, build: Callable[[Path], Built], say: Say) -> Built | None:
        """Make the indices unless they are there and whole; whatever else is there is removed.

        Args:
            build: writes the index files into the folder that it is given.
            say: takes one line on what is built, and why if something was there.

        Returns:
            What `build` returned; None where there was nothing to build.

        Raises:
            DataError: the cache folder cannot be written, or not locked.
        """
        if self.fault() is None:
            return None
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with self._locked(say):
                fault = self.fault()  # another job may have made them in the meantime
                if fault is None:
                    return None
                say(self._announcement(fault))
                return self._build(build)
        except OSError as error:
            raise DataError(
                f"{error.filename or self.cache_dir}: sample indices cannot be written ({error.strerror or error}); "
                "set data.cache_dir to a folder of yours with room"
            ) from error

    @property
    def _unfinished(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.building")

    @contextlib.contextmanager
    def _locked(self, say: Say) -> Iterator[None]:
        """The kernel gives the lock back when its holder ends, however that ends."""
        lock = FileLock(self.folder.with_name(f"{self.folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{self.folder}: waiting for another job that builds these sample indices")
            lock.acquire()
        except OSError as error:
            if error.errno not in LOCKS_UNKNOWN:
                raise
            rule = "its file system knows no locks, by which jobs build sample indices once"
            raise DataError(f"{self.cache_dir}: {rule}; set data.cache_dir to a folder on another one") from error
        try:
            yield
        finally:
            lock.release()

    def _announcement(self, fault: str) -> str:
        if self.folder.exists():
            return f"{self.folder}: {fault}: building the sample indices again"
        if self._unfinished.exists():
            return f"{self.folder}: an earlier build was broken off: building the sample indices again"
        return f"{self.folder}: building the sample indices"

    def _build(self, build: Callable[[Path], Built]) -> Built:
        _remove(self._unfinished)
        try:
            self._unfinished.mkdir()
            built = build(self._unfinished)
            _write_record(self._unfinished, self.inputs)
        except BaseException:
            # on a full disk what is left of it would stay in the way
            shutil.rmtree(self._unfinished, ignore_errors=True)
            raise
        _remove(self.folder)
        self._unfinished.rename(self.folder)
        return built


def _write_record(folder: Path, inputs: dict[str, Any]) -> None:
    """Vouch for the files of a folder."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    (folder / RECORD).write_bytes(_record(inputs, files))


def _record(inputs: dict[str, Any], files: dict[str, dict[str, Any]]) -> bytes:
    """Its checksum is that of the other values, so that what is wrong with a record is not looked for in the files."""
    record = {"format": RECORD_FORMAT, "inputs": inputs, "files": files}
    checksum = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return json.dumps(record | {"checksum": checksum}, indent=1).encode() + b"\n"


def _recorded_files(folder: Path, inputs: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """Name -> {"bytes", "sha256"}; None if the record is not the one that this program wrote for these inputs."""
    try:
        content = (folder / RECORD).read_bytes()
        files: dict[str, dict[str, Any]] = json.loads(content)["files"]
    except (ValueError, LookupError, TypeError, FileNotFoundError):
        return None
    return files if content == _record(inputs, files) else None


def _file_fault(path: Path, recorded: dict[str, Any]) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != recorded["bytes"]:
        return f"{path.name} has {size} bytes where {recorded['bytes']} were written"
    if _sha256(path) != recorded["sha256"]:
        return f"{path.name} is damaged (its SHA-256 is not the recorded one)"
    with path.open("rb") as file:
        if path.suffix == ".npy" and file.read(len(ARRAY_START)) != ARRAY_START:
            return f"{path.name} is no array"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
