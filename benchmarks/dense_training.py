"""What training an MoE densely costs, beside the dense model and megatron-core's own MoE layer.

    python -m benchmarks.dense_training [--repeats 18] [--threads 2] [--json FILE]

Three models of one size take turns in one process: the dense baseline; DS-MoE; and megatron-core's MoELayer with top-k
= all experts, which computes the same sum through its token dispatcher. Measured are one MLP layer (forward and
backward) and a whole training step, in time and in live tensor bytes. Seconds depend on the machine and on what else
runs there: the results are ratios within a repeat; the order of the models changes from repeat to repeat.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from benchmarks.measuring import (
    RECIPES,
    Run,
    Seconds,
    add_size_option,
    benchmark_parser,
    paired_seconds,
    processor_entry,
    run_benchmark,
    single_batch,
    surroundings,
    surroundings_line,
    table,
    training_step,
)
from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device, process_group
from dsmoe_megatron.runtime.live_memory import live_bytes

DENSE, DSMOE, MEGATRON = CONTESTANTS = ("dense", "DS-MoE", "Megatron-Core MoE")

Build = Callable[[Config, torch.device], Run]


@dataclass(frozen=True)
class Limit:
    """What the ratio of one model to another is held against."""

    model: str
    to: str
    bound: Literal["at most", "at least"]
    value: float

    def verdict(self, ratio: float) -> dict[str, object]:
        met = ratio <= self.value if self.bound == "at most" else ratio >= self.value
        return {"limit": f"{self.bound} {self.value}", "met": met}


TIME_LIMITS = (Limit(DSMOE, DENSE, "at most", 1.05), Limit(MEGATRON, DSMOE, "at least", 3.0))
MEMORY_LIMIT = Limit(DSMOE, DENSE, "at most", 1.15)


@dataclass(frozen=True)
class Case:
    """One thing that is measured for all three models.

    Attributes:
        name: what it is.
        config: the DS-MoE; the other models are made from it.
        build: makes what is run from a model's recipe.
    """

    name: str
    config: Config
    build: Build

    @property
    def is_judged(self) -> bool:
        return self.config.train.precision == "fp32"

    @property
    def size(self) -> str:
        model, train = self.config.model, self.config.train
        return (
            f"hidden {model.hidden_size}, {model.num_experts} experts of {model.moe_intermediate_size}, "
            f"{train.global_batch_size * train.sequence_length} tokens"
        )


def full_cases() -> list[Case]:
    """A narrow layer in the paper's proportions and DS-MoE-1B's own; narrow models and one of half its width."""
    recipe_1b, quickstart = (load_config(RECIPES / name) for name in ("dsmoe_1b.yaml", "quickstart.yaml"))
    # megatron-core's MoELayer has no router of two layers
    layer_1b = replace(recipe_1b.model, router_type="linear", vocab_size=128)
    narrow_layer = replace(layer_1b, hidden_size=512, moe_intermediate_size=64)
    eighth_of_1b = replace(
        layer_1b,
        hidden_size=256,
        num_hidden_layers=6,
        moe_intermediate_size=32,
        num_attention_experts=4,
        num_attention_heads=8,
        head_dim=32,
        vocab_size=2048,
    )
    half_of_1b = replace(
        layer_1b, hidden_size=1024, num_hidden_layers=2, moe_intermediate_size=128, head_dim=64, vocab_size=2048
    )
    return [
        Case("MLP layer", single_batch(narrow_layer, 1, 2048), layer_pass),
        Case("MLP layer of DS-MoE-1B", single_batch(layer_1b, 1, 512), layer_pass),
        Case("training step, 1/8 of DS-MoE-1B", single_batch(eighth_of_1b, 8, 256), training_step),
        Case("training step, 1/2 of DS-MoE-1B", single_batch(half_of_1b, 2, 512), training_step),
        Case("training step, quickstart", quickstart, training_step),
    ]


def tiny_cases() -> list[Case]:
    """Seconds in all: shows that everything runs, says nothing of speed."""
    tiny = ModelConfig(hidden_size=64, head_dim=8, vocab_size=128, mi_alpha_attention=1e-3, mi_alpha_mlp=1e-3)
    config = single_batch(tiny, samples=4, sequence_length=128)
    return [Case("MLP layer", config, layer_pass), Case("training step", config, training_step)]


def contestants(config: Config) -> dict[str, Config]:
    """The recipe of a DS-MoE, and those of the two models that it is compared with.

    Both have its MLP's and attention's matrices, but plain grouped-query attention: megatron-core knows no mixture of
    attention heads. The dense one has no routers, megatron-core's has those of the MLPs.
    """
    plain = replace(
        config.model, attention_type="gqa", num_attention_experts=1, mi_alpha_attention=0.0, mi_alpha_mlp=0.0
    )
    # with every expert on every token nothing is left to balance
    all_experts = replace(plain, num_experts_per_tok=plain.num_experts, switch_loss_coefficient=0.0)
    models = {
        DENSE: replace(plain, num_experts=1, moe_intermediate_size=plain.intermediate_size),
        DSMOE: config.model,
        MEGATRON: replace(all_experts, expert_training="sparse"),
    }
    configs = {name: replace(config, model=model) for name, model in models.items()}
    for contestant in configs.values():
        check_config(contestant, world_size=1)
    return configs


def layer_pass(config: Config, device: torch.device) -> Run:
    """Forward and backward pass of one MLP layer, with the gradients of its weights and its input."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from dsmoe_megatron.model.gpt import build_chunks
    from dsmoe_megatron.model.transformer_config import transformer_config
    from dsmoe_megatron.runtime.backends import layer_backend

    config = replace(config, model=replace(config.model, num_hidden_layers=1))
    transformer = transformer_config(config, device)
    (chunk,) = build_chunks(config, transformer, layer_backend(device))
    layer = chunk.decoder.layers[0].mlp.to(device).train()
    shape = (config.train.sequence_length, config.train.micro_batch_size, config.model.hidden_size)
    hidden_SBH = torch.randn(shape, device=device, dtype=transformer.params_dtype, requires_grad=True)
    gradient_SBH = torch.randn_like(hidden_SBH)
    # the schedule's part: the weight of auxiliary losses, in the shape that it will have for the next training step
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device))

    def run() -> None:
        hidden_SBH.grad = None
        layer.zero_grad(set_to_none=True)
        output_SBH, _ = layer(hidden_SBH)
        output_SBH.backward(gradient_SBH)

    return run


def measure(cases: Sequence[Case], repeats: int, device: torch.device) -> dict[str, Any]:
    """The whole report."""
    around = surroundings(device)
    layers, steps = ([case for case in cases if case.build is build] for build in (layer_pass, training_step))
    with process_group(device, timeout_s=300), model_parallel_groups(ParallelConfig(), seed=1234):
        # bytes in bf16, which real runs train in, are the same where its products are slow
        memory = [measure_memory(case, device) for case in (*steps, in_bf16(steps[0]))]
        timed = [*cases, in_bf16(layers[0])] if supports_bf16(device) else cases
        timings = [measure_time(case, repeats, device) for case in timed]
    return {"surroundings": around, "repeats": repeats, "time": timings, "memory": memory}


def in_bf16(case: Case) -> Case:
    train = replace(case.config.train, precision="bf16")
    return replace(case, name=f"{case.name}, bf16", config=replace(case.config, train=train))


def measure_time(case: Case, repeats: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of each model, and the ratios that are limited (in float32)."""
    print(f"time: {case.name} ({case.size})", file=sys.stderr)
    runs = {name: case.build(config, device) for name, config in contestants(case.config).items()}
    seconds = paired_seconds(runs, repeats, device)
    return {
        "name": case.name,
        "size": case.size,
        "median_seconds": {name: statistics.median(each.wall for each in seconds[name]) for name in runs},
        "ratios": [time_ratio(seconds, limit, case.is_judged) for limit in TIME_LIMITS],
    }


def time_ratio(seconds: dict[str, list[Seconds]], limit: Limit, judged: bool) -> dict[str, Any]:
    """Of the ratios within each repeat; that of processor time shows how much other processes moved the one judged."""
    pairs = list(zip(seconds[limit.model], seconds[limit.to], strict=True))
    ratios = [one.wall / other.wall for one, other in pairs]
    median = statistics.median(ratios)
    return {
        "of": limit.model,
        "to": limit.to,
        "median": median,
        "min": min(ratios),
        "max": max(ratios),
        "processor_time": statistics.median(one.processor / other.processor for one, other in pairs),
        **(limit.verdict(median) if judged else {}),
    }


def measure_memory(case: Case, device: torch.device) -> dict[str, Any]:
    """Live bytes of each model, and the limited ratio: of the step's own and of all."""
    print(f"memory: {case.name} ({case.size})", file=sys.stderr)
    configs = contestants(case.config)
    live = {name: asdict(live_bytes(partial(case.build, config, device), device)) for name, config in configs.items()}
    ratios = {}
    for kind in ("own_peak", "peak"):
        ratio = live[MEMORY_LIMIT.model][kind] / live[MEMORY_LIMIT.to][kind]
        ratios[kind] = {"ratio": ratio, **(MEMORY_LIMIT.verdict(ratio) if case.is_judged else {})}
    return {
        "name": case.name,
        "size": case.size,
        "parameters": {name: count_parameters(config.model).total for name, config in configs.items()},
        "bytes": live,
        "ratios": ratios,
    }


def supports_bf16(device: torch.device) -> bool:
    """Whether bf16 products are computed in hardware; emulated ones are slower than float32's and tell nothing."""
    flags = {*processor_entry().get("flags", "").split(), *processor_entry().get("Features", "").split()}
    return device.type == "cuda" or bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    times = [
        [row["name"], row["size"]]
        + [f"{row['median_seconds'][name] * 1e3:.0f} ms" for name in CONTESTANTS]
        + [_time_ratio_text(ratio) for ratio in row["ratios"]]
        for row in report["time"]
    ]
    kinds = {"before": "before the step", "own_peak": "the step's own peak", "peak": "peak in all"}
    memory = [
        [row["name"], meaning]
        + [f"{row['bytes'][name][kind] / 2**20:.1f} MiB" for name in CONTESTANTS]
        + [f"{ratio['ratio']:.2f}{_verdict(ratio)}" if (ratio := row["ratios"].get(kind)) else ""]
        for row in report["memory"]
        for kind, meaning in kinds.items()
    ]
    ratio_columns = [f"{limit.model} / {limit.to}" for limit in TIME_LIMITS]
    lines = [
        surroundings_line(report["surroundings"]),
        "",
        f"Time: medians of {report['repeats']} repeats; ratios within a repeat, median [min, max] / of processor time.",
        "",
        *table(["what", "size", *CONTESTANTS, *ratio_columns], times),
        "",
        "Live tensor bytes:",
        "",
        *table(["what", "bytes", *CONTESTANTS, ratio_columns[0]], memory),
    ]
    if not any("bf16" in row["name"] for row in report["time"]):
        lines += ["", "The layer's time in bf16 was not measured: this processor has no instructions for it."]
    return "\n".join(lines)


def _time_ratio_text(ratio: dict[str, Any]) -> str:
    spread = f"[{ratio['min']:.2f}, {ratio['max']:.2f}]"
    return f"{ratio['median']:.2f} {spread} / {ratio['processor_time']:.2f}{_verdict(ratio)}"


def _verdict(judged: dict[str, Any]) -> str:
    return f", {judged['limit']}: {'met' if judged['met'] else 'MISSED'}" if "met" in judged else ""


def run(arguments: Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    cases = full_cases() if arguments.size == "full" else tiny_cases()
    return measure(cases, arguments.repeats, prepare_device())


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("dense_training", "Speed and memory of dense MoE training")
    parser.add_argument("--repeats", type=PositiveInt, default=18, help="timed runs of each model")
    parser.add_argument("--threads", type=PositiveInt, default=2, help="threads of one operation on the CPU")
    add_size_option(parser)
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
