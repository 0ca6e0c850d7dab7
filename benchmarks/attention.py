"""Memory and time of the core attention against the length of the sequence, beside megatron-core's own.

    python -m benchmarks.attention [--lengths 2048 8192 32768] [--threads 2] [--json FILE]

Forward and backward pass over one sample. megatron-core's DotProductAttention writes out heads x sequence x sequence
scores, so it is measured up to --longest-written-out. Both after a prefix (a context-parallel rank's later piece) and
without. Live bytes are the profiler's, without the inputs.
"""

import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from benchmarks.measuring import benchmark_parser, run_benchmark, surroundings, surroundings_line, table
from benchmarks.scaling import exponent
from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig
from dsmoe_megatron.model.causal_attention import causal_attention
from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device, process_group
from dsmoe_megatron.runtime.live_memory import live_bytes

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 4, 2, 64
OURS, AFTER_PREFIX, MEGATRON = "ours", "ours, last quarter of the queries", "Megatron-Core DotProductAttention"

Attention = Callable[..., torch.Tensor]


def contestants(device: torch.device) -> dict[str, Attention]:
    """Functions of query, key and value in megatron-core's layout, [S, B, heads, D]."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from dsmoe_megatron.model.core_attention import ScaledDotProductCoreAttention
    from dsmoe_megatron.model.transformer_config import transformer_config

    model = ModelConfig(num_attention_heads=HEADS, num_key_value_heads=KEY_VALUE_HEADS, head_dim=HEAD_DIM)
    model.attention_type, model.num_attention_experts = "gqa", 1
    transformer = transformer_config(Config(model=model), device)
    ours = ScaledDotProductCoreAttention(
        transformer, AttnMaskType.causal, pg_collection=SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    )
    theirs = DotProductAttention(transformer, 1, AttnMaskType.causal, "self")

    def after_prefix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        last = query[-(query.shape[0] // 4) :]
        return causal_attention(last.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))

    return {
        OURS: lambda *parts: ours(*parts, None),
        AFTER_PREFIX: after_prefix,
        MEGATRON: lambda query, key, value: theirs(query, key, value, causal_mask(query.shape[0], device)),
    }


def causal_mask(length: int, device: torch.device) -> torch.Tensor:
    """True where megatron-core must not look, [1, 1, S, S]."""
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)


def measure_length(attention: Attention, length: int, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward pass, and its own peak of live bytes."""
    heads = (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    parts = [torch.randn(length, 1, each, HEAD_DIM, device=device, requires_grad=True) for each in heads]

    def run() -> None:
        attention(*parts).sum().backward()

    run()  # the gradients exist from here on
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": live_bytes(lambda: run, device).own_peak}


def measure(lengths: list[int], longest_written_out: int, device: torch.device) -> dict[str, Any]:
    """The whole report."""
    report: dict[str, Any] = {"surroundings": surroundings(device), "lengths": lengths, "attention": {}}
    with process_group(device, timeout_s=300), model_parallel_groups(ParallelConfig(), seed=1234):
        for name, attention in contestants(device).items():
            print(f"attention: {name}", file=sys.stderr)
            own_lengths = [length for length in lengths if name != MEGATRON or length <= longest_written_out]
            report["attention"][name] = [measure_length(attention, length, device) for length in own_lengths]
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a table."""
    lengths = report["lengths"]
    rows = []
    for name, measured in report["attention"].items():
        cells = [f"{each['bytes'] / 2**20:.0f} MiB, {each['seconds']:.2f} s" for each in measured]
        cells += ["not run"] * (len(lengths) - len(measured))
        step = math.log2(lengths[1] / lengths[0])
        rows.append([name, *cells, f"{exponent([each['bytes'] for each in measured]) / step:.2f}"])
    header = ["attention", *(f"{length:,} tokens" for length in lengths), "exponent of memory"]
    shape = f"{HEADS} heads over {KEY_VALUE_HEADS} key/value heads of {HEAD_DIM}, one sample, float32."
    return "\n".join([surroundings_line(report["surroundings"]), "", shape, "", *table(header, rows)])


def run(arguments: Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    return measure(arguments.lengths, arguments.longest_written_out, prepare_device())


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("attention", "Core attention against the length")
    parser.add_argument("--lengths", type=list[PositiveInt], default=[2048, 8192, 32768], help="a geometric series")
    parser.add_argument("--longest-written-out", type=PositiveInt, default=8192, help="Megatron-Core's is run up to it")
    parser.add_argument("--threads", type=PositiveInt, default=2, help="threads of one operation on the CPU")
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
