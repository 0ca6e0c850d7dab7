"""Fixtures that tests of several folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsmoe_megatron.runtime.distributed import prepare_device
from tests.pretrain_job import SmallData, make_small_data
from tests.worker_pool import WorkerPool

TESTS = Path(__file__).parent
# what waits longest comes first, so that other tests run beside it: one cluster at a time, and it is mostly idle
FIRST = ("slurm", "e2e", "faults", "training")


def pytest_configure() -> None:
    prepare_device()  # before any test module imports megatron.core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes (pytest -n), tests of a file share one and its fixtures, those of tests/slurm as well."""

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(TESTS).parts[0]

    items.sort(key=lambda item: FIRST.index(folder(item)) if folder(item) in FIRST else len(FIRST))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if folder(item) == "slurm" else str(item.path)))


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Runs distributed jobs; what they load is loaded once."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    return make_small_data(tmp_path_factory.mktemp("small_data"))
