"""Training steps of the recipes of one size on one GPU, and what `estimate` says of them.

    python -m benchmarks.gpu_training [--recipes NAME ...] [--micro-batches 8] [--steps 6] [--gpu h100] [--kernels N]

Each model by itself, in the recipe's precision and micro-batch, on random tokens: time of a step between two waits for
the device, the peak of the allocator's live bytes, and both as they were estimated.
"""

import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from benchmarks.measuring import (
    RECIPES,
    Run,
    add_size_option,
    benchmark_parser,
    paired_seconds,
    run_benchmark,
    surroundings,
    surroundings_line,
    table,
    training_step,
)
from dsmoe_megatron.config import Config, ParallelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import DSMoEError
from dsmoe_megatron.planning.estimate import estimate
from dsmoe_megatron.planning.flops import training_flops
from dsmoe_megatron.planning.hardware import Hardware, load_hardware
from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device, process_group

ONE_SIZE = ["dense_1b", "dsmoe_1b", "smoe_1b"]
GIB = 2**30


def on_one_gpu(recipe: str, micro_batches: int, is_tiny: bool) -> Config:
    """A recipe cut to one process, with so many micro-batches in a step."""
    config = load_config(RECIPES / f"{recipe}.yaml")
    train = replace(config.train, global_batch_size=micro_batches * config.train.micro_batch_size)
    model = replace(config.model, num_hidden_layers=2) if is_tiny else config.model
    return replace(config, model=model, parallel=ParallelConfig(), train=train)


def measure(
    configs: dict[str, Config], steps: int, hardware: Hardware, kernels: int, device: torch.device
) -> dict[str, Any]:
    """The whole report."""
    around = surroundings(device)
    with process_group(device, timeout_s=300), model_parallel_groups(ParallelConfig(), seed=1234):
        models = [measure_model(name, config, steps, hardware, kernels, device) for name, config in configs.items()]
    return {"surroundings": around, "steps": steps, "models": models}


def measure_model(
    name: str, config: Config, steps: int, hardware: Hardware, kernels: int, device: torch.device
) -> dict[str, Any]:
    """One model's seconds and bytes, measured and estimated."""
    print(name, file=sys.stderr, flush=True)
    gc.collect()  # the model before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step = training_step(config, device)
    seconds = [each.wall for each in paired_seconds({name: step}, steps, device)[name]]
    peak = torch.cuda.max_memory_allocated(device)
    if kernels:
        print(_longest_kernels(step, kernels), file=sys.stderr)
    expected = estimate(config, 1, hardware)
    tokens = config.train.global_batch_size * config.train.sequence_length
    flops = tokens * training_flops(config).model
    median = statistics.median(seconds)
    return {
        "model": name,
        "tokens": tokens,
        "micro_batch": config.train.micro_batch_size,
        "seconds": seconds,
        "tokens_per_s": tokens / median,
        "tflops_per_s": flops / median / 1e12,
        "mfu": flops / median / hardware.flops[config.train.precision],
        "peak_bytes": peak,
        "estimated_seconds": expected.time.total,
        "estimated_bytes": expected.peak_memory,
    }


def _longest_kernels(step: Run, count: int) -> str:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    by_kernel = profile.key_averages()
    return str(by_kernel.table(sort_by="self_cuda_time_total", row_limit=count, max_name_column_width=70))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    header = ["Model", "Tokens a step", "Step [s]", "Estimated", "Tokens/s", "TFLOP/s", "MFU", "Peak", "Estimated"]
    rows = [
        [
            f"`{model['model']}`",
            f"{model['tokens']:,} in micro-batches of {model['micro_batch']}",
            f"{statistics.median(model['seconds']):.3f} [{min(model['seconds']):.3f}, {max(model['seconds']):.3f}]",
            f"{model['estimated_seconds']:.3f}",
            f"{model['tokens_per_s']:,.0f}",
            f"{model['tflops_per_s']:.0f}",
            f"{model['mfu']:.1%}",
            f"{model['peak_bytes'] / GIB:.1f} GiB",
            f"{model['estimated_bytes'] / GIB:.1f} GiB",
        ]
        for model in report["models"]
    ]
    about = f"Medians of {report['steps']} steps, in brackets the shortest and the longest."
    return "\n".join([surroundings_line(report["surroundings"]), "", about, "", *table(header, rows)])


def run(arguments: Namespace) -> dict[str, Any]:
    device = prepare_device()
    if device.type != "cuda":
        raise DSMoEError("there is no CUDA device, and nothing else that this could measure")
    is_tiny = arguments.size == "tiny"
    names: Sequence[str] = arguments.recipes
    configs = {name: on_one_gpu(name, arguments.micro_batches, is_tiny) for name in names}
    return measure(configs, arguments.steps, load_hardware(arguments.gpu), arguments.kernels, device)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("gpu_training", "Training steps on one GPU")
    parser.add_argument("--recipes", type=str, nargs="+", default=ONE_SIZE, metavar="NAME", help="of launchers/recipes")
    parser.add_argument("--micro-batches", type=PositiveInt, default=8, help="of a step")
    parser.add_argument("--steps", type=PositiveInt, default=6, help="timed steps of each model")
    parser.add_argument("--gpu", type=str, default="h100", metavar="NAME", help="row of planning/hardware.yaml")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="print the N longest kernels of a step too")
    add_size_option(parser)
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
