"""Sample indices are there whole or not at all: damage, crashes and rivals change no sample that is trained on."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_megatron.config import Config
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.runtime.distributed import group_of_one
from dsmoe_megatron.training.index_cache import IndexCache
from tests.pretrain_job import SmallData, refused_job, run_config
from tests.worker_pool import WorkerPool

RECORD = "record.json"
LONG = {"steps": 500_000}  # its indices take about a second to build
SECONDS_FOR_A_BUILD = 60


def open_datasets(config: Config, cache_dir: Path, say: Callable[[str], None]) -> tuple[Any, Any]:
    """The training and validation datasets, as training builds or opens them."""
    from dsmoe_megatron.tokenizers import load_tokenizer
    from dsmoe_megatron.training.data import build_datasets

    assert config.data.tokenizer is not None
    return build_datasets(config, load_tokenizer(config.data.tokenizer), cache_dir, say)


def open_job(config: Config, cache_dirs: list[Path]) -> list[tuple[list[str], str]]:
    """Build or open the datasets over each cache.

    Returns:
        For each, the lines that were said, and a digest of the first 200 training and validation samples.
    """
    answers = []
    for cache_dir in cache_dirs:
        said: list[str] = []
        datasets = open_datasets(config, cache_dir, said.append)
        digest = hashlib.sha256()
        for dataset in datasets:
            for number in range(min(len(dataset), 200)):
                digest.update(dataset[number]["tokens"].numpy().tobytes())
        answers.append((said, digest.hexdigest()))
    return answers


def build_alone(config: Config, cache_dir: Path, said: Path) -> None:
    """A process of its own that builds, and writes what it says into a file."""
    with group_of_one(), said.open("w", buffering=1) as file:
        open_datasets(config, cache_dir, lambda line: print(line, file=file))


def contents(cache_dir: Path) -> dict[str, bytes]:
    """Everything in a cache but its locks."""
    files = (path for path in cache_dir.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(cache_dir)): path.read_bytes() for path in files}


def identities(cache_dir: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of everything in a cache."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache_dir.rglob("*")}


def index_folder(cache_dir: Path, split: str = "train") -> Path:
    (folder,) = (path for path in cache_dir.glob(f"{split}-*") if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def fresh(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache built in an empty folder, and the digest of its samples."""
    cache_dir = tmp_path_factory.mktemp("fresh") / "cache"
    (((said, digest),),) = worker_pool.run(1, open_job, run_config(small_data, cache_dir.parent), [cache_dir])
    assert len(said) == 2
    assert all(line.endswith(": building the sample indices") for line in said)
    return cache_dir, digest


def reopened(
    worker_pool: WorkerPool, config: Config, fresh: tuple[Path, str], cache_dirs: dict[str, Path]
) -> dict[str, list[str]]:
    """What is said of each damaged copy of a fresh cache; all of them end as good as new."""
    (answers,) = worker_pool.run(1, open_job, config, list(cache_dirs.values()))
    assert {digest for _, digest in answers} == {fresh[1]}
    for cache_dir in cache_dirs.values():
        assert contents(cache_dir) == contents(fresh[0])
    return {name: said for name, (said, _) in zip(cache_dirs, answers, strict=True)}


def test_a_whole_cache_is_left_as_it_is(
    worker_pool: WorkerPool, small_data: SmallData, fresh: tuple[Path, str], tmp_path: Path
) -> None:
    before = identities(fresh[0])

    answers = worker_pool.run(2, open_job, run_config(small_data, tmp_path), [fresh[0]])

    assert answers == [[([], fresh[1])]] * 2
    assert identities(fresh[0]) == before


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
def test_every_damaged_file_is_found_and_built_again(
    worker_pool: WorkerPool,
    small_data: SmallData,
    fresh: tuple[Path, str],
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    names = list(contents(fresh[0]))
    copies = {}
    for number, name in enumerate(names):
        copies[name] = shutil.copytree(fresh[0], tmp_path / f"cache_{number}")
        damage(copies[name] / name)

    said = reopened(worker_pool, run_config(small_data, tmp_path), fresh, copies)

    assert len(names) == 2 * (1 + 3) + (1 + 2) + 1 + (1 + 3) + 1  # two datasets and their blend; one dataset; records
    for name, lines in said.items():
        assert len(lines) == 1
        assert Path(name).name in lines[0]
        assert lines[0].endswith(": building the sample indices again")


def test_records_that_vouch_for_nothing_are_found(
    worker_pool: WorkerPool, small_data: SmallData, fresh: tuple[Path, str], tmp_path: Path
) -> None:
    record = json.loads((index_folder(fresh[0]) / RECORD).read_text())
    of_strings = dict.fromkeys(record["files"], "whole")
    records = {
        "empty": b"",
        "no JSON": b"{",
        "no text": b"\xff\xfe\x00",
        "a list": b"[]",
        "null": b"null",
        "no files": json.dumps(record | {"files": {}}).encode(),
        "a list of files": json.dumps(record | {"files": list(record["files"])}).encode(),
        "files without checksums": json.dumps(record | {"files": of_strings}).encode(),
        "another format": json.dumps(record | {"format": 0}).encode(),
        "other inputs": json.dumps(record | {"inputs": record["inputs"] | {"seed": 1}}).encode(),
    }
    copies = {}
    for name, content in records.items():
        copies[name] = shutil.copytree(fresh[0], tmp_path / name)
        (index_folder(copies[name]) / RECORD).write_bytes(content)

    said = reopened(worker_pool, run_config(small_data, tmp_path), fresh, copies)

    for lines in said.values():
        assert len(lines) == 1
        assert "record.json is damaged, or of other indices" in lines[0]


def test_a_file_cut_short_is_told_by_its_size(
    worker_pool: WorkerPool, small_data: SmallData, fresh: tuple[Path, str], tmp_path: Path
) -> None:
    cache_dir = shutil.copytree(fresh[0], tmp_path / "cache")
    array = sorted(index_folder(cache_dir).glob("*sample_index.npy"))[0]
    size = array.stat().st_size
    cut_short(array)

    (lines,) = reopened(worker_pool, run_config(small_data, tmp_path), fresh, {"": cache_dir}).values()

    assert f"{array.name} has {size - 1} bytes where {size} were written" in lines[0]


def test_what_a_broken_build_left_is_removed(
    worker_pool: WorkerPool, small_data: SmallData, fresh: tuple[Path, str], tmp_path: Path
) -> None:
    """Once beside whole indices of another blend, once with a file where the folder should be."""
    copies = {name: shutil.copytree(fresh[0], tmp_path / name) for name in ("half built", "a file")}
    for cache_dir in copies.values():
        index_folder(cache_dir).rename(f"{index_folder(cache_dir)}.building")
    shutil.rmtree(left := next(copies["a file"].glob("*.building")))
    left.with_suffix("").write_bytes(b"not a folder")

    said = reopened(worker_pool, run_config(small_data, tmp_path), fresh, copies)

    assert [len(lines) for lines in said.values()] == [1, 1]
    assert "an earlier build was broken off" in said["half built"][0]


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_an_array_is_not_run(
    worker_pool: WorkerPool, small_data: SmallData, fresh: tuple[Path, str], tmp_path: Path
) -> None:
    """megatron-core loads with allow_pickle; here the record even agrees with the pickle."""
    cache_dir = shutil.copytree(fresh[0], tmp_path / "cache")
    folder = index_folder(cache_dir)
    content = pickle.dumps(Touch(tmp_path / "run_by_the_pickle"))
    array = sorted(folder.glob("*shuffle_index.npy"))[0]
    array.write_bytes(content)
    record = json.loads((folder / RECORD).read_text())
    record["files"][array.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del record["checksum"]
    record["checksum"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    (lines,) = reopened(worker_pool, run_config(small_data, tmp_path), fresh, {"": cache_dir}).values()

    assert f"{array.name} is no array" in lines[0]
    assert not (tmp_path / "run_by_the_pickle").exists()


def test_a_dataset_that_is_made_again_gets_indices_of_its_own(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    """megatron-core names its files by the path of the dataset, and would read the old ones."""
    data = SmallData(small_data.tokenizer, str(tmp_path / "train"), small_data.validation)
    config = run_config(data, tmp_path)
    digests: list[str] = []
    for source in (small_data.train, small_data.validation):
        for ending in ("bin", "idx", "manifest.json"):
            shutil.copy(f"{source}.{ending}", f"{data.train}.{ending}")
        (((_, in_old), (_, in_new)),) = worker_pool.run(
            1, open_job, config, [tmp_path / "cache", tmp_path / f"cache_{len(digests)}"]
        )
        assert in_old == in_new
        digests.append(in_new)

    assert digests[0] != digests[1]


@contextlib.contextmanager
def started(worker_pool: WorkerPool, config: Config, cache_dir: Path, said: Path) -> Iterator[BaseProcess]:
    """A process that builds, and that ends with the block at the latest."""
    process: BaseProcess = worker_pool.context.Process(target=build_alone, args=(config, cache_dir, said))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_FOR_A_BUILD
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def long_build(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh cache of the long run."""
    cache_dir = tmp_path_factory.mktemp("long") / "cache"
    worker_pool.run(1, open_job, run_config(small_data, cache_dir.parent, train=LONG), [cache_dir])
    return cache_dir


@pytest.mark.parametrize("files", [0, 1, 4])
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(
    worker_pool: WorkerPool, small_data: SmallData, long_build: Path, tmp_path: Path, files: int
) -> None:
    """Killed when so many files have been begun."""
    config, cache_dir = run_config(small_data, tmp_path, train=LONG), tmp_path / "cache"

    with started(worker_pool, config, cache_dir, tmp_path / "said") as process:
        wait_until(lambda: any(cache_dir.glob("train-*.building")))
        wait_until(lambda: len(list(cache_dir.glob("train-*.building/*"))) >= files)
        process.kill()

    assert not [path for path in cache_dir.glob("train-*") if path.suffix == ""]
    ((again, _),) = worker_pool.run(1, open_job, config, [cache_dir])[0]
    assert "an earlier build was broken off" in again[0]
    assert contents(cache_dir) == contents(long_build)


def test_jobs_that_share_a_cache_build_it_once(
    worker_pool: WorkerPool, small_data: SmallData, long_build: Path, tmp_path: Path
) -> None:
    """The first is halted while it builds, until the second has come upon it."""
    config, cache_dir = run_config(small_data, tmp_path, train=LONG), tmp_path / "cache"
    said = {name: tmp_path / name for name in ("first", "second")}
    with started(worker_pool, config, cache_dir, said["first"]) as first:
        wait_until(lambda: any(cache_dir.glob("train-*.building")))
        assert first.pid is not None
        os.kill(first.pid, signal.SIGSTOP)
        with started(worker_pool, config, cache_dir, said["second"]) as second:
            wait_until(lambda: said["second"].exists() and "waiting for another job" in said["second"].read_text())
            os.kill(first.pid, signal.SIGCONT)
            for process in (first, second):
                process.join(SECONDS_FOR_A_BUILD)

    assert (first.exitcode, second.exitcode) == (0, 0)
    assert contents(cache_dir) == contents(long_build)
    lines = [line for path in said.values() for line in path.read_text().splitlines()]
    assert [line.count(": building the sample indices") for line in lines if "/train-" in line].count(1) == 1


def test_a_folder_that_cannot_be_written_is_one_line(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for cache_dir in (tmp_path / "file", tmp_path / "file" / "cache"):
        config = run_config(small_data, tmp_path / "run", data={"cache_dir": str(cache_dir)})

        texts = worker_pool.run(2, refused_job, config)

        for text in texts:
            assert f"Error: {cache_dir}: sample indices cannot be written" in text
            assert "data.cache_dir" in text
            assert "\n" not in text


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system of a mount without locks cannot be made here: its answer is."""

    def flock(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)

    with pytest.raises(DataError, match="file system knows no locks") as raised:
        IndexCache(tmp_path, "train", {}).make(lambda _: None, print)
    assert str(raised.value).startswith(f"{tmp_path}: ")
    assert str(raised.value).endswith("; set data.cache_dir to a folder on another one")


def full_disk_job(config: Config, cache_dir: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(DataError) as raised:
        open_job(config, [cache_dir])
    return str(raised.value)


def test_a_full_disk_is_one_line_and_keeps_nothing_of_the_build(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    (text,) = worker_pool.run(1, full_disk_job, run_config(small_data, tmp_path), tmp_path / "cache")

    assert "sample indices cannot be written" in text
    assert "\n" not in text
    assert contents(tmp_path / "cache") == {}


def cache_of_ones_own_job(config: Config, folder: Path) -> str:
    rank = torch.distributed.get_rank()
    with pytest.raises(Exception, match=r"set data\.cache_dir to a folder that all nodes share") as raised:
        open_job(config, [folder / f"cache_of_rank_{rank}"])
    return str(raised.value)


def test_a_folder_that_another_rank_does_not_see_is_one_line(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    texts = worker_pool.run(2, cache_of_ones_own_job, run_config(small_data, tmp_path), tmp_path)

    assert texts[0] == texts[1]
    assert "cache_of_rank_1" in texts[0]
