"""Random damage to inputs of every kind, and what the data tools make of it beside an independent reader.

    python -m tests.random_damage --inputs 3000

prints the table of docs/data.md.
"""

import argparse
import gzip
import io
import json
import random
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import zstandard

from data_tools.documents import DocumentRules, extract_documents
from data_tools.opening import UnreadableInputError
from data_tools.preprocess import preprocess
from data_tools.reading import Columns, Digest, read_piece
from data_tools.sources import cut_tasks, find_sources
from data_tools.train_tokenizer import train_tokenizer
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import load_tokenizer

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
