"""Time and memory of the training index: checked caches beside megatron-core's own.

    python -m benchmarks.training_index [--tokens 3000000000] [--files 128] [--repeats 9] [--json FILE]

Datasets of so many tokens are made up: the .idx is real, with log-normal document lengths, and the .bin, which no index
needs, a sparse file. `build` starts from an empty cache; `open` finds everything there: megatron-core maps the files,
ours reads every byte of them against its record first. Memory is the peak of resident memory above what was there
before, mapped files included.
"""

import hashlib
import itertools
import json
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from benchmarks.measuring import (
    Run,
    benchmark_parser,
    paired_seconds,
    run_benchmark,
    surroundings,
    surroundings_line,
    table,
)
from data_tools.indexed_dataset import DTYPE_CODES, INDEX_HEADER, INDEX_VERSION
from dsmoe_megatron.config import Config, DatasetSource, TrainConfig
from dsmoe_megatron.runtime.distributed import prepare_device, process_group

if TYPE_CHECKING:
    from dsmoe_megatron.training.blends import Blend

SEQUENCE_LENGTH = 2048
VOCABULARY = 50_000
MEDIAN_DOCUMENT, SPREAD_OF_DOCUMENTS = 600, 1.1  # tokens, and of their logarithm; the mean is about 1,100 tokens
LIMIT_OF_BUILD = 1.25  # ours, of megatron-core's
OURS, MEGATRON = "ours", "Megatron-Core"
ACTIONS = ("build", "open")


def make_dataset(prefix: Path, tokens: int, seed: int) -> None:
    """PREFIX.bin without content, its PREFIX.idx, and of the manifest what the cache asks for."""
    random = np.random.default_rng(seed)
    lengths = random.lognormal(np.log(MEDIAN_DOCUMENT), SPREAD_OF_DOCUMENTS, tokens // MEDIAN_DOCUMENT + 2)
    ends = np.cumsum(lengths.astype(np.int32) + 1)
    ends = np.append(ends[ends < tokens], tokens)
    starts = np.insert(ends[:-1], 0, 0)
    token_bytes = np.dtype(np.uint16).itemsize
    counts = struct.pack("<QBQQ", INDEX_VERSION, DTYPE_CODES["uint16"], len(ends), len(ends) + 1)
    tables = ((ends - starts).astype(np.int32), starts * token_bytes, np.arange(len(ends) + 1))
    index = b"".join([INDEX_HEADER, counts, *(each.tobytes() for each in tables)])
    Path(f"{prefix}.idx").write_bytes(index)
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(tokens * token_bytes)
    manifest = {"files": {"idx": {"sha256": hashlib.sha256(index).hexdigest()}}}
    Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))


def make_blend(folder: Path, tokens: int, files: int) -> "Blend":
    """So many tokens in so many datasets, of which a run reads nearly all once."""
    from megatron.core.datasets.utils import Split

    from dsmoe_megatron.training.blends import Blend, DatasetTokenizer

    folder.mkdir()
    for number in range(files):
        make_dataset(folder / f"part_{number}", tokens // files, seed=number)
    config = Config(train=TrainConfig(sequence_length=SEQUENCE_LENGTH))
    config.data.train = [DatasetSource(str(folder / f"part_{number}")) for number in range(files)]
    tokenizer = DatasetTokenizer(VOCABULARY, 0, OrderedDict(fingerprint="made up"))
    samples = int(0.98 * tokens / SEQUENCE_LENGTH)
    return Blend(Split.train, config.data.train, samples, config, tokenizer, folder / "cache")


def open_ours(blend: "Blend") -> Any:
    built = blend.make_indices(say=lambda _: None)
    return blend.open() if built is None else built


def open_theirs(blend: "Blend") -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    sizes, request = blend.request(blend.cache_dir)
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, request).build()[blend.split.value]


def contestants(blend: "Blend", folder: Path) -> dict[tuple[str, str], Run]:
    """(action, whose) -> a function without arguments that can run any number of times."""
    numbers = itertools.count()

    def run(of: Callable[["Blend"], Any], cache_dir: Path | None = None) -> object:
        return of(replace(blend, cache_dir=cache_dir or folder / f"cache_{next(numbers)}"))

    runs: dict[tuple[str, str], Run] = {}
    for whose, of in ((OURS, open_ours), (MEGATRON, open_theirs)):
        runs["build", whose] = lambda of=of: run(of)  # type: ignore[misc]
        runs["open", whose] = lambda of=of, kept=folder / whose: run(of, kept)  # type: ignore[misc]
    return runs


def peak_resident_bytes(run: Run) -> int:
    """Peak of resident memory while it runs, above what was resident before."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_blend(tokens: int, files: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Medians of build and open, ours and megatron-core's, with their ratios."""
    with tempfile.TemporaryDirectory(prefix="training_index_") as name:
        blend = make_blend(Path(name) / "data", tokens, files)
        runs = contestants(blend, Path(name))
        seconds = paired_seconds({" ".join(key): run for key, run in runs.items()}, repeats, device)
        peaks = {" ".join(key): peak_resident_bytes(run) for key, run in runs.items()}
        cached = replace(blend, cache_dir=Path(name) / OURS).cache.files()
    actions: dict[str, Any] = {}
    for action in ACTIONS:
        wall = {whose: [each.wall for each in seconds[f"{action} {whose}"]] for whose in (OURS, MEGATRON)}
        ratios = [ours / theirs for ours, theirs in zip(wall[OURS], wall[MEGATRON], strict=True)]
        actions[action] = {
            "median_seconds": {whose: median(values) for whose, values in wall.items()},
            "peak_bytes": {whose: peaks[f"{action} {whose}"] for whose in wall},
            "ratio": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        }
    actions["build"] |= {"limit": LIMIT_OF_BUILD, "met": actions["build"]["ratio"]["median"] <= LIMIT_OF_BUILD}
    return {"tokens": tokens, "files": files, "samples": blend.samples, "cache_bytes": sum(cached.values())} | actions


def measure(tokens: int, files: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """The whole report."""
    report: dict[str, Any] = {"surroundings": surroundings(device), "repeats": repeats}
    with process_group(device, timeout_s=300):
        report["blends"] = [measure_blend(tokens, number, repeats, device) for number in (1, files)]
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = []
    for blend in report["blends"]:
        for action in ACTIONS:
            measured = blend[action]
            ratio, limit = measured["ratio"], ""
            if "limit" in measured:
                limit = f"{measured['limit']}: {'met' if measured['met'] else 'missed'}"
            cells = [
                f"{measured['median_seconds'][whose]:.3f} s, {measured['peak_bytes'][whose] / 2**20:.0f} MiB"
                for whose in (OURS, MEGATRON)
            ]
            what = f"{blend['files']} x {blend['tokens'] // blend['files']:,} tokens"
            cells += [f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]", limit]
            rows.append([what, f"{blend['cache_bytes'] / 2**20:.1f} MiB", action, *cells])
    header = ["datasets", "indices", "action", OURS, MEGATRON, "ratio", "limit"]
    conditions = f"Sequence length {SEQUENCE_LENGTH}, medians of {report['repeats']} repeats in turns."
    return "\n".join([surroundings_line(report["surroundings"]), "", conditions, "", *table(header, rows)])


def run(arguments: Namespace) -> dict[str, Any]:
    return measure(arguments.tokens, arguments.files, arguments.repeats, prepare_device())


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("training_index", "Index caches of training beside megatron-core's")
    parser.add_argument("--tokens", type=PositiveInt, default=3_000_000_000, help="of the datasets together")
    parser.add_argument("--files", type=PositiveInt, default=128, help="datasets of the blend")
    parser.add_argument("--repeats", type=PositiveInt, default=9, help="times that everything is run")
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
