"""Fixtures that tests of several folders share."""

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.preprocess import preprocess
from data_tools.train_tokenizer import train_tokenizer
from dsmoe_megatron.runtime.distributed import prepare_device
from tests.pretrain_job import SmallData
from tests.worker_pool import WorkerPool

TRAIN_MODULES = ("argparse.py", "ast.py", "calendar.py", "copy.py", "csv.py", "datetime.py", "difflib.py", "dis.py")
VALIDATION_MODULES = ("fractions.py", "ftplib.py", "functools.py", "gettext.py")


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
    folder = tmp_path_factory.mktemp("small_data")
    library = Path(sysconfig.get_paths()["stdlib"])
    for name, modules in (("train", TRAIN_MODULES), ("validation", VALIDATION_MODULES)):
        (folder / name).mkdir()
        for module in modules:
            shutil.copy(library / module, folder / name / module)
    train_tokenizer([str(folder / "train")], str(folder / "tokenizer"), vocab_size=500)
    data = SmallData(str(folder / "tokenizer.model"), str(folder / "train_set"), str(folder / "validation_set"))
    preprocess([str(folder / "train")], data.train, data.tokenizer)
    preprocess([str(folder / "validation")], data.validation, data.tokenizer)
    return data
