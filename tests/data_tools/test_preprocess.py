"""Preprocessing: what is in the dataset is the tokenised input, in order, and nothing half-written passes for whole."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_tools.documents import DocumentRules
from data_tools.preprocess import preprocess
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import load_tokenizer

SCRIPT = Path(__file__).parents[2] / "data_tools" / "preprocess.py"


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def documents_of(prefix: str) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


def expected_documents(texts: list[str], tokenizer_spec: str) -> list[list[int]]:
    tokenizer = load_tokenizer(tokenizer_spec)
    return [[*ids, tokenizer.end_of_document_id] for ids in tokenizer.encode_batch(texts)]


def run(
    tmp_path: Path, inputs: list[Any], tokenizer_spec: str, rules: DocumentRules | None = None, **options: Any
) -> tuple[list[list[int]], dict[str, Any]]:
    prefix = str(tmp_path / "data.v1")
    (manifest,) = preprocess([str(path) for path in inputs], prefix, tokenizer_spec, rules=rules, **options)
    assert json.loads(Path(f"{prefix}.manifest.json").read_text()) == manifest
    return documents_of(prefix), manifest


@pytest.mark.parametrize("workers", [1, 3])
def test_documents_are_the_input_in_order_for_any_number_of_workers(
    workers: int, texts: list[str], tokenizer_spec: str, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(texts))

    documents, manifest = run(tmp_path, [tmp_path / "in.jsonl"], tokenizer_spec, workers=workers)

    assert documents == expected_documents(texts, tokenizer_spec)
    assert manifest["documents"] == len(texts)
    assert manifest["tokens"] == sum(map(len, documents))
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["dtype"] == "uint16"
    for suffix, file in manifest["files"].items():
        content = (tmp_path / f"data.v1.{suffix}").read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_compressed_files_give_the_same_dataset(texts: list[str], tokenizer_spec: str, tmp_path: Path) -> None:
    some = texts[:60]
    first, second = jsonl(some[:30]), jsonl(some[30:])
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "plain.jsonl").write_bytes((first + second).removesuffix(b"\n"))  # the last line without its end
    # several streams one after the other, as parallel compressors and `cat` make them
    (tmp_path / "members.jsonl.gz").write_bytes(gzip.compress(first) + gzip.compress(second) + bytes(512))
    (tmp_path / "frames.jsonl.zst").write_bytes(pack(first) + pack(second))
    inputs = [tmp_path / name for name in ("plain.jsonl", "members.jsonl.gz", "frames.jsonl.zst")]

    documents, manifest = run(tmp_path, inputs, tokenizer_spec)

    assert documents == 3 * expected_documents(some, tokenizer_spec)
    assert [source["documents"] for source in manifest["sources"]] == [60, 60, 60]


def test_patterns_keep_their_order_and_name_each_file_once(tokenizer_spec: str, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl([f"document {name}"]))

    documents, _ = run(tmp_path, [tmp_path / "c.jsonl", tmp_path / "*.jsonl"], tokenizer_spec)

    assert documents == expected_documents(["document c", "document a", "document b"], tokenizer_spec)


def test_a_file_below_two_folders_is_read_once(tokenizer_spec: str, tmp_path: Path) -> None:
    for name in ("outer/one.py", "outer/inner/two.py", "outer/inner/deep/three.py"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {path.stem}\n")
    tree = tmp_path / "tree" / "outer"
    (tmp_path / "link").symlink_to(tree / "inner")
    inputs = [tree / "inner" / "deep", tree, tmp_path / "link", f"{tree}/**/"]

    documents, manifest = run(tmp_path, inputs, tokenizer_spec)

    assert documents == expected_documents(["# three\n", "# one\n", "# two\n"], tokenizer_spec)
    assert manifest["sources"][1]["skipped"] == {"reached_before": 1}


def test_windows_of_any_size_are_unpacked(tokenizer_spec: str, tmp_path: Path) -> None:
    longest = zstandard.ZstdCompressionParameters.from_level(3, window_log=31)
    pack = zstandard.ZstdCompressor(
        compression_params=longest
    ).compressobj()  # of unknown size: `zstd --long=31` on a pipe
    (tmp_path / "in.jsonl.zst").write_bytes(pack.compress(jsonl(["a document"])) + pack.flush())

    documents, _ = run(tmp_path, [tmp_path / "in.jsonl.zst"], tokenizer_spec)

    assert documents == expected_documents(["a document"], tokenizer_spec)


def test_source_tree_takes_text_files_of_the_extensions_in_sorted_order(tokenizer_spec: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    files = {
        "b.py": b"second = 2\n",
        "a.PY": b"\xef\xbb\xbffirst = 1\n",
        "sub/z.md": b"# third\n",
        "sub/latin.py": b"# caf\xe9\n",
        "sub/binary.py": b"x\x00y",
        "sub/empty.py": b"",
        "sub/made.py": b"# Code generated by a program. DO NOT EDIT.\nx = 1\n",
        "sub/table.py": b"x = [" + 400 * b"1, " + b"]\n",
        "sub/prose.md": 400 * b"a word " + b"\n",
        "sub/large.py": b"#" * 1_000_001,
        "sub/photo.png": b"\x89PNG",
        ".git/config.py": b"hidden = True\n",
    }
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / "sub" / "link.py").symlink_to(tree / "b.py")

    documents, manifest = run(tmp_path, [tree], tokenizer_spec, DocumentRules(extensions=(".py", ".md")))

    expected = {
        "a.PY": "first = 1\n",
        "b.py": "second = 2\n",
        "sub/latin.py": "# caf\N{REPLACEMENT CHARACTER}\n",
        "sub/prose.md": 400 * "a word " + "\n",
        "sub/z.md": "# third\n",
    }
    assert documents == expected_documents(list(expected.values()), tokenizer_spec)
    assert [json.loads(line) for line in (tmp_path / "data.v1.paths.jsonl").read_text().splitlines()] == list(expected)
    skipped = {"binary": 1, "empty": 1, "generated": 2, "too_large": 1, "other_extension": 1, "not_regular": 1}
    assert manifest["skipped"] == manifest["sources"][0]["skipped"] == skipped
    assert manifest["invalid_utf8_replaced"] == 1


def test_special_tokens_in_text_end_documents_only_when_parsed(tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["closes with </s>, he wrote"]))
    end = load_tokenizer(tokenizer_spec).end_of_document_id

    (ordinary,), _ = run(tmp_path, [tmp_path / "in.jsonl"], tokenizer_spec)
    (parsed,), manifest = run(
        tmp_path, [tmp_path / "in.jsonl"], tokenizer_spec, DocumentRules(special_tokens="parse"), overwrite=True
    )

    assert (ordinary.count(end), parsed.count(end)) == (1, 2)
    assert manifest["options"]["special_tokens"] == "parse"


def test_damaged_lines_are_counted_and_shown(
    tokenizer_spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "good " * 250_000  # more than a chunk
    lines = [
        jsonl([long]).strip(),
        b"",
        b'{"text": "cut',
        jsonl([long]).strip(),
        b'{"text": 7}',
        b'{"content": "x"}',
        b"[1]",
        b'{"text": ""}',
        b'{"text": "half \\ud83d pair"}',
        b'{"text": "caf\xe9"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))

    documents, manifest = run(tmp_path, [tmp_path / "in.jsonl"], tokenizer_spec, max_malformed=0.6)

    expected = [long, long, "half \N{REPLACEMENT CHARACTER} pair", "caf\N{REPLACEMENT CHARACTER}"]
    assert documents == expected_documents(expected, tokenizer_spec)
    assert manifest["skipped"] == {"malformed": 4, "empty": 1}
    assert manifest["invalid_utf8_replaced"] == 2
    shown = capsys.readouterr().err
    assert all(f"in.jsonl:{line}: " in shown for line in (3, 5, 6))
    assert "in.jsonl:7: " not in shown
    assert [complaint.split(": ")[0][-len("in.jsonl:3") :] for complaint in manifest["malformed_first"]] == [
        "in.jsonl:3",
        "in.jsonl:5",
        "in.jsonl:6",
    ]


@pytest.mark.parametrize("good", [50, 30_000])
def test_too_many_malformed_lines_stop_the_run(good: int, tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"oops\n" * (good // 50) + jsonl(["x"] * good))

    with pytest.raises(DataError, match=r"more than --max-malformed 0\.01; the first: .*in\.jsonl:1: not JSON"):
        run(tmp_path, [tmp_path / "in.jsonl"], tokenizer_spec)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "data.v1.work"}
    # the limit decides nothing about the content, so the run goes on under another one
    documents, _ = run(tmp_path, [tmp_path / "in.jsonl"], tokenizer_spec, max_malformed=0.1)
    assert len(documents) == good


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_cut_and_damaged_compressed_files_are_errors(suffix: str, tokenizer_spec: str, tmp_path: Path) -> None:
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    texts = [f"document {i}: {hashlib.sha256(bytes(i)).hexdigest()}" for i in range(8000)]  # more than is read at once
    whole = pack(jsonl(texts))
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 0xFF
    for content, message in [(whole[:-20], "ends too early"), (bytes(spoilt), "damaged")]:
        path = tmp_path / f"in.jsonl.{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"in\.jsonl\.{suffix}: .*{message}"):
            run(tmp_path, [path], tokenizer_spec)
        assert {file.name for file in tmp_path.iterdir()} == {path.name, "data.v1.work"}
        documents, manifest = run(tmp_path, [path], tokenizer_spec, DocumentRules(damaged_files="keep-readable"))
        assert 1000 < len(documents) <= len(texts)
        if message == "ends too early":  # a checksum at the end tells too late which bytes were wrong
            assert documents == expected_documents(texts[: len(documents)], tokenizer_spec)
        assert manifest["skipped"]["damaged_file"] == 1
        assert manifest["sources"][0]["sha256"] is None
        assert message in manifest["malformed_first"][0]
        for file in tmp_path.glob("data.v1.*"):
            file.unlink()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_damaged_file_is_counted_once_for_any_number_of_workers(
    workers: int, tokenizer_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.sources.SMALLEST_TASK", 1 << 16)  # parts of this size
    texts = [hashlib.sha256(bytes(i)).hexdigest() for i in range(10_000)]
    whole = bytearray(gzip.compress(jsonl(texts)))
    whole[70_000] ^= 0xFF
    (tmp_path / "in.jsonl.gz").write_bytes(whole)
    rules = DocumentRules(damaged_files="keep-readable")

    _, manifest = run(tmp_path, [tmp_path / "in.jsonl.gz"], tokenizer_spec, rules, workers=workers, max_malformed=0.5)

    assert manifest["skipped"]["damaged_file"] == 1
    assert len(set(manifest["malformed_first"])) == len(manifest["malformed_first"])


def test_inputs_that_give_nothing_are_errors(tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / "tree").mkdir()
    for name, message in [
        ("missing*.jsonl", "no such file"),
        ("notes.docx", "not a .jsonl"),
        ("empty.jsonl", "no document"),
        ("tree", "no document"),
    ]:
        with pytest.raises(DataError, match=message):
            run(tmp_path, [tmp_path / name], tokenizer_spec)


def test_whole_dataset_is_reused_and_another_is_never_replaced_unasked(
    tokenizer_spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(jsonl(["one"]))
    run(tmp_path, [source], tokenizer_spec)
    written = (tmp_path / "data.v1.bin").stat().st_mtime_ns
    capsys.readouterr()

    run(tmp_path, [source], tokenizer_spec, workers=2)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "data.v1.bin").stat().st_mtime_ns == written

    with pytest.raises(DataError, match=r"other options.*--overwrite"):
        run(tmp_path, [source], tokenizer_spec, DocumentRules(special_tokens="parse"))
    source.write_bytes(jsonl(["two"]))
    with pytest.raises(DataError, match=r"other input.*--overwrite"):
        run(tmp_path, [source], tokenizer_spec)
    documents, _ = run(tmp_path, [source], tokenizer_spec, overwrite=True)
    assert documents == expected_documents(["two"], tokenizer_spec)

    os.truncate(tmp_path / "data.v1.bin", 2)
    with pytest.raises(DataError, match=r"data\.v1\.bin is not"):
        run(tmp_path, [source], tokenizer_spec)
    (tmp_path / "data.v1.manifest.json").unlink()
    with pytest.raises(DataError, match="may be unfinished"):
        run(tmp_path, [source], tokenizer_spec)


def test_ids_of_a_large_vocabulary_are_int32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "words")
    (tmp_path / "in.jsonl").write_bytes(jsonl(["w1 w69999", "w65536"]))

    documents, manifest = run(tmp_path, [tmp_path / "in.jsonl"], str(tmp_path / "words"))

    assert manifest["dtype"] == "int32"
    assert documents == [[1, 69_999, 70_000], [65_536, 70_000]]
    assert (tmp_path / "data.v1.bin").read_bytes() == np.array([1, 69_999, 70_000, 65_536, 70_000], "<i4").tobytes()


def test_command_line_prints_one_line_for_bad_input(tokenizer_spec: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--input", "nowhere.jsonl", "--output-prefix", str(tmp_path / "data")]

    done = subprocess.run([*command, "--tokenizer", tokenizer_spec], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr == "preprocess: error: --input nowhere.jsonl: no such file or folder\n"
