"""The example of cleaning drops copies, near copies and evaluation texts, and nothing else."""

import gzip
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_tools.documents import DocumentRules, read_documents
from data_tools.sources import find_sources

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "clean_corpus.py"
QUESTION = "Which of the seven wizards brews a potion in the tower at night"
ANSWER = "the one with the longest beard"
RULES = DocumentRules(sets=("Code",), set_key="meta.pile_set_name")


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """Real modules, none of which is like another."""
    paths = sorted((Path(sysconfig.get_path("stdlib")) / "asyncio").glob("*.py"))
    texts = [path.read_text(encoding="utf-8")[:6000] for path in paths]
    return [{"text": text, "meta": {"pile_set_name": "Code"}} for text in texts if len(text) > 3000]


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ((QUESTION, ANSWER), ("1", "2")))
    )
    return path


def packed(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def run(evaluation: Path, output: Path, *inputs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--evaluation", evaluation, "--output", output, "--input", *inputs]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def texts_in(folder: Path) -> list[str]:
    """As preprocess.py reads them, whose rules need the set's name where it was in the input."""
    return [text for found in read_documents(find_sources([f"{folder}/*"]), RULES) for text in found.texts]


def test_copies_and_evaluation_texts_go_and_all_else_stays(
    tmp_path: Path, evaluation: Path, records: list[dict[str, Any]]
) -> None:
    near = records[3] | {"text": records[3]["text"].replace("the", "thee", 1)}
    across = f"{QUESTION.upper()}?\n\n{ANSWER}"  # a run of 13 words may begin in the question and end in the answer
    quoting = records[-1] | {"text": f"{records[-1]['text'][:500]} {across[20:]} and more"}
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(packed(records)))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(packed([records[0], near, quoting, records[0]])))

    done = run(evaluation, tmp_path / "cleaned", tmp_path / "b.jsonl.zst", tmp_path / "a.jsonl.gz")

    assert done.returncode == 0, done.stderr
    *notes, last = done.stdout.splitlines()
    assert last == f"read: {len(records) + 4}, duplicates: 3, contaminated: 1, kept: {len(records)}"
    assert notes == [f"{evaluation}: shorter than 13 words, cannot be found: 1 2"]
    kept = texts_in(tmp_path / "cleaned" / "kept")
    assert [records[3]["text"] if text == near["text"] else text for text in kept] == [r["text"] for r in records]
    assert sorted(texts_in(tmp_path / "cleaned" / "duplicates")) == sorted(
        [records[0]["text"]] * 2 + [{records[3]["text"], near["text"]}.difference(kept).pop()]
    )
    assert texts_in(tmp_path / "cleaned" / "contaminated") == [quoting["text"]]
    assert "exists already" in run(evaluation, tmp_path / "cleaned", tmp_path / "b.jsonl.zst").stderr


def test_input_that_cannot_be_read_to_its_end_is_refused(
    tmp_path: Path, evaluation: Path, records: list[dict[str, Any]]
) -> None:
    content = packed(records)
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content)[:-500])
    (tmp_path / "latin.jsonl").write_bytes(content.replace(b"coroutine", b"corout\xefne", 1) * 20)

    cut = run(evaluation, tmp_path / "cleaned", tmp_path / "cut.jsonl.zst")
    latin = run(evaluation, tmp_path / "cleaned", tmp_path / "latin.jsonl")

    assert "the compressed data ends too early" in cut.stderr.splitlines()[-1]
    assert "datatrove read" in latin.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl.zst", "latin.jsonl", "questions.jsonl"]
