"""Training of tokenizers."""

import json
import math
import sysconfig
from pathlib import Path
from typing import Literal

import pytest

from data_tools.train_tokenizer import read_texts, train_tokenizer
from dsmoe_megatron.errors import DataError, TokenizerError
from dsmoe_megatron.tokenizers import load_tokenizer

SOURCES = [str(Path(sysconfig.get_path("stdlib"), "json"))]
Kind = Literal["sentencepiece", "huggingface"]
CODE = "def f(x):\n\tif x == 1234:\n        return  '中😀'  # \u00e9\r\n\n\n"


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_tokenizer_keeps_the_text_splits_digits_and_is_the_same_again(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "numbers.jsonl").write_text(json.dumps({"text": "1234 12 34\n" * 3000}))
    inputs = [*SOURCES, str(tmp_path / "numbers.jsonl")]
    specs = [train_tokenizer(inputs, str(tmp_path / name), 600, kind) for name in ("once", "again")]
    tokenizer, again = (load_tokenizer(str(spec)) for spec in specs)

    assert tokenizer.kind == kind
    assert tokenizer.fingerprint == again.fingerprint
    assert tokenizer.vocab_size == 600
    assert tokenizer.decode(tokenizer.encode(CODE)) == CODE
    assert len(tokenizer.encode("1234")) == 4
    assert len(tokenizer.encode("        ")) <= 2  # indentation is learned


def test_model_file_is_the_same_wherever_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_tokenizer(SOURCES, str(tmp_path / "here"), 600)
    monkeypatch.chdir(tmp_path)
    second = train_tokenizer(SOURCES, "folder/there", 600)

    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_vocabulary_that_the_input_cannot_fill_is_refused(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a few words only"}) + "\n")

    with pytest.raises(TokenizerError, match="5000"):
        train_tokenizer([str(tmp_path / "in.jsonl")], str(tmp_path / "tokenizer"), 5000, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_limit_is_shared_by_the_sources(tmp_path: Path) -> None:
    for name, documents in [("short", 1), ("long", 100), ("other", 100)]:
        lines = [json.dumps({"text": f"{name[0]}" * 1000}) for _ in range(documents)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    inputs = [str(tmp_path / f"{name}.jsonl") for name in ("short", "long", "other")]

    limited = list(read_texts(inputs, (), "text", max_megabytes=0.021))

    assert [text[0] for text in limited] == ["s"] + ["l"] * 10 + ["o"] * 10
    assert len(list(read_texts(inputs, (), "text", math.inf))) == 201


def test_input_without_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("not json\n")

    with pytest.raises(DataError, match="no document"):
        train_tokenizer([str(tmp_path / "in.jsonl")], str(tmp_path / "tokenizer"), 600)
