"""Text files that a command line asks for: whole or not there."""

import os
from pathlib import Path

from dsmoe_megatron.errors import ConfigurationError


def check_output(path: Path | None, option: str) -> None:
    """Refuse a place that cannot be written to before hours of work go into it; None is no file.

    Raises:
        ConfigurationError: the folder does not exist, or the path is one.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(option, str(path), "its folder does not exist")
    if path.is_dir():
        raise ConfigurationError(option, str(path), "is a folder; name a file")


def write_output(path: Path, text: str, option: str) -> None:
    """Write a file under a temporary name, sync and rename it.

    Raises:
        ConfigurationError: it cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigurationError(option, str(path), f"cannot be written: {error.strerror}") from None
