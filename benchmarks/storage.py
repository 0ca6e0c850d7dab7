"""Sequential bandwidth of the disk under a folder."""

import os
import time
from pathlib import Path

BLOCK_BYTES = 4 << 20


def measure_storage(folder: Path, megabytes: float) -> dict[str, float]:
    """Write a file and sync it, then read it after the kernel was asked to forget it.

    A virtual machine's host may still hold it, so that the reading speed is an upper bound.

    Returns:
        {"megabytes", "write", "read"}, the last two in MB/s.
    """
    path = folder / "bandwidth"
    block = os.urandom(BLOCK_BYTES)  # no disk can compress it
    blocks = max(1, round(megabytes * 1e6 / BLOCK_BYTES))
    written = blocks * BLOCK_BYTES / 1e6
    try:
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(blocks):
                file.write(block)
            os.fsync(file.fileno())
            writing = time.perf_counter() - started
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(BLOCK_BYTES):
                pass
        return {"megabytes": written, "write": written / writing, "read": written / (time.perf_counter() - started)}
    finally:
        path.unlink(missing_ok=True)
