"""What tensor and expert parallelism cost beside data parallelism: the same tokens on two processes.

    python -m benchmarks.layout_overhead [--repeats 15] [--json FILE]

Each layout has two processes over gloo, one thread each, that wait while another layout takes its turn. Data
parallelism communicates once a step, the others in every layer: on a machine whose processes share memory and processor
this shows the overhead of the code and of gloo, not of a network.
"""

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from benchmarks.measuring import (
    add_size_option,
    benchmark_parser,
    paired_seconds,
    run_benchmark,
    surroundings,
    surroundings_line,
    table,
)
from benchmarks.two_processes import PROCESSES, TwoProcesses
from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from dsmoe_megatron.config_rules import check_config

REFERENCE = "DP2"
LAYOUTS = {
    REFERENCE: ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "TP2+SP": ParallelConfig(tensor=2, sequence=True),
    "EP2": ParallelConfig(expert=2),
}


def recipe(size: str, parallel: ParallelConfig) -> Config:
    """One micro-batch per data-parallel rank; the tokens of a step are the same in every layout."""
    scale = 4 if size == "full" else 1
    model = ModelConfig(
        hidden_size=128 * scale,
        num_hidden_layers=2,
        head_dim=16 * scale,
        num_experts=16,
        moe_intermediate_size=16 * scale,
        mi_alpha_attention=1e-3,
        mi_alpha_mlp=1e-3,
        vocab_size=512,
    )
    data_parallel = PROCESSES // parallel.tensor
    train = TrainConfig(micro_batch_size=4 // data_parallel, global_batch_size=4, sequence_length=64 * scale)
    config = Config(model=model, parallel=parallel, train=train)
    check_config(config, PROCESSES)
    return config


def measure(size: str, repeats: int) -> dict[str, Any]:
    """The whole report."""
    device = torch.device("cpu")
    report: dict[str, Any] = {"surroundings": surroundings(device), "repeats": repeats}
    with tempfile.TemporaryDirectory() as stores:
        layouts = {
            name: TwoProcesses(recipe(size, replace(parallel)), Path(stores) / name)
            for name, parallel in LAYOUTS.items()
        }
        try:
            print("time: " + ", ".join(layouts), file=sys.stderr)
            seconds = paired_seconds({name: layout.step for name, layout in layouts.items()}, repeats, device)
        finally:
            for layout in layouts.values():
                layout.stop()
    reference = [each.wall for each in seconds[REFERENCE]]
    report["layouts"] = {
        name: {
            "median_seconds": statistics.median(each.wall for each in own),
            "ratios": sorted(each.wall / other for each, other in zip(own, reference, strict=True)),
        }
        for name, own in seconds.items()
    }
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        [
            name,
            f"{row['median_seconds'] * 1e3:.0f} ms",
            f"{statistics.median(row['ratios']):.2f} [{row['ratios'][0]:.2f}, {row['ratios'][-1]:.2f}]",
        ]
        for name, row in report["layouts"].items()
    ]
    return "\n".join(
        [
            surroundings_line(report["surroundings"]),
            "",
            f"Two processes of one thread, {report['repeats']} repeats in turns; ratios within a repeat.",
            "",
            *table(["layout", "step", f"of {REFERENCE}, median [min, max]"], rows),
        ]
    )


def run(arguments: Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    return measure(arguments.size, arguments.repeats)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("layout_overhead", "TP and EP beside DP")
    parser.add_argument("--repeats", type=PositiveInt, default=15, help="timed steps of each layout")
    add_size_option(parser)
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
