"""Fixtures that tests of several folders share."""

from collections.abc import Iterator

import pytest
from worker_pool import WorkerPool


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Four processes for distributed tests, started once."""
    pool = WorkerPool(4)
    yield pool
    pool.close()
