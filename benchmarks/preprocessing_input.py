"""The input of the benchmark of data preparation: one corpus cut to several sizes, and the tokenizers.

Each size is there three times: as some .jsonl.zst files, as a single one, and as a single .jsonl file for programs that
read nothing else. All hold the same documents in the same order. Documents that programs treat differently by design
are left out: empty ones, and those that spell out a special token.
"""

import glob
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dsmoe_megatron.codegen_tokenizer import CODEGEN
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import load_tokenizer, save_huggingface

ROOT = Path(__file__).resolve().parents[1]
FILES = 4
SPECIAL_TOKENS = ("<|endoftext|>", "<s>", "</s>", "<unk>")
TRAINING_MEGABYTES = 4


@dataclass(frozen=True)
class Input:
    """The same documents, in each form.

    Args:
        text_bytes: UTF-8 bytes of the documents' texts.
        documents: how many.
        compressed: .jsonl.zst files.
        single_compressed: one .jsonl.zst file.
        single: one .jsonl file.
    """

    text_bytes: int
    documents: int
    compressed: tuple[Path, ...]
    single_compressed: Path
    single: Path

    @property
    def megabytes(self) -> float:
        return self.text_bytes / 1e6

    @property
    def compressed_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.compressed)


def cut_input(corpus: list[str], megabytes: float, folder: Path) -> Input:
    """The first documents of the corpus, up to a size.

    Args:
        corpus: .jsonl and .jsonl.zst files, by name or pattern.
        megabytes: text to take [MB].
        folder: made and filled.
    """
    folder.mkdir(parents=True)
    lines: list[bytes] = []
    text_bytes = 0
    for text in plain_documents(corpus):
        if text_bytes >= megabytes * 1e6:
            break
        lines.append(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        text_bytes += len(text.encode())
    if len(lines) < FILES:
        raise DataError(f"{', '.join(corpus)}: only {len(lines)} documents to measure with")
    paths = tuple(folder / f"part_{number}.jsonl.zst" for number in range(FILES))
    ends = [len(lines) * number // FILES for number in range(FILES + 1)]
    for path, (start, end) in zip(paths, itertools.pairwise(ends), strict=True):
        path.write_bytes(_compressed(b"".join(lines[start:end])))
    single = folder / "all.jsonl"
    single.write_bytes(b"".join(lines))
    single_compressed = folder / "all.jsonl.zst"
    single_compressed.write_bytes(_compressed(b"".join(lines)))
    return Input(text_bytes, len(lines), paths, single_compressed, single)


def repeated_files(source: Input, megabytes: float, folder: Path) -> tuple[list[Path], float]:
    """More input than the corpus holds, by more names of the same files.

    Returns:
        .jsonl.zst files, and the text in them [MB].
    """
    folder.mkdir(parents=True)
    times = max(1, round(megabytes / source.megabytes))
    paths = []
    for time, path in itertools.product(range(times), source.compressed):
        paths.append(folder / f"{time:04}_{path.name}")
        paths[-1].hardlink_to(path)  # a file that is named twice would be read once
    return paths, times * source.megabytes


def plain_documents(corpus: list[str]) -> Iterator[str]:
    """The texts without the documents that programs treat differently."""
    paths = [path for pattern in corpus for path in sorted(glob.glob(pattern))]  # noqa: PTH207, for absolute patterns
    if not paths:
        raise DataError(f"--input {' '.join(corpus)}: no such file")
    for path in paths:
        with _opened(Path(path)) as lines:
            for line in lines:
                text = json.loads(line)["text"]
                if text.strip() and not any(token in text for token in SPECIAL_TOKENS):
                    yield text


def collect_corpus(folder: Path, megabytes: float) -> list[str]:
    """Text and code that this machine has, where no input is given."""
    half = str(megabytes / 2)
    command = ["collect_local_corpus.py", "--output", str(folder), "--text-megabytes", half, "--code-megabytes", half]
    _data_tool(*command)
    return [str(folder / kind / "train.jsonl.zst") for kind in ("text", "code")]


def gpt2_folder(folder: Path) -> Path:
    """GPT-2's vocabulary as the Hugging Face tokenizer that the peers read, without a hub.

    Its files are those that `codegen` is built from.
    """
    from transformers import GPT2Tokenizer

    # CodeGen's is GPT-2's with the runs of white space added after it
    codegen_folder = folder.with_name("codegen")
    save_huggingface(load_tokenizer(CODEGEN), codegen_folder)
    model = json.loads((codegen_folder / "tokenizer.json").read_bytes())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    GPT2Tokenizer(vocab=model["vocab"], merges=merges).save_pretrained(folder)
    return folder


def sentencepiece_model(source: Input, prefix: Path, vocab_size: int) -> Path:
    """A sentencepiece model trained on the first megabytes of the input."""
    size = ("--vocab-size", str(vocab_size), "--max-megabytes", str(TRAINING_MEGABYTES))
    _data_tool("train_tokenizer.py", "--input", str(source.single), "--output", str(prefix), *size)
    return prefix.with_suffix(".model")


def _data_tool(name: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"data_tools.{name.removesuffix('.py')}", *arguments]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if outcome.returncode != 0:
        raise DataError(f"data_tools/{name}: {(outcome.stderr.strip() or 'no output').splitlines()[-1]}")


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """The lines of a .jsonl or .jsonl.zst file; not read by the data tools, which are what is measured."""
    import zstandard

    with path.open("rb") as file:
        packed = path.suffix == ".zst"
        content = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) if packed else file
        with io.TextIOWrapper(content, encoding="utf-8") as lines:
            yield lines


def _compressed(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=3).compress(content)
