"""Fixtures that tests of several folders share."""

from collections.abc import Iterator

import pytest

from dsmoe_megatron.runtime.distributed import prepare_device
from tests.pretrain_job import SmallData, make_small_data
from tests.worker_pool import WorkerPool


def pytest_configure() -> None:
    prepare_device()  # before any test module imports megatron.core


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Runs distributed jobs; what they load is loaded once."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    return make_small_data(tmp_path_factory.mktemp("small_data"))
