"""What training an MoE densely costs, beside the dense model and megatron-core's own MoE layer.

    python benchmarks/dense_training.py [--repeats 18] [--threads 2] [--json FILE]

Three models of one size take turns in one process: the dense baseline; DS-MoE; and megatron-core's MoELayer with top-k
= all experts, which computes the same sum through its token dispatcher. Measured are one MLP layer (forward and
backward) and a whole training step, in time and in live tensor bytes. Seconds depend on the machine and on what else
runs there: the results are ratios within a repeat; the order of the models changes from repeat to repeat.
"""

import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fc, PositiveInt
from torch.profiler import ProfilerActivity, profile

from data_tools.indexed_dataset import write_whole
from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import DSMoEError, exit_with
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device, process_group

DENSE, DSMOE, MEGATRON = CONTESTANTS = ("dense", "DS-MoE", "Megatron-Core MoE")
RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
WARMUPS = 2

Run = Callable[[], object]
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
        Case("MLP layer", _alone(narrow_layer, samples=1, sequence_length=2048), layer_pass),
        Case("MLP layer of DS-MoE-1B", _alone(layer_1b, samples=1, sequence_length=512), layer_pass),
        Case("training step, 1/8 of DS-MoE-1B", _alone(eighth_of_1b, samples=8, sequence_length=256), training_step),
        Case("training step, 1/2 of DS-MoE-1B", _alone(half_of_1b, samples=2, sequence_length=512), training_step),
        Case("training step, quickstart", quickstart, training_step),
    ]


def tiny_cases() -> list[Case]:
    """Seconds in all: shows that everything runs, says nothing of speed."""
    tiny = ModelConfig(hidden_size=64, head_dim=8, vocab_size=128, mi_alpha_attention=1e-3, mi_alpha_mlp=1e-3)
    config = _alone(tiny, samples=4, sequence_length=128)
    return [Case("MLP layer", config, layer_pass), Case("training step", config, training_step)]


def _alone(model: ModelConfig, samples: int, sequence_length: int) -> Config:
    train = TrainConfig(micro_batch_size=samples, global_batch_size=samples, sequence_length=sequence_length)
    return Config(model=model, train=train)


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


def training_step(config: Config, device: torch.device) -> Run:
    """One optimizer step on random tokens, by the engine that trains."""
    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    engine = MegatronEngine(config, device)
    train = config.train
    shape = (train.micro_batch_size, train.sequence_length)
    micro_batches = [
        {
            "tokens": torch.randint(config.model.padded_vocab_size, shape),
            "labels": torch.randint(config.model.padded_vocab_size, shape),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(train.sequence_length).expand(shape),
        }
        for _ in range(train.global_batch_size // train.micro_batch_size)
    ]
    return lambda: engine.train_step(micro_batches)


@dataclass(frozen=True)
class Seconds:
    """One run: by the clock, and of processor time summed over the process's threads."""

    wall: float
    processor: float


def paired_seconds(runs: dict[str, Run], repeats: int, device: torch.device) -> dict[str, list[Seconds]]:
    """Every run in every repeat, one order of them after the other: what ran before leaves its mark on the caches."""
    orders = list(itertools.permutations(runs))
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(WARMUPS):
        for run in runs.values():
            run()
    for repeat in range(repeats):
        with _no_garbage_collection():
            for name in orders[repeat % len(orders)]:
                seconds[name].append(_timed(runs[name], device))
    return seconds


def _timed(run: Run, device: torch.device) -> Seconds:
    _wait_for(device)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    _wait_for(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class LiveBytes:
    """Bytes of the tensors that are alive.

    Attributes:
        before: when the step begins: weights, gradient buffers, optimizer state, the batch.
        own_peak: what the step holds beyond that at its highest point: activations, their gradients, temporaries.
        peak: both together.
    """

    before: int
    own_peak: int
    peak: int


def live_bytes(case: Case, config: Config, device: torch.device) -> LiveBytes:
    """Of a model's second step: the optimizer's state exists from the first one on."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    gc.collect()
    of_others = storage_bytes(device)
    step = case.build(config, device)
    step()
    with _no_garbage_collection():
        before = storage_bytes(device) - of_others
        with profile(activities=activities, profile_memory=True) as profiler:
            step()
            _wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        own_peak = peak_of_allocations(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"], device)
    return LiveBytes(before, own_peak, before + own_peak)


def storage_bytes(device: torch.device) -> int:
    """Of all tensors that Python knows, views and their base counted once."""
    tensors = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device == device)
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_of_allocations(events: Sequence[dict[str, Any]], device: torch.device) -> int:
    """The highest running total of the allocations and frees in a Chrome trace of the profiler."""
    device_type = 1 if device.type == "cuda" else 0  # c10::DeviceType
    moves = (event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == device_type)
    alive: dict[int, int] = {}
    total = peak = 0
    for move in sorted(moves, key=lambda move: move["ts"]):
        address, size = move["args"]["Addr"], move["args"]["Bytes"]
        # what is freed counts only if it was born here. A block still there at an address that is given out again was
        # freed unseen: gloo's thread, which the profiler does not watch, was the last to hold it
        total -= alive.pop(address, 0)
        if size > 0:
            alive[address] = size
            total += size
        peak = max(peak, total)
    return peak


def measure(cases: Sequence[Case], repeats: int, device: torch.device) -> dict[str, Any]:
    """The whole report."""
    around = surroundings(device)
    layers, steps = ([case for case in cases if case.build is build] for build in (layer_pass, training_step))
    with process_group(device, timeout_minutes=5), model_parallel_groups(ParallelConfig(), seed=1234):
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
    live = {name: asdict(live_bytes(case, config, device)) for name, config in configs.items()}
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
    flags = {*_processor().get("flags", "").split(), *_processor().get("Features", "").split()}
    return device.type == "cuda" or bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _processor() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def surroundings(device: torch.device) -> dict[str, Any]:
    """The machine, how busy it is, and the versions of what computes."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor().get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # before anything is measured
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "megatron-core")},
    }


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
        ", ".join(f"{name} {value}" for name, value in report["surroundings"].items()),
        "",
        f"Time: medians of {report['repeats']} repeats; ratios within a repeat, median [min, max] / of processor time.",
        "",
        *_table(["what", "size", *CONTESTANTS, *ratio_columns], times),
        "",
        "Live tensor bytes:",
        "",
        *_table(["what", "bytes", *CONTESTANTS, ratio_columns[0]], memory),
    ]
    if not any("bf16" in row["name"] for row in report["time"]):
        lines += ["", "The layer's time in bf16 was not measured: this processor has no instructions for it."]
    return "\n".join(lines)


def _time_ratio_text(ratio: dict[str, Any]) -> str:
    spread = f"[{ratio['min']:.2f}, {ratio['max']:.2f}]"
    return f"{ratio['median']:.2f} {spread} / {ratio['processor_time']:.2f}{_verdict(ratio)}"


def _verdict(judged: dict[str, Any]) -> str:
    return f", {judged['limit']}: {'met' if judged['met'] else 'MISSED'}" if "met" in judged else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="dense_training.py", description="Speed and memory of dense MoE training")
    parser.add_argument("--repeats", type=PositiveInt, default=18, help="timed runs of each model")
    parser.add_argument("--threads", type=PositiveInt, default=2, help="threads of one operation on the CPU")
    parser.add_argument("--json", type=Path_fc, default=None, metavar="FILE", help="write the report here as well")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: seconds, shows that all runs")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        cases = full_cases() if arguments.size == "full" else tiny_cases()
        report = measure(cases, arguments.repeats, prepare_device())
    except DSMoEError as error:
        exit_with(error, "dense_training")
    print(as_markdown(report))
    if arguments.json is not None:
        write_whole(Path(arguments.json), (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
