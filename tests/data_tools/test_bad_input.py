"""Bad content is refused in one line that names the file, or read as an independent reader reads it. No traceback."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data_tools.documents import DocumentRules, extract_documents
from data_tools.opening import UnreadableInputError
from data_tools.preprocess import preprocess
from data_tools.reading import Columns, Digest, read_piece
from data_tools.sources import cut_tasks, find_sources
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import load_tokenizer
from tests.random_damage import (
    KINDS,
    NASTY_LINES,
    NOT_THE_COLUMN,
    REPLACEMENT,
    parquet_of,
    read_lines_independently,
    texts_of,
    try_many,
)

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "preprocess.py"


def test_random_damage_is_refused_or_read_as_it_is_stored(tokenizer_spec: str) -> None:
    outcomes = try_many(inputs=600, seed=0, tokenizer_spec=tokenizer_spec)

    assert {outcome for counts in outcomes.values() for outcome in counts} - {NOT_THE_COLUMN} == {"accepted", "refused"}
    assert all(counts["accepted"] > 10 for counts in outcomes.values())


def test_every_nasty_line_is_read_or_counted(tokenizer_spec: str, tmp_path: Path) -> None:
    content = b"\n".join(NASTY_LINES)
    (tmp_path / "in.jsonl").write_bytes(content)
    texts, malformed, empty = read_lines_independently(content)

    (manifest,) = preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec, max_malformed=1.0)

    assert manifest["documents"] == len(texts)
    assert manifest["skipped"] == {"malformed": malformed, "empty": empty}
    assert manifest["tokens"] == sum(len(ids) + 1 for ids in load_tokenizer(tokenizer_spec).encode_batch(texts))


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_cut_anywhere_is_refused_or_kept_up_to_there(kind: str, tmp_path: Path) -> None:
    generator = random.Random(0)
    texts = [f"{number} {generator.randbytes(50).hex()}" for number in range(4000)]  # several blocks of zstandard
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    whole = {"jsonl.gz": gzip.compress(lines), "jsonl.zst": zstandard.ZstdCompressor().compress(lines)}.get(
        kind, parquet_of(list(texts))
    )
    path = tmp_path / f"in.{kind}"
    for length in sorted({1, len(whole) - 1, *(generator.randrange(1, len(whole)) for _ in range(60))}):
        path.write_bytes(whole[:length])
        read: list[str] = []
        with pytest.raises(UnreadableInputError, match=rf"in\.{kind}: "):
            read.extend(texts_of(path))
        assert read == ([] if kind == "parquet" else whole_lines_of_cut(kind, whole[:length]))


def whole_lines_of_cut(kind: str, content: bytes) -> list[str]:
    """The texts of the lines that the libraries' own readers get out of a cut file."""
    if kind == "jsonl.gz":
        unpacked = zlib.decompressobj(wbits=31).decompress(content)
    else:
        unpacked = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
    return [json.loads(line)["text"] for line in unpacked.split(b"\n")[:-1]]


def test_a_parquet_file_that_is_none_is_refused(tokenizer_spec: str, tmp_path: Path) -> None:
    for content in (b"no parquet", b"PAR1 no parquet PAR1", bytes(100), parquet_of(["x"])[4:]):
        (tmp_path / "in.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"in\.parquet: damaged or no parquet file"):
            preprocess([str(tmp_path / "in.parquet")], str(tmp_path / "data"), tokenizer_spec)


def test_rows_that_the_end_of_a_parquet_file_hides_are_missed(tmp_path: Path) -> None:
    whole = parquet_of([f"row {number}" for number in range(20)])
    path = tmp_path / "in.parquet"
    hidden = 0
    for bit in range(8 * (len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")), 8 * (len(whole) - 8)):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        try:
            rows = sum(map(len, pa.parquet.ParquetFile(io.BytesIO(spoilt)).iter_batches()))
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            continue
        if rows != 20:
            hidden += 1
            path.write_bytes(spoilt)
            with pytest.raises(UnreadableInputError, match=r"in\.parquet: damaged"):
                list(texts_of(path))
    assert hidden > 0


def test_values_that_python_has_not_are_malformed(tokenizer_spec: str, tmp_path: Path) -> None:
    names = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"caf\xe9"]).buffers())
    late = pa.array([2**62, 0], pa.timestamp("us"))
    pa.parquet.write_table(pa.table({"text": ["one", "two"], "name": names, "late": late}), tmp_path / "in.parquet")
    rules = DocumentRules(set_key="name", sets=("good",))

    (manifest,) = preprocess(
        [str(tmp_path / "in.parquet")], str(tmp_path / "data"), tokenizer_spec, rules=rules, max_malformed=0.5
    )

    assert (manifest["documents"], manifest["skipped"]) == (1, {"malformed": 1})
    assert manifest["malformed_first"] == [f"{tmp_path}/in.parquet:2: no name of a set under 'name'; see --set-key"]
    with pytest.raises(DataError, match=r"no document in .*'malformed': 2"):
        preprocess(
            [str(tmp_path / "in.parquet")],
            str(tmp_path / "no"),
            tokenizer_spec,
            rules=DocumentRules(text_key="late"),
            max_malformed=1.0,
        )


@pytest.mark.parametrize(
    ("policy", "expected", "counts"),
    [
        (
            "replace",
            [f"caf{REPLACEMENT} {REPLACEMENT}", f"half {REPLACEMENT}", "good"],
            ({"malformed": 1, "empty": 1}, 2),
        ),
        ("skip", ["good"], ({"invalid_utf8": 4}, 0)),
    ],
)
def test_what_is_no_utf8_is_treated_as_asked(
    policy: str, expected: list[str], counts: tuple[dict[str, int], int], tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "caf\xe9 \\ud83d"}\n{"text": "half \\ud83d"}\n{"text": "good"}\n'
        b'{"cut": "\xe9\n{"text": "", "n": "\xe9"}'
    )
    ((piece,),) = cut_tasks(find_sources([str(path)]), workers=1)
    (chunk,) = read_piece(piece, Columns(), Digest())

    found = extract_documents(chunk, DocumentRules(invalid_utf8=policy))  # type: ignore[arg-type]

    assert found.texts == expected
    assert (dict(found.skipped), found.invalid_utf8.total()) == counts
    with pytest.raises(DataError, match=r"in\.jsonl:1: not valid UTF-8: mend it, or see --invalid-utf8"):
        extract_documents(chunk, DocumentRules(invalid_utf8="stop"))


@pytest.mark.parametrize("kind", KINDS[:4])
def test_files_of_no_byte(kind: str, tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / f"in.{kind}").write_bytes(b"")

    faults = {"jsonl": r"no document in .*in\.", "parquet": r"in\.parquet: damaged or no parquet file"}
    with pytest.raises(
        DataError, match=faults.get(kind, rf"in\.{kind}: the compressed data ends too early, at byte 0")
    ):
        preprocess([str(tmp_path / f"in.{kind}")], str(tmp_path / "data"), tokenizer_spec)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_of_zeros_is_counted_beside_a_whole_one(
    suffix: str, tokenizer_spec: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n')
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(bytes(5000))
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / f"b.jsonl.{suffix}")]
    with pytest.raises(DataError, match=rf"b\.jsonl\.{suffix}: .*too early, at byte 5000.*--damaged-files"):
        preprocess(inputs, str(tmp_path / "data"), tokenizer_spec)

    keeping = DocumentRules(damaged_files="keep-readable")
    (manifest,) = preprocess(inputs, str(tmp_path / "data"), tokenizer_spec, rules=keeping, overwrite=True)

    assert (manifest["documents"], manifest["skipped"]) == (1, {"damaged_file": 1})


def test_lines_of_a_hundred_megabytes(tokenizer_spec: str, tmp_path: Path) -> None:
    long = "words and 12345 numbers\n" * 4_400_000
    assert len(long) > 100e6
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        file.write(json.dumps({"text": "first"}) + "\n" + json.dumps({"text": long}) + "\n")
        file.write('{"text": "' + "x" * 100_000_000 + "\n" + json.dumps({"text": "last"}) + "\n")
    command = [sys.executable, str(SCRIPT), "--input", str(path), "--output-prefix", str(tmp_path / "data")]

    process = subprocess.Popen([*command, "--tokenizer", tokenizer_spec, "--max-malformed", "0.5"])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)

    assert process.returncode == 0
    assert usage.ru_maxrss < 1.5e6  # KB
    manifest = json.loads((tmp_path / "data.manifest.json").read_text())
    assert (manifest["documents"], manifest["skipped"]) == (3, {"malformed": 1})
    assert manifest["text_bytes"] == len(long) + len("firstlast")
    assert manifest["malformed_first"][0].startswith(f"{path}:3: not JSON")
    assert manifest["encoder"] == "gigatoken"


def test_a_document_of_twenty_megabytes_without_a_space(tokenizer_spec: str, tmp_path: Path) -> None:
    text = "a" * 20_000_000
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}))

    (manifest,) = preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec)

    assert manifest["documents"] == 1
    # a tenth of a second, where all of it takes four
    assert manifest["tokens"] == 100 * len(load_tokenizer(tokenizer_spec).encode(text[: len(text) // 100])) + 1


def test_a_key_of_any_content_is_shown_in_one_short_line(
    tokenizer_spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"\ud83d\n" + 100_000 * "k": 1}), json.dumps({"text": "x"})]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))

    (manifest,) = preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec, max_malformed=0.5)

    (complaint,) = manifest["malformed_first"]
    assert complaint.startswith(f"{tmp_path}/in.jsonl:1: no key 'text' (keys: \\ud83d\\nkkk")
    assert len(complaint) < 600
    assert f"left out: {complaint}\n" in capsys.readouterr().err


def test_a_set_without_a_name_has_no_dataset_of_its_own(tokenizer_spec: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "set": ""}\n{"text": "b", "set": "named"}\n')
    rules = DocumentRules(set_key="set", one_dataset_per_set=True)

    (manifest,) = preprocess(
        [str(tmp_path / "in.jsonl")], str(tmp_path / "data"), tokenizer_spec, rules=rules, max_malformed=0.5
    )

    assert (manifest["set"], manifest["documents"], manifest["skipped"]) == ("named", 1, {"malformed": 1})
    assert {path.name for path in tmp_path.glob("*.bin")} == {"data_named.bin"}
