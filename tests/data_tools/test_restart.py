"""A run that is killed goes on where it was, and ends in the files of a run that was not."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard
from filelock import FileLock

from data_tools import pipeline
from data_tools.documents import DocumentRules
from data_tools.executors import run_locally
from data_tools.preprocess import preprocess
from data_tools.work_folder import WorkFolder
from dsmoe_megatron.errors import DataError

SCRIPT = Path(__file__).parents[2] / "data_tools" / "preprocess.py"
# segments of half a megabyte instead of 256, so that a small input has many
SMALL_SEGMENTS = (
    "import sys; from data_tools import pipeline, preprocess; pipeline.SEGMENT_TEXT_BYTES = 1 << 19;"
    " sys.argv[0] = 'preprocess.py'; preprocess.main()"
)
KILLS = 6


@pytest.fixture(scope="module")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A plain and a compressed file, in all some ten megabytes."""
    folder = tmp_path_factory.mktemp("corpus")
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (folder / "a.jsonl").write_bytes(content + content)
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    return [str(folder / name) for name in ("a.jsonl", "b.jsonl.zst")]


def files_of(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx")}


def command(corpus: list[str], prefix: Path, tokenizer_spec: str, workers: int, *more: str) -> list[str]:
    start = [sys.executable, "-c", SMALL_SEGMENTS] if workers == 1 else [sys.executable, str(SCRIPT)]
    arguments = ["--input", *corpus, "--output-prefix", str(prefix), "--tokenizer", tokenizer_spec]
    return [*start, *arguments, "--workers", str(workers), *more]


def segments_of(prefix: Path) -> list[str]:
    return sorted(str(path.relative_to(prefix.parent)) for path in prefix.parent.glob("*.work/tasks/*/segment_*.json"))


def wait_until(condition: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_killed_again_and_again_it_ends_in_the_same_files(
    corpus: list[str], tokenizer_spec: str, tmp_path: Path
) -> None:
    preprocess(corpus, str(tmp_path / "whole"), tokenizer_spec)
    prefix = tmp_path / "killed"
    generator = random.Random(0)
    kept_before: list[str] = []
    killed = 0
    while killed < KILLS:
        # the slow encoder, which leaves time to be killed
        process = subprocess.Popen(
            command(corpus, prefix, tokenizer_spec, 1, "--encoder", "reference"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        before = len(segments_of(prefix))
        wait_until(lambda before=before: len(segments_of(prefix)) > before, process)
        time.sleep(generator.uniform(0, 0.2))
        process.kill()
        process.communicate(timeout=60)
        if process.returncode == 0:
            break
        killed += 1
        kept = segments_of(prefix)
        assert set(kept) >= set(kept_before)
        kept_before = kept
        assert not Path(f"{prefix}.manifest.json").exists()
    assert killed >= 3

    done = subprocess.run(
        command(corpus, prefix, tokenizer_spec, 1, "--encoder", "reference"), capture_output=True, text=True, check=True
    )

    assert "going on with the run that was stopped" in done.stderr
    assert files_of(prefix) == files_of(tmp_path / "whole")
    whole, again = (json.loads(Path(f"{path}.manifest.json").read_text()) for path in (tmp_path / "whole", prefix))
    assert {**again, "encoder": 0, "checksum": 0} == {**whole, "encoder": 0, "checksum": 0}
    assert not Path(f"{prefix}.work").exists()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent_and_leave_nothing_that_passes_for_whole(
    sent: signal.Signals, corpus: list[str], tokenizer_spec: str, tmp_path: Path
) -> None:
    prefix = tmp_path / "data"
    process = subprocess.Popen(
        command(corpus, prefix, tokenizer_spec, 2, "--encoder", "reference"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: any(prefix.parent.glob("*.work/tasks/*/progress")), process)

    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does: to the workers too
    else:
        process.send_signal(sent)
    _, printed = process.communicate(timeout=60)  # returns once the workers too have closed the pipe

    assert process.returncode == (130 if sent == signal.SIGINT else -sent)
    assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["data.work"]


def test_a_killed_worker_ends_the_run_in_one_line(corpus: list[str], tokenizer_spec: str, tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    arguments = command(corpus, prefix, tokenizer_spec, 2, "--encoder", "reference")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told: list[dict[str, Any]] = []

    def tells() -> bool:
        for path in prefix.parent.glob("*.work/tasks/*/progress"):
            with contextlib.suppress(ValueError):  # it is being written
                told.append(json.loads(path.read_text()))
        return bool(told)

    wait_until(tells, process)
    assert told[0]["pid"] != process.pid

    os.kill(told[0]["pid"], signal.SIGKILL)
    _, printed = process.communicate(timeout=60)

    assert process.returncode == 1
    assert printed.splitlines()[-1].startswith("preprocess: error: a worker process was killed")
    assert "Traceback" not in printed
    subprocess.run(arguments, check=True, capture_output=True)
    preprocess(corpus, str(tmp_path / "whole"), tokenizer_spec)
    assert files_of(prefix) == files_of(tmp_path / "whole")


@pytest.fixture
def unfinished(
    corpus: list[str], tokenizer_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, list[str]]:
    """A run that was stopped before its last step, with several segments in each task."""
    monkeypatch.setattr(pipeline, "SEGMENT_TEXT_BYTES", 1 << 19)
    prefix = tmp_path / "data"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.preprocess.Assembly.finish", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(corpus, str(prefix), tokenizer_spec)
    assert len(segments_of(prefix)) > 8
    return prefix, corpus


def finish(unfinished: tuple[Path, list[str]], tokenizer_spec: str) -> dict[str, bytes]:
    prefix, corpus = unfinished
    preprocess(corpus, str(prefix), tokenizer_spec)
    return files_of(prefix)


@pytest.mark.parametrize("damage", ["cut data", "no data", "cut record", "no record", "foreign record", "leftover"])
def test_a_segment_that_is_not_whole_is_made_again(
    damage: str, unfinished: tuple[Path, list[str]], tokenizer_spec: str, tmp_path: Path
) -> None:
    prefix, corpus = unfinished
    task = WorkFolder(str(prefix)).task(0).path
    record, data = task / "segment_0001.json", task / "segment_0001.data"
    if damage == "cut data":
        os.truncate(data, data.stat().st_size - 2)
    elif damage == "no data":
        data.unlink()
    elif damage == "cut record":
        os.truncate(record, record.stat().st_size - 2)
    elif damage == "no record":
        record.unlink()
    elif damage == "foreign record":  # of a worker that was given up and cut its segments elsewhere
        record.write_text(json.dumps(json.loads(record.read_text()) | {"first": 1, "chunks": 2}))
    else:
        (task / "segment_0009.node.123.tmp").write_bytes(b"half")

    files = finish(unfinished, tokenizer_spec)

    preprocess(corpus, str(tmp_path / "whole"), tokenizer_spec)
    assert files == files_of(tmp_path / "whole")


def test_another_plan_does_not_go_on_with_the_run(
    unfinished: tuple[Path, list[str]], tokenizer_spec: str, tmp_path: Path
) -> None:
    prefix, corpus = unfinished
    with pytest.raises(DataError, match=r"data\.work holds an unfinished run with other options: .*--overwrite"):
        preprocess(corpus, str(prefix), tokenizer_spec, rules=DocumentRules(end_of_document="none"))
    with pytest.raises(DataError, match=r"data\.work holds an unfinished run with other input"):
        preprocess(corpus[:1], str(prefix), tokenizer_spec)

    preprocess(corpus[:1], str(prefix), tokenizer_spec, overwrite=True)
    preprocess(corpus[:1], str(tmp_path / "whole"), tokenizer_spec)

    assert files_of(prefix) == files_of(tmp_path / "whole")


def test_two_processes_do_not_make_one_dataset(unfinished: tuple[Path, list[str]], tokenizer_spec: str) -> None:
    prefix, corpus = unfinished
    with (
        FileLock(WorkFolder(str(prefix)).lock_path),
        pytest.raises(DataError, match=r"data\.work: another process is making this dataset"),
    ):
        preprocess(corpus, str(prefix), tokenizer_spec)


def test_malformed_records_before_the_stop_are_a_share_of_all_documents(
    tokenizer_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "SEGMENT_TEXT_BYTES", 1 << 19)
    lines = ["oops" if number % 200 == 7 else json.dumps({"text": f"document {number}"}) for number in range(60_000)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))  # half of the share that is allowed
    inputs, prefix = [str(tmp_path / "in.jsonl")], str(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr("data_tools.pipeline.TaskProgress.segment_is_full", stop_after_a_segment)
        with pytest.raises(KeyboardInterrupt):
            preprocess(inputs, prefix, tokenizer_spec)
    assert segments_of(tmp_path / "data") != []

    (manifest,) = preprocess(inputs, prefix, tokenizer_spec)

    assert (manifest["documents"], manifest["skipped"]) == (59_700, {"malformed": 300})


def stop_after_a_segment(progress: pipeline.TaskProgress) -> bool:
    if progress.segments:
        raise KeyboardInterrupt
    return True


def test_a_finished_dataset_is_no_reason_to_remove_the_work_of_another_run(
    unfinished: tuple[Path, list[str]], tokenizer_spec: str, tmp_path: Path
) -> None:
    prefix, corpus = unfinished
    whole = tmp_path / "whole"
    preprocess(corpus[:1], str(whole), tokenizer_spec)
    shutil.copytree(f"{prefix}.work", f"{whole}.work")  # of all of the corpus, with --overwrite say

    preprocess(corpus[:1], str(whole), tokenizer_spec)  # nothing to do

    assert len(list(Path(f"{whole}.work").glob("tasks/*/segment_*.json"))) > 8


def test_what_a_finished_run_left_is_removed_unless_somebody_works_there(
    unfinished: tuple[Path, list[str]], tokenizer_spec: str, tmp_path: Path
) -> None:
    prefix, corpus = unfinished
    whole = tmp_path / "whole"
    preprocess(corpus, str(whole), tokenizer_spec)
    shutil.copytree(f"{prefix}.work", f"{whole}.work")

    with FileLock(WorkFolder(str(whole)).lock_path):
        preprocess(corpus, str(whole), tokenizer_spec)
        assert Path(f"{whole}.work").exists()
    preprocess(corpus, str(whole), tokenizer_spec)

    assert not Path(f"{whole}.work").exists()


def test_tasks_that_are_whole_are_not_done_again(unfinished: tuple[Path, list[str]]) -> None:
    prefix, _ = unfinished
    folder = WorkFolder(str(prefix))
    before = {path: path.stat().st_mtime_ns for path in folder.path.glob("tasks/*/segment_*")}

    run_locally(str(prefix), 1, 0)

    assert {path: path.stat().st_mtime_ns for path in folder.path.glob("tasks/*/segment_*")} == before


def test_a_fault_while_the_tasks_are_followed_is_told_and_the_same_command_goes_on(
    corpus: list[str], tokenizer_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "data"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{prefix}.bin")

    with monkeypatch.context() as patch:
        patch.setattr("data_tools.assembling.IndexedDatasetWriter.append", full)
        with pytest.raises(DataError, match=r"data\.bin: No space left"):
            preprocess(corpus, str(prefix), tokenizer_spec)
    assert [path.name for path in tmp_path.iterdir()] == ["data.work"]

    assert finish((prefix, corpus), tokenizer_spec) == finish((tmp_path / "whole", corpus), tokenizer_spec)
