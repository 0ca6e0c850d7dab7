"""What DeepSpeed's ZeRO costs beside megatron-core's engine: the same recipe on two data-parallel processes.

    python -m benchmarks.engines [--repeats 9] [--json FILE]

Each engine has two processes over gloo, one thread each, that wait while another takes its turn. Memory is that of live
tensors in a step, on the rank that has more; under offload both the GPU's and the host's tensors are the CPU's here.
"""

import sys
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
from dsmoe_megatron.config import Config, EngineConfig, ModelConfig, TrainConfig
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.planning.parameters import count_parameters

REFERENCE = "megatron"
ENGINES = {
    REFERENCE: EngineConfig(),
    "ZeRO-1": EngineConfig(name="deepspeed", zero_stage=1),
    "ZeRO-2": EngineConfig(name="deepspeed", zero_stage=2),
    "ZeRO-3": EngineConfig(name="deepspeed", zero_stage=3),
    "ZeRO-2, offload": EngineConfig(name="deepspeed", zero_stage=2, offload_optimizer=True),
}


def recipe(size: str, engine: EngineConfig) -> Config:
    """Two micro-batches per process."""
    scale = 4 if size == "full" else 1
    model = ModelConfig(
        hidden_size=128 * scale,
        num_hidden_layers=4,
        head_dim=16 * scale,
        num_experts=16,
        moe_intermediate_size=16 * scale,
        mi_alpha_attention=1e-3,
        mi_alpha_mlp=1e-3,
        vocab_size=512,
    )
    train = TrainConfig(micro_batch_size=1, global_batch_size=2 * PROCESSES, sequence_length=64 * scale)
    config = Config(model=model, train=train, engine=engine)
    check_config(config, PROCESSES)
    return config


def measure(size: str, repeats: int) -> dict[str, Any]:
    """The whole report."""
    report: dict[str, Any] = {
        "surroundings": surroundings(torch.device("cpu")),
        "parameters": count_parameters(recipe(size, EngineConfig()).model).total,
        "repeats": repeats,
    }
    with side_by_side({name: recipe(size, engine) for name, engine in ENGINES.items()}) as contestants:
        print("memory: " + ", ".join(contestants), file=sys.stderr)
        memory = {name: processes.memory() for name, processes in contestants.items()}
        print("time", file=sys.stderr)
        times = step_times(contestants, REFERENCE, repeats)
    report["engines"] = {
        name: {
            **own,
            "bytes_between_steps": max(each["before"] for each in memory[name]),
            "peak_bytes": max(each["peak"] for each in memory[name]),
        }
        for name, own in times.items()
    }
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    rows = [
        [
            name,
            *step_cells(row),
            f"{row['bytes_between_steps'] / 1e6:.0f} MB",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
        ]
        for name, row in report["engines"].items()
    ]
    header = ["engine", *step_header(REFERENCE), "between steps", "at most in a step"]
    return "\n".join(
        [
            surroundings_line(report["surroundings"]),
            "",
            f"{report['parameters']:,} parameters in float32, two processes of one thread, {report['repeats']} repeats "
            "in turns; ratios within a repeat, live tensors per process.",
            "",
            *table(header, rows),
        ]
    )


def run(arguments: Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    return measure(arguments.size, arguments.repeats)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("engines", "DeepSpeed's ZeRO beside megatron-core's engine")
    parser.add_argument("--repeats", type=PositiveInt, default=9, help="timed steps of each engine")
    add_size_option(parser)
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
