"""Fixtures that tests of several folders share."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dsmoe_megatron.runtime.distributed import prepare_device
from tests.pretrain_job import SmallData, make_small_data
from tests.requirements import lacks
from tests.worker_pool import WorkerPool


def pytest_configure() -> None:
    prepare_device()  # before any test module imports megatron.core


@pytest.fixture(scope="session")
def with_deepspeed() -> None:
    """DeepSpeed is there and its Adam compiled: in a job, ranks that wait for the compiler lose patience."""
    if importlib.util.find_spec("deepspeed") is None:
        lacks("DeepSpeed is not installed: pip install deepspeed")
    build = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, timeout=900)


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """Runs distributed jobs; what they load is loaded once."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    return make_small_data(tmp_path_factory.mktemp("small_data"))
