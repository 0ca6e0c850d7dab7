"""Who takes part in the benchmark of data preparation, and by which commands.

Of Megatron-LM, whose checkout the user brings, take part tools/preprocess_data.py, which encodes with Hugging Face's
tokenizers document by document, and tools/preprocess_data_fast.py, which encodes whole files with gigatoken on all
cores. The first reads plain .jsonl alone, so it is given the same documents decompressed beforehand; the second reads
both. Either takes a single file.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.preprocessing_input import ROOT, Input

OURS, TWO_WORKERS, CODEGEN_ROW = "ours", "ours, 2 workers", "ours, CodeGen's vocabulary"
HUGGINGFACE_ONLY, SENTENCEPIECE_ROW = "ours, HF-only", "ours, sentencepiece"
BARE_TOKENIZERS, BARE_SENTENCEPIECE = "tokenizers' encode_batch_fast alone", "sentencepiece's encode alone"
FAST, FAST_PLAIN = "preprocess_data_fast.py, .jsonl.zst", "preprocess_data_fast.py, .jsonl"
PREPROCESS_DATA = "preprocess_data.py, .jsonl"
MEGATRON_ROWS = (FAST, FAST_PLAIN, PREPROCESS_DATA)

Command = Callable[[list[Path], Path], list[str]]


def _compressed(source: Input) -> list[Path]:
    return list(source.compressed)


@dataclass(frozen=True)
class Contestant:
    """One row.

    Args:
        name: of the row.
        command: of the input files and the output's prefix.
        reads: the form of the input that it is given.
        environment: variables beside those of this process.
        folder: that the command runs in.
        output_ending: between the prefix and `.bin`.
        same_output: its files must be those of the comparison's first contestant.
        bare: writes the seconds of its encoding alone to PREFIX.json, and no dataset.
    """

    name: str
    command: Command
    reads: Callable[[Input], list[Path]] = _compressed
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    output_ending: str = ""
    same_output: bool = True
    bare: bool = False


@dataclass(frozen=True)
class MegatronLM:
    """A checkout of Megatron-LM, and the Python that has what it needs."""

    folder: Path
    python: str

    @property
    def commit(self) -> str:
        command = ["git", "-C", str(self.folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def ours(name: str, tokenizer: str, workers: int = 1, encoder: str = "auto", same_output: bool = True) -> Contestant:
    """data_tools/preprocess.py.

    Args:
        name: of the row.
        tokenizer: SPEC.
        workers: processes that tokenise.
        encoder: `reference` keeps to the tokenizer's own library.
        same_output: see Contestant.
    """

    def command(files: list[Path], prefix: Path) -> list[str]:
        output = ["--output-prefix", str(prefix), "--tokenizer", tokenizer, "--workers", str(workers)]
        encoding = [] if encoder == "auto" else ["--encoder", encoder]
        return [sys.executable, "data_tools/preprocess.py", "--input", *map(str, files), *output, *encoding]

    return Contestant(name, command, environment={"PYTHONPATH": str(ROOT)}, same_output=same_output)


def bare_library(name: str, library: str, tokenizer: str) -> Contestant:
    """A tokenizer library by itself, one process and one thread."""

    def command(files: list[Path], prefix: Path) -> list[str]:
        paths = ["--input", str(files[0]), "--report", f"{prefix}.json"]
        return [sys.executable, "-m", "benchmarks.bare_encode", "--library", library, "--tokenizer", tokenizer, *paths]

    environment = {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return Contestant(name, command, _single, environment, same_output=False, bare=True)


def megatron_contestants(megatron: MegatronLM, tokenizer: str) -> dict[str, Contestant]:
    """Megatron-LM's two programs, the fast one on either form of the input."""

    def contestant(name: str, script: str, reads: Callable[[Input], list[Path]], *options: str) -> Contestant:
        def command(files: list[Path], prefix: Path) -> list[str]:
            model = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"]
            paths = ["--input", str(files[0]), "--output-prefix", str(prefix), "--json-keys", "text"]
            return [megatron.python, f"tools/{script}", *paths, *model, *options]

        # before an installed megatron-core, which may be another version
        environment = {"PYTHONPATH": str(megatron.folder)}
        return Contestant(name, command, reads, environment, megatron.folder, "_text_document")

    return {
        FAST: contestant(FAST, "preprocess_data_fast.py", _single_compressed, "--use-gigatoken"),
        FAST_PLAIN: contestant(FAST_PLAIN, "preprocess_data_fast.py", _single, "--use-gigatoken"),
        PREPROCESS_DATA: contestant(PREPROCESS_DATA, "preprocess_data.py", _single, "--workers", "1"),
    }


def _single(source: Input) -> list[Path]:
    return [source.single]


def _single_compressed(source: Input) -> list[Path]:
    return [source.single_compressed]
