"""Opens input files, on this machine or wherever fsspec reaches, with errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from dsmoe_megatron.errors import DataError

REMOTE = "://"  # in a URL
REMOTE_BLOCK_BYTES = 8 << 20  # fetched at a time


class UnreadableInputError(DataError):
    """An input file cannot be read, is damaged, or ends too early."""


@contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """A file for reading.

    Args:
        path: on this machine, or a URL.

    Raises:
        UnreadableInputError: it cannot be opened, or reading it failed.
    """
    try:
        if REMOTE in path:
            import fsspec

            system, name = fsspec.core.url_to_fs(path)
            with system.open(name, "rb", block_size=REMOTE_BLOCK_BYTES) as file:
                yield file
        else:
            with open(path, "rb") as file:  # noqa: PTH123  # Path would drop a trailing slash, which is an error here
                yield file
    except DataError:
        raise
    except OSError as error:
        raise UnreadableInputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        if REMOTE not in path:
            raise
        raise UnreadableInputError(f"{path}: {error or type(error).__name__}") from error  # the protocols' own errors


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile.

    Raises:
        UnreadableInputError: the file is damaged or cut, or cannot be read.
        DataError: pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs the package pyarrow: pip install pyarrow") from error

    with open_input(path) as file:
        try:
            with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as parquet:
                yield parquet
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # damage shows as the other two, too
            reason = str(error).strip().split("\n")[0]
            raise UnreadableInputError(f"{path}: damaged or no parquet file ({reason}): fetch it again") from error
