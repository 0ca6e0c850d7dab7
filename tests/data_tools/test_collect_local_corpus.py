"""The corpus that every machine has."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_tools.collect_local_corpus import Collection, Document, collect
from data_tools.documents import DocumentRules, read_documents
from data_tools.sources import find_sources
from dsmoe_megatron.errors import DataError

SPLITS = [(kind, split) for kind in ("text", "code") for split in ("train", "validation")]


def read_records(path: Path) -> list[dict[str, Any]]:
    content = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read()
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    collect(str(folder), text_megabytes=1.0, code_megabytes=1.5)
    return folder


def test_splits_are_there_of_the_asked_size_and_share_no_document(corpus: Path) -> None:
    records = {pair: read_records(corpus / pair[0] / f"{pair[1]}.jsonl.zst") for pair in SPLITS}
    for kind, megabytes in (("text", 1.0), ("code", 1.5)):
        texts = [record["text"] for split in ("train", "validation") for record in records[kind, split]]
        assert megabytes * 1e6 <= sum(len(text.encode()) for text in texts) < (megabytes + 1) * 1e6
        words = [" ".join(text.split()) for text in texts]
        assert len(set(words)) == len(words)
        assert len(records[kind, "train"]) > 5 * len(records[kind, "validation"]) > 0
    assert all(record["source"] and record["license"] for split in records.values() for record in split)
    assert not any(record["source"].startswith("/") for split in records.values() for record in split)


def test_code_is_python_and_text_is_prose(corpus: Path) -> None:
    for record in read_records(corpus / "code" / "train.jsonl.zst"):
        ast.parse(record["text"])
    splits = [read_records(corpus / "text" / f"{split}.jsonl.zst") for split in ("train", "validation")]
    sources = [record["source"] for records in splits for record in records]
    assert "pydoc_data/topics/lambda" in sources
    assert any(source.endswith("/description") for source in sources)


def test_the_data_tools_read_it_whole(corpus: Path) -> None:
    described = json.loads((corpus / "corpus.json").read_text())["files"]
    for name, file in described.items():
        sources = find_sources([str(corpus / name)])
        texts = [text for found in read_documents(sources, DocumentRules()) for text in found.texts]
        assert len(texts) == file["documents"]
        assert sum(len(text.encode()) for text in texts) == file["text_bytes"]


def test_it_is_collected_once_and_the_same_again(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()}

    collect(str(corpus), text_megabytes=1.0, code_megabytes=1.5)
    assert "nothing to do" in capsys.readouterr().out
    collect(str(corpus), text_megabytes=1.0, code_megabytes=1.5, overwrite=True)

    assert {path: path.read_bytes() for path in corpus.rglob("*") if path.is_file()} == before


def test_documentation_goes_where_its_code_goes_and_copies_are_dropped() -> None:
    modules = [Document(f"code of module {i}", f"m{i}.py", "x") for i in range(300)]
    strings = [
        Document(f"documentation {i}", f"m{i}.py#documentation", "x", family=modules[i].text) for i in range(300)
    ]
    copies = [Document(f"code of\n  module {i}\nCopyright (c) somebody", "copy", "y") for i in range(300)]
    code, text = Collection(budget=1e6), Collection(budget=1e6)
    code.take("code", modules)
    code.take("copies", copies)
    text.take("documentation", strings)

    validation_of = {
        name: {document.source.split("#")[0] for document in collection.splits()["validation"]}
        for name, collection in (("code", code), ("text", text))
    }

    assert code.groups["copies"]["documents"] == 0
    assert code.duplicates == 300
    assert validation_of["code"] == validation_of["text"]
    assert 1 <= len(validation_of["code"]) <= 25


def test_a_corpus_too_small_to_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="megabytes"):
        collect(str(tmp_path), text_megabytes=0.000001, code_megabytes=1)
