"""Sets of The Pile, long documents, inputs from elsewhere: what the rules say is what is in the datasets."""

import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.dataset_reader import map_tokens, read_index
from data_tools.documents import DocumentRules, split_text
from data_tools.preprocess import preprocess
from data_tools.verify import verify
from dsmoe_megatron.config import DatasetSource
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import load_tokenizer
from dsmoe_megatron.training.data import check_datasets

SETS = ("Pile-CC", "Github", "Wikipedia (en)")
FOLDER_OF_SET = {"Pile-CC": "data_Pile-CC", "Github": "data_Github", "Wikipedia (en)": "data_Wikipedia-en"}


@pytest.fixture
def pile(texts: list[str], tmp_path: Path) -> list[tuple[str, str]]:
    """Documents of three sets in one file, as The Pile has them; their set and text."""
    documents = [(SETS[number % 7 % 3], text) for number, text in enumerate(texts[:200])]
    lines = [{"text": text, "meta": {"pile_set_name": name}} for name, text in documents]
    (tmp_path / "pile.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return documents


def texts_of(prefix: Path, tokenizer_spec: str) -> list[str]:
    tokenizer, index = load_tokenizer(tokenizer_spec), read_index(str(prefix))
    tokens = map_tokens(str(prefix), index.dtype)
    return [tokenizer.decode(index.document(tokens, number)[:-1].tolist()) for number in range(len(index))]


def test_each_set_becomes_a_dataset(pile: list[tuple[str, str]], tokenizer_spec: str, tmp_path: Path) -> None:
    rules = DocumentRules(one_dataset_per_set=True)

    manifests = preprocess([str(tmp_path / "pile.jsonl")], str(tmp_path / "data"), tokenizer_spec, 2, rules)

    by_set = {manifest["set"]: manifest for manifest in manifests}
    assert set(by_set) == set(SETS)
    for name, manifest in by_set.items():
        prefix = tmp_path / FOLDER_OF_SET[name]
        expected = [text for of, text in pile if of == name]
        assert texts_of(prefix, tokenizer_spec) == expected
        assert manifest["skipped"] == {"other_set": len(pile) - len(expected)}
        assert verify(str(prefix)).faults == []
    # and it is made once
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("data_*")}
    again = preprocess([str(tmp_path / "pile.jsonl")], str(tmp_path / "data"), tokenizer_spec, 1, rules)
    assert {manifest["set"] for manifest in again} == set(SETS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("data_*")} == written


def test_a_lost_set_is_made_again_and_a_cut_one_said(
    pile: list[tuple[str, str]], tokenizer_spec: str, tmp_path: Path
) -> None:
    rules, lost = DocumentRules(one_dataset_per_set=True), FOLDER_OF_SET[SETS[1]]
    arguments = ([str(tmp_path / "pile.jsonl")], str(tmp_path / "data"), tokenizer_spec, 1, rules)
    preprocess(*arguments)
    for path in tmp_path.glob(f"{lost}.*"):
        path.unlink()

    again = preprocess(*arguments)

    assert {manifest["set"] for manifest in again} == set(SETS)
    assert texts_of(tmp_path / lost, tokenizer_spec) == [text for name, text in pile if name == SETS[1]]
    (tmp_path / f"{lost}.bin").write_bytes(b"")
    with pytest.raises(DataError, match=rf"{lost}\.bin is not the \d+ bytes that"):
        preprocess(*arguments)


def test_each_set_counts_what_was_done_to_its_own_documents(tokenizer_spec: str, tmp_path: Path) -> None:
    lines = [
        '{"text": "half \\ud83d pair", "meta": {"pile_set_name": "Github"}}',
        json.dumps({"text": "a line\n" * 100, "meta": {"pile_set_name": "ArXiv"}}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    rules = DocumentRules(one_dataset_per_set=True, max_document_bytes=300)

    manifests = preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec, rules=rules)

    counts = {made["set"]: (made["invalid_utf8_replaced"], made["long_documents_split"]) for made in manifests}
    assert counts == {"Github": (1, 0), "ArXiv": (0, 2)}


def test_some_sets_become_one_dataset(pile: list[tuple[str, str]], tokenizer_spec: str, tmp_path: Path) -> None:
    wanted = ("Github", "Pile-CC")
    rules = DocumentRules(sets=wanted)

    (manifest,) = preprocess([str(tmp_path / "pile.jsonl")], str(tmp_path / "data"), tokenizer_spec, rules=rules)

    assert texts_of(tmp_path / "data", tokenizer_spec) == [text for name, text in pile if name in wanted]
    assert manifest["skipped"] == {"other_set": sum(name not in wanted for name, _ in pile)}


def test_a_document_without_the_name_of_a_set_is_malformed(tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "meta": {"pile_set_name": "Github"}}\n{"text": "b", "meta": 3}\n')

    with pytest.raises(DataError, match=r"in\.jsonl:2: no name of a set under 'meta\.pile_set_name'; see --set-key"):
        preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec, rules=DocumentRules(sets=SETS))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), limit=st.integers(4, 20))
def test_a_long_text_is_cut_into_parts_that_are_the_text(text: str, limit: int) -> None:
    parts = list(split_text(text, limit))

    assert "".join(parts) == text
    assert all(len(part.encode()) <= limit for part in parts)
    for part, following in itertools.pairwise(parts):
        # a line is cut only where it is longer than a part
        assert part.endswith("\n") or "\n" not in part or len(following) == 0


def test_long_documents_are_split_or_left_out(tokenizer_spec: str, tmp_path: Path) -> None:
    long = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("short", long)))
    inputs = [str(tmp_path / "in.jsonl")]

    (split,) = preprocess(inputs, str(tmp_path / "split"), tokenizer_spec, rules=DocumentRules(max_document_bytes=300))
    (skipped,) = preprocess(
        inputs,
        str(tmp_path / "skipped"),
        tokenizer_spec,
        rules=DocumentRules(max_document_bytes=300, long_documents="skip"),
    )

    found = texts_of(tmp_path / "split", tokenizer_spec)
    assert found[0] == "short"
    assert "".join(found[1:]) == long
    assert split["long_documents_split"] == len(found) - 2 > 0
    assert texts_of(tmp_path / "skipped", tokenizer_spec) == ["short"]
    assert skipped["skipped"] == {"too_long": 1}


def test_training_that_separates_documents_needs_their_ends(tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    tokenizer = load_tokenizer(tokenizer_spec)
    for end in ("append", "none", "<pad>"):
        rules = DocumentRules(end_of_document=end)
        preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / end), tokenizer_spec, rules=rules)

    check_datasets([DatasetSource(str(tmp_path / end)) for end in ("append", "none", "<pad>")], tokenizer)
    check_datasets([DatasetSource(str(tmp_path / "append"))], tokenizer, separate_documents=True)

    for end in ("none", "<pad>"):
        with pytest.raises(DataError, match=rf"{end}: its documents do not end with token 2, .*separate_documents"):
            check_datasets([DatasetSource(str(tmp_path / end))], tokenizer, separate_documents=True)


def test_parquet_gives_the_dataset_of_the_same_lines(texts: list[str], tokenizer_spec: str, tmp_path: Path) -> None:
    some = texts[:100]
    pa.parquet.write_table(pa.table({"content": some, "size": [0] * 100}), tmp_path / "in.parquet", row_group_size=30)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in some))

    for name in ("in.parquet", "in.jsonl"):
        rules = DocumentRules(text_key="content")
        preprocess([str(tmp_path / name)], str(tmp_path / name.replace(".", "_")), tokenizer_spec, rules=rules)

    assert (tmp_path / "in_parquet.bin").read_bytes() == (tmp_path / "in_jsonl.bin").read_bytes()
    with pytest.raises(DataError, match=r"in\.parquet: no column 'text' \(columns: content, size\); see --text-key"):
        preprocess([str(tmp_path / "in.parquet")], str(tmp_path / "no"), tokenizer_spec)


def test_a_dataset_in_the_hubs_layout(
    texts: list[str], tokenizer_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    some = texts[:60]
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for shard in range(3):
        table = pa.table({"text": some[shard * 20 : shard * 20 + 20]})
        pa.parquet.write_table(table, folder / f"train-0000{shard}-of-00003.parquet")

    (manifest,) = preprocess([f"hf:{tmp_path / 'hub'}"], str(tmp_path / "data"), tokenizer_spec, workers=2)

    assert texts_of(tmp_path / "data", tokenizer_spec) == some
    assert manifest["sources"][0]["kind"] == "hub"
    with pytest.raises(DataError, match=r"--input hf:.*:other.*: no such dataset"):
        preprocess([f"hf:{tmp_path / 'hub'}::other"], str(tmp_path / "no"), tokenizer_spec)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An HTTP server of the folder `remote`."""
    (tmp_path / "remote").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Quiet(*arguments, directory=str(tmp_path / "remote"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_files_on_another_machine(texts: list[str], tokenizer_spec: str, server: str, tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts[:100])
    (tmp_path / "remote" / "in.jsonl").write_text(content)
    (tmp_path / "in.jsonl").write_text(content)

    (manifest,) = preprocess([f"{server}/in.jsonl"], str(tmp_path / "remote_data"), tokenizer_spec, workers=2)
    (local,) = preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec)

    assert (tmp_path / "remote_data.bin").read_bytes() == (tmp_path / "data.bin").read_bytes()
    assert manifest["sources"][0]["sha256"] == local["sources"][0]["sha256"]
    with pytest.raises(DataError, match=rf"--input {server}/missing\.jsonl: no such file"):
        preprocess([f"{server}/missing.jsonl"], str(tmp_path / "no"), tokenizer_spec)


def test_a_file_protocol_with_a_pattern(texts: list[str], tokenizer_spec: str, tmp_path: Path) -> None:
    for name, some in {"a": texts[:10], "b": texts[10:30]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))

    preprocess([f"file://{tmp_path}/*.jsonl"], str(tmp_path / "data"), tokenizer_spec)

    assert texts_of(tmp_path / "data", tokenizer_spec) == texts[:30]
    assert np.array_equal(read_index(str(tmp_path / "data")).document_indices, np.arange(31))
