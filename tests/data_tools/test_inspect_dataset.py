"""What is told of a dataset against the documents that it was made of."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.inspect_dataset import inspect_dataset
from data_tools.preprocess import preprocess
from dsmoe_megatron.errors import DataError, TokenizerError
from dsmoe_megatron.tokenizers import load_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "inspect_dataset.py"


@pytest.fixture(scope="module")
def documents(texts: list[str]) -> list[str]:
    return texts[:120]


@pytest.fixture(scope="module")
def prefix(documents: list[str], tokenizer_spec: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    preprocess([str(folder / "in.jsonl")], str(folder / "data"), tokenizer_spec)
    return str(folder / "data")


@pytest.fixture(scope="module")
def lengths(documents: list[str], tokenizer_spec: str) -> list[int]:
    return [len(ids) + 1 for ids in load_tokenizer(tokenizer_spec).encode_batch(documents)]


def test_figures_are_those_of_the_documents(
    prefix: str, documents: list[str], lengths: list[int], tokenizer_spec: str
) -> None:
    report = "\n".join(inspect_dataset(prefix, documents=0))

    text_bytes = sum(len(text.encode()) for text in documents)
    assert f"{prefix}: 120 documents, {sum(lengths):,} tokens of uint16\n" in report
    assert f"{text_bytes:,} bytes of text, {text_bytes / sum(lengths):.2f} per token" in report
    assert f"tokenizer {tokenizer_spec}: 2,000 ids" in report
    ordered = sorted(lengths)
    assert f"shortest {ordered[0]:,}  " in report
    assert f"median {ordered[59]:,}  " in report
    assert f"95 % {ordered[113]:,}  longest {ordered[-1]:,}\n" in report
    longest = max(range(120), key=lengths.__getitem__)
    assert f"longest: document {longest} ({lengths[longest]:,})" in report
    assert "---" not in report


def test_histogram_counts_every_document_once(prefix: str, lengths: list[int]) -> None:
    rows = [
        [int(number.replace(",", "")) for number in match]
        for line in inspect_dataset(prefix, documents=0)
        for match in re.findall(r"^ *([\d,]+) to ([\d,]+)  #* +([\d,]+)$", line)
    ]

    assert [count for *_, count in rows] == [sum(low <= length <= high for length in lengths) for low, high, _ in rows]
    assert sum(count for *_, count in rows) == 120
    assert len(rows) > 3


def test_documents_are_shown_with_their_numbers(prefix: str, documents: list[str], lengths: list[int]) -> None:
    short = next(i for i in range(10, 120) if documents[i].isascii() and "\n" in documents[i] and lengths[i] < 300)
    lines = list(inspect_dataset(prefix, documents=1, start=short))

    assert lines[-2:] == [f"\n--- document {short}: {lengths[short]:,} tokens", documents[short]]
    shown = [line for line in inspect_dataset(prefix, documents=5, start=118) if "--- document" in line]
    assert [re.findall(r"\d+", line)[0] for line in shown] == ["118", "119"]
    with pytest.raises(DataError, match=r"--start 120: .* has documents 0 to 119"):
        list(inspect_dataset(prefix, start=120))


def test_a_long_document_is_cut_and_nothing_steers_the_terminal(tokenizer_spec: str, tmp_path: Path) -> None:
    texts = ["a" * 5000 + "the end", "red \x1b[31m \r bell \x07 tab\there\nnew \u202e line"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec)

    *_, long, _, strange = inspect_dataset(str(tmp_path / "data"))

    assert long == "a" * 1000 + "\n[... 3,007 characters ...]\n" + "a" * 993 + "the end"
    assert strange == r"red \x1b[31m \r bell \x07 tab" + "\there\n" + r"new \u202e line"


def test_without_a_tokenizer_ids_are_shown_and_the_reason_said(
    prefix: str, documents: list[str], tokenizer_spec: str, tmp_path: Path
) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"data.{suffix}")
    bare = str(tmp_path / "data")
    tokenizer = load_tokenizer(tokenizer_spec)
    ids = [*tokenizer.encode(documents[1]), tokenizer.end_of_document_id]

    report = list(inspect_dataset(bare, documents=1, start=1))
    assert report[-1] == " ".join(map(str, ids))
    assert any("no manifest, so only ids are shown" in line for line in report)
    assert not any("bytes of text" in line and "per token" in line for line in report)
    assert list(inspect_dataset(bare, documents=1, start=2, tokenizer_spec=tokenizer_spec))[-1] == documents[2]

    shutil.copy(tokenizer_spec, tmp_path / "moved.model")
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "word " * 400}) + "\n")
    preprocess([str(tmp_path / "in.jsonl")], bare, str(tmp_path / "moved.model"), overwrite=True)
    (tmp_path / "moved.model").unlink()
    report = list(inspect_dataset(bare))
    assert any("only ids are shown" in line and "moved.model: No such file" in line for line in report)
    assert re.fullmatch(r"(\d+ ){100}\[\.\.\. [\d,]+ ids \.\.\.\]( \d+){100}", report[-1])
    with pytest.raises(TokenizerError, match="nowhere"):
        list(inspect_dataset(bare, tokenizer_spec="nowhere.model"))


def test_ids_that_no_tokenizer_has_are_shown_as_they_are(prefix: str, lengths: list[int], tmp_path: Path) -> None:
    for suffix in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"data.{suffix}")
    ids = np.memmap(tmp_path / "data.bin", np.uint16, mode="r+")
    ids[0] = 60_000
    ids.flush()

    last = list(inspect_dataset(str(tmp_path / "data"), documents=1))[-1]

    assert last.startswith("damaged: ids that the tokenizer does not have, see verify.py\n60000 ")
    assert len(last.splitlines()[1].split()) == lengths[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not a Megatron dataset index"),
        (b"MMIDIDX\x00\x00" + bytes(25), "version 0"),
        (b"x" * 50, "not a Megatron dataset index"),
    ],
)
def test_what_is_no_dataset_is_one_clear_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "data.idx").write_bytes(content)
        (tmp_path / "data.bin").write_bytes(b"")

    command = [sys.executable, str(SCRIPT), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith(f"inspect_dataset: error: {tmp_path}/data.idx")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
