"""A folder that appears whole or not at all, and files in it that are on the disk before it appears."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dsmoe_megatron.errors import CheckpointError, ConfigurationError


@contextmanager
def whole_or_nothing(output: Path, overwrite: bool, mark: str, kind: str) -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end, and goes if anything fails.

    Args:
        output: folder to make; an empty one may be there.
        overwrite: replace what is there, if it is of the same kind.
        mark: the file by which a folder of this kind is known.
        kind: what such a folder is called in messages (`an export`).

    Raises:
        ConfigurationError: something else is at `output`.
        CheckpointError: the folder cannot be written.
    """
    output = output.absolute()
    occupied = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if occupied and not overwrite:
        raise ConfigurationError("--output", str(output), "is already there; name another folder or give --overwrite")
    if occupied and not (output / mark).is_file():
        raise ConfigurationError("--output", str(output), f"is not {kind}, so --overwrite does not remove it")
    folder, replaced = (output.with_name(f"{output.name}.{suffix}-{os.getpid()}") for suffix in ("tmp", "old"))
    try:
        folder.mkdir(parents=True)
        yield folder
        if output.exists():
            output.rename(replaced)
        folder.rename(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Wait until a written file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
