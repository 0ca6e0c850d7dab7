"""Places that cannot be read or written, names of any bytes, and tokenizers that are broken: one line each."""

import glob
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data_tools.documents import DocumentRules
from data_tools.indexed_dataset import token_dtype
from data_tools.opening import UnreadableInputError
from data_tools.preprocess import preprocess
from data_tools.reading import Columns, Digest, read_piece
from data_tools.sources import cut_tasks, find_sources
from dsmoe_megatron.errors import DataError, TokenizerError
from dsmoe_megatron.tokenizers import load_tokenizer, save_huggingface

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "preprocess.py"


def test_links_pipes_and_sockets_are_neither_followed_nor_waited_for(tokenizer_spec: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "a.jsonl").write_text('{"text": "once"}\n')
    (tree / "sub" / "b.py").write_text("x = 1\n")
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "dangling.py").symlink_to(tree / "nowhere")
    os.mkfifo(tree / "pipe.py")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "socket.py"))

    (of_tree,) = preprocess(
        [str(tree)], str(tmp_path / "tree_data"), tokenizer_spec, rules=DocumentRules(extensions=(".py",))
    )
    (of_pattern,) = preprocess([f"{tree}/**/*.jsonl"], str(tmp_path / "pattern_data"), tokenizer_spec)

    assert (of_tree["documents"], of_tree["skipped"]) == (1, {"not_regular": 3, "other_extension": 1})
    assert of_pattern["documents"] == 1
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jsonl"))
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    for name, message in {
        "pipe.jsonl": "not a regular file", "socket.jsonl": "not a regular file", "dangling.jsonl": "No such file",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=rf"--input .*/{name}: {message}"):
            preprocess([str(tmp_path / name)], str(tmp_path / "no"), tokenizer_spec)


def test_links_that_lead_back_up_are_followed_once(tokenizer_spec: str, tmp_path: Path) -> None:
    below = tmp_path / "tree" / "below"
    below.mkdir(parents=True)
    (below / "a.jsonl").write_text('{"text": "once"}\n')
    for name in ("one", "two"):  # with two there are 2^40 ways
        (below / name).symlink_to("..")
    command = [sys.executable, str(SCRIPT), "--input", f"{tmp_path}/tree/**/*.jsonl"]
    command += ["--output-prefix", str(tmp_path / "data"), "--tokenizer", tokenizer_spec]

    subprocess.run(command, check=True, timeout=60)

    assert json.loads((tmp_path / "data.manifest.json").read_text())["documents"] == 1


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "**", "a/**/*.jsonl", "**/b/*", "*/**/b/**/*.jsonl", "./**/[ab]/"])
def test_a_pattern_names_what_glob_finds(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.jsonl", "a/x.jsonl", "a/b/y.jsonl", "a/b/[c]/z.jsonl", "b/x.jsonl", ".hidden/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "link").symlink_to("a/b")
    monkeypatch.chdir(tmp_path)
    for start in ("", f"{glob.escape(str(tmp_path))}/"):
        found = sorted(glob.glob(start + pattern, recursive=True))  # noqa: PTH207  # what it is held against
        real = list(dict.fromkeys(map(os.path.realpath, found)))
        assert [os.path.realpath(source.path) for source in find_sources([start + pattern])] == real


@contextmanager
def nobody() -> Iterator[None]:
    """Without the rights of root, whom nothing is forbidden."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_the_system_refuses_to_name_is_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "tree" / "closed"
    closed.mkdir(parents=True)
    (closed / "in.jsonl").write_text('{"text": "x"}\n')
    patterns = {closed / "in.jsonl": "Permission denied", tmp_path / ("a" * 300): "File name too long"}
    patterns |= {tmp_path / "tree" / "**" / "*.jsonl": "Permission denied", tmp_path / "tree": "Permission denied"}
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    closed.chmod(0)
    with nobody():
        for pattern, message in patterns.items():
            with pytest.raises(DataError, match=rf"--input {re.escape(str(tmp_path))}.*: {message}"):
                find_sources([str(pattern)])
    closed.chmod(0o755)


def test_a_file_that_cannot_be_read_is_named_or_counted(tokenizer_spec: str, small_disk: Path, tmp_path: Path) -> None:
    for name in "abc":
        (small_disk / f"{name}.py").write_text(f"{name} = 1\n")
    refusing = f"/proc/{os.getpid()}/mem"  # a regular file to look at; no byte of its beginning can be read
    subprocess.run(["mount", "--bind", refusing, str(small_disk / "b.py")], check=True)
    try:
        with pytest.raises(DataError, match=r"disk/b\.py: Input/output error, or see --damaged-files"):
            preprocess([str(small_disk)], str(tmp_path / "data"), tokenizer_spec)
        rules = DocumentRules(damaged_files="keep-readable")
        (manifest,) = preprocess([str(small_disk)], str(tmp_path / "kept"), tokenizer_spec, rules=rules)
    finally:
        subprocess.run(["umount", str(small_disk / "b.py")], check=True)

    assert manifest["skipped"] == {"damaged_file": 1}
    assert manifest["documents"] == 2


def test_names_of_files_may_be_any_bytes(tokenizer_spec: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    names = [b"line\nend.py", b"latin\xe9.py", b"a b\t.py"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tree) + b"/" + name)).write_text(f"x = {name!r}\n")

    (manifest,) = preprocess([str(tree)], str(tmp_path / "data"), tokenizer_spec)

    kept = [json.loads(line) for line in (tmp_path / "data.paths.jsonl").read_text().splitlines()]
    assert sorted(os.fsencode(name) for name in kept) == sorted(names)
    assert manifest["documents"] == 3


def test_paths_that_are_no_utf8_may_be_anywhere(tokenizer_spec: str, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "in.jsonl").write_text('{"text": "x"}\n')
    shutil.copy(tokenizer_spec, folder / "small.model")
    command = [sys.executable, str(SCRIPT), "--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "out")]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}

    done = subprocess.run(
        [*command, "--tokenizer", str(folder / "small.model")], env=strict, capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert os.fsencode(folder / "out") + b": 1 documents" in done.stdout
    assert json.loads((folder / "out.manifest.json").read_text())["documents"] == 1


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in "abc":
        (tree / f"{name}.py").write_text(f"{name} = 1\n")
    tasks = cut_tasks(find_sources([str(tree)]), workers=1)
    (tree / "b.py").unlink()
    read: list[bytes] = []

    with pytest.raises(UnreadableInputError, match=r"tree/b\.py: No such file"):
        read.extend(record for chunk in read_piece(tasks[0][0], Columns(), Digest()) for record in chunk.records)

    assert read == [b"a = 1\n"]


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    texts: list[str], tokenizer_spec: str, small_disk: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prefix = str(small_disk / "data")
    (small_disk / "other").write_bytes(bytes(4_500_000))
    with pytest.raises(DataError, match=r"No space left on device"):
        preprocess([str(tmp_path / "in.jsonl")], prefix, tokenizer_spec, workers=2)
    assert not Path(f"{prefix}.manifest.json").exists()
    assert not Path(f"{prefix}.bin").exists()

    (small_disk / "other").unlink()
    preprocess([str(tmp_path / "in.jsonl")], prefix, tokenizer_spec, workers=2)

    preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "whole"), tokenizer_spec)
    for suffix in ("bin", "idx"):
        assert Path(f"{prefix}.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_an_output_that_cannot_be_written_is_named(tokenizer_spec: str, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "file").write_text("")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for prefix, message in (
        (small_disk / "data", r"disk/data\.work: Read-only file system"),
        (tmp_path / "file" / "data", r"file/data\.work: Not a directory"),
    ):
        with pytest.raises(DataError, match=message):
            preprocess([str(tmp_path / "in.jsonl")], str(prefix), tokenizer_spec)


def test_ids_with_holes_decide_the_dtype_by_the_largest(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "far": 70_000}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "words")
    (tmp_path / "in.jsonl").write_text('{"text": "one far"}\n')

    (manifest,) = preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), str(tmp_path / "words"))

    assert manifest["dtype"] == "int32"
    assert np.fromfile(tmp_path / "data.bin", np.int32).tolist() == [1, 70_000, 3]


def test_ids_above_all_dtypes_are_refused() -> None:
    assert token_dtype(2**31).name == "int32"
    with pytest.raises(
        DataError, match="the tokenizer has ids up to 2147483648: a dataset holds none above 2147483647"
    ):
        token_dtype(2**31 + 1)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named(name: str, tokenizer_spec: str, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    save_huggingface(load_tokenizer(tokenizer_spec), folder)
    content = (folder / name).read_text()
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n')
    for broken in (content[: len(content) // 2], "", "[]", "\0"):
        (folder / name).write_text(broken)
        with pytest.raises(
            TokenizerError, match=r"tokenizer .*/broken: the folder gives no Hugging Face tokenizer \(.*\)$"
        ):
            preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), str(folder))


def test_the_command_line_ends_in_one_line_and_status_1(tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "good"}\n{"text": "caf\xe9"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n')[:-3])
    faults = {
        "latin.jsonl": f"{tmp_path}/latin.jsonl:2: not valid UTF-8: mend it, or see --invalid-utf8",
        "cut.jsonl.gz": f"{tmp_path}/cut.jsonl.gz: the compressed data ends too early, at byte 31:"
        " fetch the file again, or see --damaged-files",
    }
    for name, message in faults.items():
        command = [sys.executable, str(SCRIPT), "--input", str(tmp_path / name), "--tokenizer", tokenizer_spec]
        command += ["--output-prefix", str(tmp_path / "data"), "--invalid-utf8", "stop"]

        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

        assert (done.returncode, done.stderr) == (1, f"preprocess: error: {message}\n")
