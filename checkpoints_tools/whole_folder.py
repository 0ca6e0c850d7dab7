"""A folder that appears whole or not at all, and the remains of processes that were killed while making one."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dsmoe_megatron.durable import sync
from dsmoe_megatron.errors import CheckpointError, ConfigurationError

UNFINISHED, REPLACED = "tmp", "old"


@contextmanager
def whole_folder(output: Path, overwrite: bool, what: str = "an export", mark: str = "config.json") -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end, and goes if anything fails.

    What a killed process left beside `output` is removed first, and an older folder that it had moved out of the way is
    brought back.

    Args:
        output: folder to make.
        overwrite: replace one that is there, if it is one of this kind.
        what: the kind, for messages.
        mark: a file that every folder of this kind has.

    Raises:
        ConfigurationError: `output` is there.
        CheckpointError: it cannot be written.
    """
    output = output.resolve()  # a link stays, and what it points to is made whole, on the disk where that lies
    try:
        _clean_up_after_the_dead(output)
        occupied = output.exists() and not (output.is_dir() and not any(output.iterdir()))
        if occupied and not overwrite:
            rule = "is already there; name another folder or give --overwrite"
            raise ConfigurationError("--output", str(output), rule)
        if occupied and not (output / mark).is_file():
            raise ConfigurationError("--output", str(output), f"is not {what}, so --overwrite does not remove it")
        folder, replaced = (_beside(output, role, os.getpid()) for role in (UNFINISHED, REPLACED))
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    try:
        yield folder
        sync(folder)
        if output.exists():
            output.rename(replaced)
        folder.rename(output)
        sync(output.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if replaced.exists() and not output.exists():
            replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _beside(output: Path, role: str, process: int | str) -> Path:
    # with the machine's name: another machine's processes on the same disk cannot be asked whether they live
    return output.with_name(f"{output.name}.{role}-{platform.node()}-{process}")


def _clean_up_after_the_dead(output: Path) -> None:
    if not output.parent.is_dir():
        return
    for role in (REPLACED, UNFINISHED):
        beginning = _beside(output, role, "").name
        for folder in sorted(output.parent.iterdir()):
            process = folder.name.removeprefix(beginning)
            if process == folder.name or not process.isdecimal() or _is_alive(int(process)):
                continue
            if role == REPLACED and not output.exists():
                folder.rename(output)  # killed between the two renames: nothing has taken its place yet
            else:
                shutil.rmtree(folder)


def _is_alive(process: int) -> bool:
    """Whether another process has this number; this one has nothing of its own yet."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True
