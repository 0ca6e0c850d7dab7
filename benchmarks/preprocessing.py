"""Data preparation as whole processes, beside Megatron-LM's programs and the bare tokenizer libraries.

    python -m benchmarks.preprocessing --input 'corpus/*.jsonl.zst' --megatron-lm Megatron-LM [--json FILE]

Every row is one command, measured from its start to its end with all its children: processor time, clock, peak memory.
The rows of a comparison take turns on the same documents, in changing order, and ratios are taken within a repeat.
Since imports take seconds, each row runs on two sizes: the difference of the two, in text and in time, is its speed
without start-up. Megatron-LM's rows need a checkout, named by --megatron-lm, and a Python that has what it imports.
"""

import filecmp
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_drw, PositiveFloat, PositiveInt

from benchmarks.index_writing import measure_index
from benchmarks.measuring import benchmark_parser, run_benchmark, surroundings
from benchmarks.preprocessing_input import (
    Input,
    collect_corpus,
    cut_input,
    gpt2_folder,
    repeated_files,
    sentencepiece_model,
)
from benchmarks.preprocessing_peers import (
    BARE_SENTENCEPIECE,
    BARE_TOKENIZERS,
    CODEGEN_ROW,
    FAST,
    FAST_PLAIN,
    HUGGINGFACE_ONLY,
    MEGATRON_ROWS,
    OURS,
    PREPROCESS_DATA,
    SENTENCEPIECE_ROW,
    TWO_WORKERS,
    Contestant,
    MegatronLM,
    bare_library,
    megatron_contestants,
    ours,
)
from benchmarks.preprocessing_report import (
    GPT2,
    REFERENCE,
    SENTENCEPIECE,
    as_markdown,
    figures,
    judged,
    pile_rows,
)
from benchmarks.process_usage import CommandError, Usage, measured
from benchmarks.storage import measure_storage
from dsmoe_megatron.errors import EnvironmentNotSupportedError

SMALLER = 10  # the larger size is so many times the smaller; the difference must stand out of start-up's own noise
MEMORY_GROWTH = 20  # from the smaller input whose memory is measured to the larger


@dataclass(frozen=True)
class Sizes:
    """The two inputs of a comparison."""

    smaller: Input
    larger: Input


def compare(contestants: Sequence[Contestant], sizes: Sizes, repeats: int, scratch: Path) -> dict[str, Any]:
    """Every contestant on both sizes in every repeat; the first one's files are what the others' are held against."""
    order = random.Random(1234)
    turns = [(contestant, size) for contestant in contestants for size in ("smaller", "larger")]
    runs: dict[str, list[dict[str, Usage]]] = {contestant.name: [] for contestant in contestants}
    identical = {contestant.name: True for contestant in contestants[1:] if contestant.same_output}
    output_bytes: dict[str, int] = {}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for own in runs.values():
                own.append({})
            for contestant, size in order.sample(turns, len(turns)):
                print(f"repeat {repeat + 1} of {repeats}: {contestant.name}, {size} input", file=sys.stderr)
                usage = run_contestant(contestant, getattr(sizes, size), _prefix(contestants, contestant, folder, size))
                runs[contestant.name][-1][size] = usage
            for contestant in contestants:
                files = {size: _outputs(contestants, contestant, folder, size) for size in ("smaller", "larger")}
                if contestant.name in identical:
                    reference = {size: _outputs(contestants, contestants[0], folder, size) for size in files}
                    identical[contestant.name] &= all(_equal(files[size], reference[size]) for size in files)
                if not contestant.bare:
                    output_bytes[contestant.name] = sum(path.stat().st_size for path in files["larger"])
    megabytes = {"smaller": sizes.smaller.megabytes, "larger": sizes.larger.megabytes}
    return {
        "megabytes": megabytes,
        "documents": {"smaller": sizes.smaller.documents, "larger": sizes.larger.documents},
        "identical_to_first": identical,
        "rows": {
            contestant.name: {
                "command": _shown_command(contestant),
                "input_bytes": sum(path.stat().st_size for path in contestant.reads(sizes.larger)),
                "output_bytes": output_bytes.get(contestant.name),
                "runs": [{size: asdict(usage) for size, usage in run.items()} for run in runs[contestant.name]],
                "figures": figures(runs[contestant.name], megabytes, contestant.bare),
            }
            for contestant in contestants
        },
    }


def run_contestant(contestant: Contestant, source: Input, prefix: Path) -> Usage:
    """One process from its start to its end."""
    usage = run_on_files(contestant, contestant.reads(source), prefix)
    if not contestant.bare:
        return usage
    encoding = json.loads(prefix.with_suffix(".json").read_text(encoding="utf-8"))
    return replace(usage, processor=encoding["processor"], wall=encoding["wall"])


def run_on_files(contestant: Contestant, files: list[Path], prefix: Path) -> Usage:
    """One process on files that are not an Input's own."""
    report = prefix.with_name(f"{prefix.name}_usage.json")
    try:
        return measured(contestant.command(files, prefix), contestant.environment, contestant.folder, report)
    except CommandError as error:
        raise EnvironmentNotSupportedError(f"{contestant.name}: {error}") from error


def _prefix(contestants: Sequence[Contestant], contestant: Contestant, folder: str, size: str) -> Path:
    return Path(folder, f"{contestants.index(contestant)}_{size}")


def _outputs(contestants: Sequence[Contestant], contestant: Contestant, folder: str, size: str) -> list[Path]:
    prefix = f"{_prefix(contestants, contestant, folder, size)}{contestant.output_ending}"
    return [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]


def _equal(files: list[Path], others: list[Path]) -> bool:
    return all(filecmp.cmp(file, other, shallow=False) for file, other in zip(files, others, strict=True))


def _shown_command(contestant: Contestant) -> str:
    """With the names of the files left out, and the interpreter's folder."""
    command = contestant.command([Path("INPUT")], Path("PREFIX"))
    return " ".join(["python", *(Path(part).name if Path(part).is_absolute() else part for part in command[1:])])


def measure_memory(source: Input, megabytes: float, folder: Path, tokenizer: str) -> list[dict[str, float]]:
    """Peak memory of the largest process on a small and on a large input, with two workers."""
    contestant = ours(TWO_WORKERS, tokenizer, workers=2)
    measured_sizes = []
    for number, size in enumerate((megabytes / MEMORY_GROWTH, megabytes)):
        files, text_megabytes = repeated_files(source, size, folder / str(number))
        print(f"memory: {text_megabytes:.0f} MB of text", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as outputs:
            usage = run_on_files(contestant, files, Path(outputs, "dataset"))
        measured_sizes.append({"megabytes": text_megabytes, **asdict(usage)})
    return measured_sizes


def contestants_of(tokenizers: dict[str, str], megatron: MegatronLM | None) -> dict[str, list[Contestant]]:
    """The rows of each comparison, ours first.

    Args:
        tokenizers: SPECs by the names of the comparisons.
        megatron: without it its rows are left out.
    """
    gpt2 = tokenizers.get(GPT2, "")
    peers = megatron_contestants(megatron, gpt2) if megatron else {}
    return {
        GPT2: [
            ours(OURS, gpt2),
            ours(TWO_WORKERS, gpt2, workers=2),
            ours(CODEGEN_ROW, "codegen", same_output=False),
            *(peers[name] for name in (FAST, FAST_PLAIN) if peers),
        ],
        REFERENCE: [
            ours(OURS, gpt2),
            ours(HUGGINGFACE_ONLY, gpt2, encoder="reference"),
            bare_library(BARE_TOKENIZERS, "tokenizers", gpt2),
            *(peers[name] for name in (PREPROCESS_DATA,) if peers),
        ],
        SENTENCEPIECE: [
            ours(SENTENCEPIECE_ROW, tokenizers.get(SENTENCEPIECE, "")),
            bare_library(BARE_SENTENCEPIECE, "sentencepiece", tokenizers.get(SENTENCEPIECE, "")),
        ],
    }


def measure(arguments: Namespace, scratch: Path) -> dict[str, Any]:
    """The whole report."""
    chosen = arguments.comparisons
    report: dict[str, Any] = {"surroundings": surroundings(torch.device("cpu")), "repeats": arguments.repeats}
    corpus = arguments.input or collect_corpus(scratch / "corpus", arguments.megabytes)
    inputs = {
        megabytes: Sizes(
            cut_input(corpus, megabytes / SMALLER, scratch / f"{megabytes}_smaller"),
            cut_input(corpus, megabytes, scratch / f"{megabytes}_larger"),
        )
        for megabytes in {arguments.megabytes, arguments.slow_megabytes}
    }
    sizes = {GPT2: inputs[arguments.megabytes]}  # the fast rows; the others are up to a hundred times slower
    slow = inputs[arguments.slow_megabytes]

    tokenizers: dict[str, str] = {}
    if {GPT2, REFERENCE} & set(chosen) or arguments.large_megabytes:
        tokenizers[GPT2] = str(gpt2_folder(scratch / "gpt2"))
    if SENTENCEPIECE in chosen:
        model = sentencepiece_model(slow.larger, scratch / "sentencepiece", arguments.vocab_size)
        tokenizers[SENTENCEPIECE] = str(model)

    megatron = None
    if arguments.megatron_lm is None:
        reason = "no --megatron-lm FOLDER, a checkout of github.com/NVIDIA/Megatron-LM"
        print(f"left out: {'; '.join(MEGATRON_ROWS)}: {reason}", file=sys.stderr)
        report["left_out"] = dict.fromkeys(MEGATRON_ROWS, reason)
    else:
        megatron = MegatronLM(Path(arguments.megatron_lm).resolve(), arguments.megatron_python)
        report["megatron_lm_commit"] = megatron.commit

    report["comparisons"] = {
        name: compare(contestants, sizes.get(name, slow), arguments.repeats, scratch)
        for name, contestants in contestants_of(tokenizers, megatron).items()
        if name in chosen
    }
    if arguments.large_megabytes:
        source = inputs[arguments.megabytes].smaller  # small, so that the sizes come out near those wanted
        report["memory"] = measure_memory(source, arguments.large_megabytes, scratch, tokenizers[GPT2])
    report["index"] = measure_index(arguments.index_documents, arguments.repeats, scratch / "index")
    report["storage"] = measure_storage(scratch, arguments.storage_megabytes)
    return report | {"goals": judged(report), "pile": pile_rows(report)}


def run(arguments: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        return measure(arguments, Path(scratch))


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("preprocessing", "Data preparation beside Megatron-LM's")
    all_comparisons = [GPT2, REFERENCE, SENTENCEPIECE]
    parser.add_argument(
        "--input", nargs="+", default=None, metavar="GLOB", help="a file named twice is read twice; none: collected"
    )
    parser.add_argument("--megatron-lm", type=Path_drw, default=None, metavar="FOLDER", help="a checkout")
    parser.add_argument(
        "--megatron-python", type=str, default=sys.executable, metavar="FILE", help="runs Megatron-LM's"
    )
    parser.add_argument("--comparisons", nargs="+", choices=all_comparisons, default=all_comparisons, help="to make")
    parser.add_argument("--repeats", type=PositiveInt, default=5, help="runs of each row on each size")
    parser.add_argument("--megabytes", type=PositiveFloat, default=180.0, help="text of the comparison gpt2 [MB]")
    parser.add_argument("--slow-megabytes", type=PositiveFloat, default=24.0, help="text of the other comparisons [MB]")
    parser.add_argument(
        "--large-megabytes", type=float, default=2000.0, help="text to measure memory with [MB]; 0: not measured"
    )
    parser.add_argument("--vocab-size", type=PositiveInt, default=8192, help="of the sentencepiece model")
    parser.add_argument("--index-documents", type=PositiveInt, default=10_000_000, help="documents of the index")
    parser.add_argument("--storage-megabytes", type=PositiveFloat, default=1000.0, help="file that times the disk [MB]")
    parser.add_argument("--scratch", type=Path_drw, default=None, metavar="FOLDER", help="on the disk to be measured")
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
