"""Bad input is refused in one line that names the file, or read as an independent reader reads it. Never a traceback.

    python -m tests.data_tools.test_bad_input --inputs 3000

tries more random damage and prints the table of docs/data.md.
"""

import argparse
import glob
import gzip
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data_tools.documents import DocumentRules, extract_documents
from data_tools.indexed_dataset import token_dtype
from data_tools.opening import UnreadableInputError
from data_tools.preprocess import preprocess
from data_tools.reading import Columns, Digest, read_piece
from data_tools.sources import cut_tasks, find_sources
from data_tools.train_tokenizer import train_tokenizer
from dsmoe_megatron.errors import DataError, TokenizerError
from dsmoe_megatron.tokenizers import load_tokenizer, save_huggingface

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "preprocess.py"
BATCH = 150
NOT_THE_COLUMN = "refused: no such column"
KINDS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "tree")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NASTY_LINES = (
    b'{"text": "good"}', b'{"text": ""}', b"", b" ", b"\r", b'{"text": 7}', b'{"text": null}',
    b'{"text": ["a"]}', b"[]", b"7", b'"text"', b"null", b"NaN", b'{"text": NaN}', b'{"other": "x"}',
    b'{"text": "a", "text": "b"}', b"{'text': 'a'}", b'{"text": "cut', b'{"text": "a"} trailing',
    b"[" * 100_000, b'{"text": "\\ud83d"}', b'{"text": "\\udc00\\ud800 x"}', b'{"text": "\\ud83d\\ude00"}',
    b'{"text": "caf\xe9"}', b"\xef\xbb\xbf" + b'{"text": "mark"}', b'{"text": "a\x00b"}',
    b'{"text": "a\\u0000b"}', b'{"text": "line \xe2\x80\xa8 end"}', b'{"text": "cr"}\r',
    b'{"n": 1e999, "text": "big"}', b'{"n": 123456789012345678901234567890, "text": "long"}', b"\x00" * 50,
    b'{"text": {"a": "b"}}', b'{"text": "caf\xe9 \\ud83d"}', b'{"text": "caf\xe9"',
    bytes(range(256)), b'{"text": "\xf0\x9f\x98\x80"}',
)  # fmt: skip


def read_lines_independently(content: bytes) -> tuple[list[str], int, int]:
    """Texts, malformed lines and empty documents of a .jsonl file, by the standard library alone."""
    texts, malformed, empty = [], 0, 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff"))["text"]
            assert isinstance(text, str)
        except (ValueError, KeyError, TypeError, RecursionError, AssertionError):
            malformed += 1
            continue
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        texts += [text] if text else []
        empty += not text
    return texts, malformed, empty


def read_ours(path: Path) -> tuple[list[str], Counter[str]]:
    """What the data tools make of an input.

    Raises:
        DataError: they refuse it.
    """
    texts: list[str] = []
    skipped: Counter[str] = Counter()
    rules = DocumentRules(generated_files="keep", extensions=(".py",))
    for task in cut_tasks(find_sources([str(path)], rules.extensions), workers=2):
        for piece in task:
            for chunk in read_piece(piece, Columns(), Digest()):
                found = extract_documents(chunk, rules)
                texts += found.texts
                skipped += found.skipped
                assert found.skipped["malformed"] == 0 or found.complaints
                assert all(str(path) in complaint for complaint in found.complaints)
    return texts, skipped


def texts_of(path: Path) -> Iterator[str]:
    """The documents of an input, as long as it can be read."""
    for task in cut_tasks(find_sources([str(path)]), workers=1):
        for piece in task:
            for chunk in read_piece(piece, Columns(), Digest()):
                yield from extract_documents(chunk, DocumentRules()).texts


def unpack(path: Path, content: bytes) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(content)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True).read()
    return content


def parquet_of(texts: list[str | None]) -> bytes:
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), buffer, row_group_size=7)
    return buffer.getvalue()


def make_input(kind: str, generator: random.Random) -> bytes:
    """A stored file with good and nasty records."""
    lines = [generator.choice(NASTY_LINES) for _ in range(generator.randrange(25))]
    if kind == "parquet":
        return parquet_of([generator.choice(["good", "", None, REPLACEMENT, "a\0b"]) for _ in lines])
    content = b"\n".join(lines)
    pack: dict[str, Callable[[bytes], bytes]] = {
        "jsonl.gz": gzip.compress,
        "jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }
    return pack.get(kind, bytes)(content)


def damage(content: bytes, generator: random.Random) -> bytes:
    """Flip, cut, repeat or insert some bytes."""
    spoilt = bytearray(content)
    for _ in range(generator.randrange(4)):
        if not spoilt:
            break
        place = generator.randrange(len(spoilt))
        match generator.randrange(4):
            case 0:
                spoilt[place] ^= 1 << generator.randrange(8)
            case 1:
                del spoilt[place:]
            case 2:
                spoilt[place:place] = spoilt[place : place + generator.randrange(20)]
            case _:
                spoilt[place:place] = generator.randbytes(generator.randrange(5))
    return bytes(spoilt)


def try_one(path: Path, kind: str, content: bytes) -> str:
    """What became of one input: accepted, refused, or the name of the fault in the data tools."""
    try:
        found = read_ours(path)
    except DataError as error:
        one_line = str(path) in str(error) and "\n" not in str(error)
        if not one_line or kind in ("jsonl", "tree"):
            return f"refused without cause: {error}"
        return "refused" if isinstance(error, UnreadableInputError) else NOT_THE_COLUMN
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"
    return "accepted" if found == what_is_stored(path, kind, content) else f"silent loss: {content[:200]!r}"


def what_is_stored(path: Path, kind: str, content: bytes) -> tuple[list[str], Counter[str]] | None:
    """Texts of an input and counts of what is none, by other readers than ours; None where it is no such file."""
    if kind == "tree":
        text = content.decode("utf-8", "replace").removeprefix("\ufeff")
        reason = "binary" if b"\0" in content[:8192] else "" if text else "empty"
        return ([], Counter({reason: 1})) if reason else ([text], Counter())
    if kind == "parquet":
        column = pa.parquet.read_table(path).column("text").cast(pa.binary()).to_pylist()
        stored = [value.decode("utf-8", "replace").removeprefix("\ufeff") for value in column if value is not None]
        return [text for text in stored if text], Counter({"malformed": column.count(None), "empty": stored.count("")})
    if kind != "jsonl" and not content.strip(b"\0"):
        return None
    texts, malformed, empty = read_lines_independently(unpack(path, content))
    return texts, Counter({"malformed": malformed, "empty": empty})


def try_batch(folder: Path, inputs: int, generator: random.Random, tokenizer_spec: str) -> list[tuple[str, str]]:
    """Kind and outcome of each of some random inputs, read one by one and then made one dataset."""
    tried: list[tuple[str, Path, bytes, str]] = []
    for number in range(inputs):
        kind = KINDS[number % len(KINDS)]
        path = folder / f"{number}.{kind}"
        content = damage(make_input(kind, generator), generator)
        if kind == "tree":
            path.mkdir()
        (path / "a.py" if kind == "tree" else path).write_bytes(content)
        tried.append((kind, path, content, try_one(path, kind, content)))

    rules = DocumentRules(generated_files="keep", extensions=(".py",), damaged_files="keep-readable")
    # crashes are told, and a file without the column stops a run even where damaged ones are kept
    in_run = [each for each in tried if each[3] in ("accepted", "refused")]
    inputs_of_run = [str(path) for _, path, _, _ in in_run]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        (manifest,) = preprocess(inputs_of_run, str(folder / "data"), tokenizer_spec, rules=rules, max_malformed=1.0)
    tokenizer = load_tokenizer(tokenizer_spec)
    ids = np.fromfile(folder / "data.bin", manifest["dtype"])
    # no text has the end's id in it
    documents = iter(np.split(ids, np.flatnonzero(ids == tokenizer.end_of_document_id) + 1)[:-1])
    outcomes = [(kind, read) for kind, _, _, read in tried if read not in ("accepted", "refused")]
    for (kind, path, content, read), source in zip(in_run, manifest["sources"], strict=True):
        made = [next(documents)[:-1].tolist() for _ in range(source["documents"])]
        if read == "accepted":
            texts, skipped = what_is_stored(path, kind, content) or ([], Counter())
            if made != tokenizer.encode_batch(texts) or Counter(source["skipped"]) != skipped:
                read = f"silent loss: in the dataset: {content[:200]!r}"
        elif read == "refused" and source["skipped"].get("damaged_file") != 1:
            read = f"silent loss: damage not counted: {content[:200]!r}"
        outcomes.append((kind, read))
    assert next(documents, None) is None
    return outcomes


def try_many(inputs: int, seed: int, tokenizer_spec: str) -> dict[str, Counter[str]]:
    """Outcomes of random inputs, by kind."""
    generator = random.Random(seed)
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for first in range(0, inputs, BATCH):
        with tempfile.TemporaryDirectory() as folder:
            for kind, outcome in try_batch(Path(folder), min(BATCH, inputs - first), generator, tokenizer_spec):
                outcomes[kind][outcome] += 1
    return outcomes


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
    assert (dict(found.skipped), found.invalid_utf8) == counts
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = [str(Path(sysconfig.get_path("stdlib"), "asyncio"))]
        with redirect_stdout(io.StringIO()):
            spec = str(train_tokenizer(sources, f"{folder}/small", vocab_size=2000))
        outcomes = try_many(arguments.inputs, arguments.seed, spec)
    print(
        "| Input | Tried | Read as stored | Refused in one line | Crashes | Silent losses |\n|---|---|---|---|---|---|"
    )
    for kind, counts in outcomes.items():
        found = Counter({name.split(":")[0]: 0 for name in counts})
        for name, count in counts.items():
            found[name.split(":")[0]] += count
        faults = [found["crash"] + found["refused without cause"], found["silent loss"]]
        print(f"| {kind} | {counts.total()} | {found['accepted']} | {found['refused']} | {faults[0]} | {faults[1]} |")
        for name in counts:
            if ":" in name and name != NOT_THE_COLUMN:
                print(name, file=sys.stderr)


if __name__ == "__main__":
    main()
