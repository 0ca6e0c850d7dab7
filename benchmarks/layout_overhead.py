"""What tensor and expert parallelism cost beside data parallelism: the same tokens on two processes.

    python -m benchmarks.layout_overhead [--repeats 15] [--json FILE]

Each layout has two processes over gloo, one thread each, that wait while another layout takes its turn. Data
parallelism communicates once a step, the others in every layer: on a machine whose processes share memory and processor
this shows the overhead of the code and of gloo, not of a network.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fc, PositiveInt

from benchmarks.measuring import paired_seconds, random_micro_batches, surroundings, surroundings_line, table
from data_tools.indexed_dataset import write_whole
from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import DSMoEError, exit_with
from dsmoe_megatron.runtime.distributed import end_with_parent, model_parallel_groups, prepare_device

REFERENCE = "DP2"
LAYOUTS = {
    REFERENCE: ParallelConfig(),
    "TP2": ParallelConfig(tensor=2),
    "TP2+SP": ParallelConfig(tensor=2, sequence=True),
    "EP2": ParallelConfig(expert=2),
}
PROCESSES = 2


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


class Layout:
    """The processes of one layout; `step` runs one training step in all of them."""

    def __init__(self, config: Config, store: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(PROCESSES):
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, config, rank, str(store)), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(connection)
            self.processes.append(process)

    def step(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for connection in self.connections:
            connection.recv()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(connection: Connection, config: Config, rank: int, store: str) -> None:
    import torch.distributed as dist

    end_with_parent()
    torch.set_num_threads(1)
    device = prepare_device()

    from megatron.core import parallel_state

    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=timeout)
    with model_parallel_groups(config.parallel, config.train.seed):
        engine = MegatronEngine(config, device)
        batches = random_micro_batches(config, parallel_state.get_data_parallel_world_size())
        while True:
            try:
                connection.recv()
            except EOFError:
                return
            engine.train_step(batches)
            connection.send(None)


def measure(size: str, repeats: int) -> dict[str, Any]:
    """The whole report."""
    device = torch.device("cpu")
    report: dict[str, Any] = {"surroundings": surroundings(device), "repeats": repeats}
    with tempfile.TemporaryDirectory() as stores:
        layouts = {
            name: Layout(recipe(size, replace(parallel)), Path(stores) / name) for name, parallel in LAYOUTS.items()
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


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m benchmarks.layout_overhead", description="TP and EP beside DP")
    parser.add_argument("--repeats", type=PositiveInt, default=15, help="timed steps of each layout")
    parser.add_argument("--json", type=Path_fc, default=None, metavar="FILE", help="write the report here as well")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: seconds, shows that all runs")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    torch.set_num_threads(1)
    try:
        report = measure(arguments.size, arguments.repeats)
    except DSMoEError as error:
        exit_with(error, "layout_overhead")
    print(as_markdown(report))
    if arguments.json is not None:
        write_whole(Path(arguments.json), (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
