"""However an input is cut into pieces, the pieces together are the input: every line once, whole, and in order."""

import gzip
import hashlib
import itertools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import sources as sources_module
from data_tools.documents import DocumentRules, extract_documents
from data_tools.opening import UnreadableInputError
from data_tools.reading import CHUNK_BYTES, Chunk, Columns, Digest, line_number, read_piece
from data_tools.sources import COMPRESSED_READ_BYTES, Piece, cut_tasks, find_sources


def pieces_between(kind: str, path: Path, cuts: list[int]) -> list[Piece]:
    bounds = [0, *cuts]
    return [
        Piece(0, kind, str(path), start, stop, (), 1)  # type: ignore[arg-type]
        for start, stop in zip(bounds, [*cuts, None], strict=True)
    ]


def lines_of(piece: Piece) -> tuple[list[bytes], str]:
    digest = Digest()
    lines = [line for chunk in read_piece(piece, Columns(), digest) for line in chunk.records]
    return lines, digest.hexdigest()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=12).map(b"\n".join),
    cuts=st.lists(st.integers(1, 160), max_size=5, unique=True).map(sorted),
)
def test_a_plain_file_may_be_cut_at_any_byte(content: bytes, cuts: list[int], tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    cuts = [cut for cut in cuts if cut < len(content)]

    read = [lines_of(piece) for piece in pieces_between("jsonl", path, cuts)]

    lines = [line for found, _ in read for line in found]
    assert b"\n".join(lines) == content.removesuffix(b"\n")
    bounds = [0, *cuts, len(content)]
    parts = [content[start:stop] for start, stop in itertools.pairwise(bounds)]
    assert [digest for _, digest in read] == [hashlib.sha256(part).hexdigest() for part in parts]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_may_be_cut_where_it_is_fetched(suffix: str, tmp_path: Path) -> None:
    generator = random.Random(0)
    lines = [generator.randbytes(generator.choice([0, 10, 3000, 90_000])).replace(b"\n", b" ") for _ in range(120)]
    lines[60] = bytes(3 * CHUNK_BYTES)  # one that spans many blocks and packs to almost nothing
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"in.jsonl.{suffix}"
    path.write_bytes(pack(b"\n".join(lines[:80]) + b"\n") + pack(b"\n".join(lines[80:])))
    reads = -(-path.stat().st_size // COMPRESSED_READ_BYTES)
    assert reads > 20

    for cuts in ([], [1], [3, 4, 17], list(range(1, reads))):
        pieces = pieces_between("compressed", path, [cut * COMPRESSED_READ_BYTES for cut in cuts])
        assert [line for piece in pieces for line in lines_of(piece)[0]] == lines


def test_malformed_lines_are_named_by_their_number_in_every_piece(tmp_path: Path) -> None:
    generator = random.Random(0)
    texts = [generator.randbytes(2500).hex() for _ in range(1000)]
    lines = [b"oops" if n % 300 == 7 else json.dumps({"text": text}).encode() for n, text in enumerate(texts)]
    content = b"\n".join(lines)
    (tmp_path / "in.jsonl").write_bytes(content)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(content, 1))

    for kind, name, cuts in (("jsonl", "in.jsonl", [1_000_000, 3_500_001]), ("compressed", "in.jsonl.gz", [])):
        complaints = [
            complaint
            for piece in pieces_between(kind, tmp_path / name, cuts)
            for chunk in read_piece(piece, Columns(), Digest())
            for complaint in extract_documents(chunk, DocumentRules()).complaints
        ]
        assert [complaint.split(": ")[0] for complaint in complaints] == [
            f"{tmp_path / name}:{number + 1}" for number in range(7, 1000, 300)
        ]
    assert line_number(str(tmp_path / "in.jsonl"), content.index(b"oops")) == 8


def test_parquet_pieces_are_its_row_groups(tmp_path: Path) -> None:
    rows = [{"content": f"row {i}", "meta": {"pile_set_name": f"set {i % 3}"}, "other": i} for i in range(1000)]
    rows[5]["content"] = None
    path = tmp_path / "in.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    columns = Columns("content", ("meta", "pile_set_name"))

    for cuts in ([], [3], [1, 2, 9]):
        chunks = [
            chunk for piece in pieces_between("parquet", path, cuts) for chunk in read_piece(piece, columns, Digest())
        ]
        texts = [text for chunk in chunks for text in chunk.records]
        assert texts == [None if row["content"] is None else str(row["content"]).encode() for row in rows]
        assert [name for chunk in chunks for name in chunk.sets] == [f"set {i % 3}" for i in range(1000)]
    whole = Digest()
    list(read_piece(pieces_between("parquet", path, [3])[0], columns, whole))
    assert whole.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_text_column_that_is_no_utf8_is_replaced_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"fine"]).buffers())
    pa.parquet.write_table(pa.table({"text": column}), path)
    (piece,) = pieces_between("parquet", path, [])

    (chunk,) = read_piece(piece, Columns(), Digest())

    found = extract_documents(chunk, DocumentRules())
    assert (found.texts, found.invalid_utf8.total()) == (["caf\N{REPLACEMENT CHARACTER}", "fine"], 1)
    assert extract_documents(chunk, DocumentRules(invalid_utf8="skip")).texts == ["fine"]


@pytest.mark.parametrize("workers", [1, 2, 5, 64])
def test_tasks_are_the_input_in_its_order(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources_module, "SMALLEST_TASK", 1000)  # else inputs of many megabytes would be needed
    lines = [json.dumps({"text": f"{i} {hashlib.sha256(bytes(i)).hexdigest()}"}).encode() for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b"\n".join(lines)))
    (tmp_path / "tree").mkdir()
    for number in range(50):
        (tmp_path / "tree" / f"{number:02d}.py").write_bytes(b"# " + lines[number])
    found = find_sources([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.zst"), str(tmp_path / "tree")])

    tasks = cut_tasks(found, workers)

    texts = [
        text
        for task in tasks
        for piece in task
        for chunk in read_piece(piece, Columns(), Digest())
        for text in extract_documents(chunk, DocumentRules(generated_files="keep")).texts
    ]
    plain = [json.loads(line)["text"] for line in lines]
    assert texts == plain + plain + [f"# {line.decode()}" for line in lines[:50]]
    assert len(tasks) >= min(workers, 4)


def test_damage_comes_after_all_that_is_whole_before_it(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} {hashlib.sha256(bytes(i)).hexdigest()}"}).encode() for i in range(30_000)]
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b"\n".join(lines))[:-5000])
    (piece,) = pieces_between("compressed", path, [])
    chunks: list[Chunk] = []

    with pytest.raises(UnreadableInputError, match=r"in\.jsonl\.zst: the compressed data ends too early, at byte"):
        chunks.extend(read_piece(piece, Columns(), Digest()))

    read = [line for chunk in chunks for line in chunk.records]
    assert 10_000 < len(read) < len(lines)
    assert read == lines[: len(read)]
