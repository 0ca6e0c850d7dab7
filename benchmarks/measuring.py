"""What the benchmarks share: timing in turns, where they ran, tables."""

import importlib.metadata
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_fc

from data_tools.indexed_dataset import write_whole
from dsmoe_megatron.config import Config, ModelConfig, TrainConfig
from dsmoe_megatron.errors import DSMoEError, exit_with
from dsmoe_megatron.runtime.live_memory import no_garbage_collection

RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
WARMUPS = 2
Run = Callable[[], object]


@dataclass(frozen=True)
class Seconds:
    """One run: by the clock, and of processor time summed over the process's threads."""

    wall: float
    processor: float


def paired_seconds(runs: dict[str, Run], repeats: int, device: torch.device) -> dict[str, list[Seconds]]:
    """Every run in every repeat, in changing order: what ran before leaves its mark on the caches."""
    order = random.Random(1234)
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(WARMUPS):
        for run in runs.values():
            run()
    for _ in range(repeats):
        with no_garbage_collection():
            for name in order.sample(list(runs), len(runs)):
                seconds[name].append(_timed(runs[name], device))
    return seconds


def _timed(run: Run, device: torch.device) -> Seconds:
    wait_for(device)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    wait_for(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(config: Config, device: torch.device) -> Run:
    """One optimizer step on random tokens, by the engine that trains; model-parallel groups exist."""
    from dsmoe_megatron.training.engines.choice import build_engine

    engine, micro_batches = build_engine(config, device), random_micro_batches(config)
    return lambda: engine.train_step(micro_batches)


def random_micro_batches(config: Config) -> list[dict[str, torch.Tensor]]:
    """This rank's micro-batches of a global batch of random tokens."""
    from megatron.core import parallel_state

    train = config.train
    samples = train.global_batch_size // parallel_state.get_data_parallel_world_size()
    shape = (train.micro_batch_size, train.sequence_length)
    return [
        {
            "tokens": torch.randint(config.model.padded_vocab_size, shape),
            "labels": torch.randint(config.model.padded_vocab_size, shape),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(train.sequence_length).repeat(train.micro_batch_size, 1),
        }
        for _ in range(samples // train.micro_batch_size)
    ]


def single_batch(model: ModelConfig, samples: int, sequence_length: int) -> Config:
    """A recipe of one micro-batch per step."""
    train = TrainConfig(micro_batch_size=samples, global_batch_size=samples, sequence_length=sequence_length)
    return Config(model=model, train=train)


def processor_entry() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def surroundings(device: torch.device) -> dict[str, Any]:
    """The machine, how busy it is, and the versions of what computes."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor_entry().get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # before anything is measured
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "megatron-core")},
    }


def surroundings_line(around: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in around.items())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def benchmark_parser(module: str, description: str) -> ArgumentParser:
    """A command line with the option that every benchmark has."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    parser.add_argument("--json", type=Path_fc, default=None, metavar="FILE", help="write the report here as well")
    return parser


def add_size_option(parser: ArgumentParser) -> None:
    """The option of benchmarks that tests run whole, on something tiny."""
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: seconds, shows that all runs")


def run_benchmark(
    parser: ArgumentParser, measure: Callable[[Namespace], dict[str, Any]], as_markdown: Callable[[dict[str, Any]], str]
) -> None:
    """Measure, print the tables and write the report; a fault that the user can mend ends the process with one line.

    Args:
        parser: of benchmark_parser.
        measure: makes the report from the arguments.
        as_markdown: its tables.
    """
    arguments = parser.parse_args()
    try:
        report = measure(arguments)
    except DSMoEError as error:
        exit_with(error, parser.prog)
    print(as_markdown(report))
    if arguments.json is not None:
        write_whole(Path(arguments.json), (json.dumps(report, indent=2) + "\n").encode())
