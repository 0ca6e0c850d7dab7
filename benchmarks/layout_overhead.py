"""What tensor and expert parallelism cost beside data parallelism: the same tokens on two processes.

    python -m benchmarks.layout_overhead [--repeats 15] [--json FILE]

Each layout has two processes over gloo, one thread each, that wait while another layout takes its turn. Data
parallelism communicates once a step, the others in every layer: on a machine whose processes share memory and processor
this shows the overhead of the code and of gloo, not of a network.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from benchmarks.measuring import (
    add_size_option,
    benchmark_parser,
    run_benchmark,
    surroundings,
    surroundings_line,
    table,
)
from benchmarks.two_processes import PROCESSES, side_by_side, step_cells, step_header, step_times
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
    report: dict[str, Any] = {"surroundings": surroundings(torch.device("cpu")), "repeats": repeats}
    with side_by_side({name: recipe(size, replace(parallel)) for name, parallel in LAYOUTS.items()}) as layouts:
        print("time: " + ", ".join(layouts), file=sys.stderr)
        report["layouts"] = step_times(layouts, REFERENCE, repeats)
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [[name, *step_cells(row)] for name, row in report["layouts"].items()]
    return "\n".join(
        [
            surroundings_line(report["surroundings"]),
            "",
            f"Two processes of one thread, {report['repeats']} repeats in turns; ratios within a repeat.",
            "",
            *table(["layout", *step_header(REFERENCE)], rows),
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
