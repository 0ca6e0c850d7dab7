"""Whether a training step's cost grows with its work, and what gate and routers take of it.

    python -m benchmarks.scaling [--repeats 9] [--threads 2] [--json FILE]

One dimension at a time is doubled twice; the exponent of time is fitted beside that of the step's operations, which the
planner counts. The share of gate and routers is the profiler's, by operation.
"""

import math
import statistics
import sys
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import (
    add_size_option,
    benchmark_parser,
    paired_seconds,
    run_benchmark,
    single_batch,
    surroundings,
    surroundings_line,
    table,
    training_step,
)
from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig
from dsmoe_megatron.planning.flops import training_flops
from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device, process_group

SHARE_LIMIT = 0.03
# operations and autograd nodes that only gate and routers have; children count with their parents
GATE_AND_ROUTERS = (
    "RouterGatingLinearFunction",
    "aten::log_softmax",
    "_MutualInformation",
    "MoEAuxLossAutoScaler",
    "_ScaleBlocks",
    "autograd::engine::evaluate_function: RouterGatingLinearFunctionBackward",
    "autograd::engine::evaluate_function: LogSoftmaxBackward0",
    "autograd::engine::evaluate_function: _MutualInformationBackward",
    "autograd::engine::evaluate_function: MoEAuxLossAutoScalerBackward",
    "autograd::engine::evaluate_function: _ScaleBlocksBackward",
)
BASE = ModelConfig(
    hidden_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_attention_experts=4,
    head_dim=32,
    num_experts=16,
    moe_intermediate_size=64,
    mi_alpha_attention=1e-3,
    mi_alpha_mlp=1e-3,
    vocab_size=512,
)
TINY = replace(BASE, hidden_size=64, head_dim=8, moe_intermediate_size=16, vocab_size=128)


def growing(base: ModelConfig, sequence_length: int) -> dict[str, list[Config]]:
    """For each dimension three recipes, each twice as large in it as the one before."""
    factors = (1, 2, 4)
    plain = single_batch(base, 2, sequence_length)
    model_of = {
        "layers": lambda factor: replace(base, num_hidden_layers=factor * base.num_hidden_layers),
        "width (hidden, heads' and experts' width)": lambda factor: replace(
            base,
            hidden_size=factor * base.hidden_size,
            head_dim=factor * base.head_dim,
            moe_intermediate_size=factor * base.moe_intermediate_size,
        ),
        "MLP experts": lambda factor: replace(base, num_experts=factor * base.num_experts),
    }
    recipes = {name: [replace(plain, model=make(factor)) for factor in factors] for name, make in model_of.items()}
    recipes["sequence length"] = [single_batch(base, 2, factor * sequence_length) for factor in factors]
    recipes["micro-batches"] = [
        replace(plain, train=replace(plain.train, global_batch_size=factor * plain.train.micro_batch_size))
        for factor in factors
    ]
    return recipes


def scaling(name: str, configs: list[Config], repeats: int, device: torch.device) -> dict[str, Any]:
    """Median seconds and operations of each recipe, and the exponents fitted to both."""
    print(f"time: {name}", file=sys.stderr)
    runs = {str(index): training_step(config, device) for index, config in enumerate(configs)}
    seconds = [statistics.median(each.wall for each in run) for run in paired_seconds(runs, repeats, device).values()]
    operations = [step_operations(config) for config in configs]
    return {
        "dimension": name,
        "seconds": seconds,
        "operations": operations,
        "time_exponent": exponent(seconds),
        "operations_exponent": exponent(operations),
    }


def step_operations(config: Config) -> float:
    return training_flops(config).machine * config.train.global_batch_size * config.train.sequence_length


def exponent(values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms of values whose sizes double from one to the next."""
    logarithms = [math.log2(value) for value in values]
    places = range(len(values))
    mean_place, mean = statistics.mean(places), statistics.mean(logarithms)
    covariance = sum((place - mean_place) * (value - mean) for place, value in zip(places, logarithms, strict=True))
    return covariance / sum((place - mean_place) ** 2 for place in places)


def gate_share(name: str, config: Config, repeats: int, device: torch.device) -> dict[str, Any]:
    """Median share of a step's processor time inside gate and routers."""
    print(f"share: {name}", file=sys.stderr)
    step = training_step(config, device)
    step()
    shares = []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        events = profiler.key_averages()
        whole = sum(event.self_cpu_time_total for event in events)
        shares.append(sum(event.cpu_time_total for event in events if event.key in GATE_AND_ROUTERS) / whole)
    return {"name": name, "share": statistics.median(shares), "min": min(shares), "max": max(shares)}


def measure(size: str, repeats: int, device: torch.device) -> dict[str, Any]:
    """The whole report."""
    around = surroundings(device)
    base, sequence_length = (BASE, 512) if size == "full" else (TINY, 32)
    widths = {"width 64": TINY}
    if size == "full":
        paper_experts = replace(base, num_experts=32, num_hidden_layers=2)
        widths = {
            f"width {width}": replace(
                paper_experts, hidden_size=width, head_dim=width // 8, moe_intermediate_size=width // 8
            )
            for width in (256, 512, 1024, 2048)
        }
    with process_group(device, timeout_s=300), model_parallel_groups(ParallelConfig(), seed=1234):
        rows = [scaling(name, configs, repeats, device) for name, configs in growing(base, sequence_length).items()]
        shares = [
            gate_share(name, single_batch(model, 2, sequence_length), min(repeats, 5), device)
            for name, model in widths.items()
        ]
    return {"surroundings": around, "repeats": repeats, "scaling": rows, "share": shares}


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    scaling_rows = [
        [
            row["dimension"],
            " / ".join(f"{seconds * 1e3:.0f} ms" for seconds in row["seconds"]),
            f"{row['time_exponent']:.2f}",
            f"{row['operations_exponent']:.2f}",
        ]
        for row in report["scaling"]
    ]
    share_rows = [
        [
            row["name"],
            f"{row['share']:.1%} [{row['min']:.1%}, {row['max']:.1%}]",
            f"below {SHARE_LIMIT:.0%}: {'met' if row['share'] < SHARE_LIMIT else 'MISSED'}",
        ]
        for row in report["share"]
    ]
    return "\n".join(
        [
            surroundings_line(report["surroundings"]),
            "",
            f"Medians of {report['repeats']} repeats in turns; sizes x1, x2, x4.",
            "",
            *table(["dimension", "step", "exponent of time", "exponent of operations"], scaling_rows),
            "",
            *table(["step", "share of gate and routers, median [min, max]", "limit"], share_rows),
        ]
    )


def run(arguments: Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    return measure(arguments.size, arguments.repeats, prepare_device())


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("scaling", "How a training step's cost grows")
    parser.add_argument("--repeats", type=PositiveInt, default=9, help="timed runs of each size")
    parser.add_argument("--threads", type=PositiveInt, default=2, help="threads of one operation on the CPU")
    add_size_option(parser)
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
