"""What the training loop costs beside its steps, and how long a run takes to begin.

    python -m benchmarks.training_loop [--steps 40] [--starts 5] [--json FILE]

One process, one thread, the quickstart's model and batch, on the standard library's source. Every second step is
logged, so that logged and unlogged steps meet the same machine.
"""

import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
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
from dsmoe_megatron.config import Config, DatasetSource
from dsmoe_megatron.config_parsing import load_config, save_config
from dsmoe_megatron.runtime.distributed import group_of_one, model_parallel_groups, prepare_device
from dsmoe_megatron.runtime.processes import StopSignals

ROOT = Path(__file__).resolve().parent.parent
LIMIT_OF_OVERHEAD = 0.02
NEVER = 10**9


def make_recipe(folder: Path, size: str) -> Config:
    """The quickstart's recipe on data made from some modules of the standard library."""
    from data_tools.preprocess import preprocess
    from data_tools.train_tokenizer import train_tokenizer

    config = load_config(ROOT / "launchers" / "recipes" / "quickstart.yaml")
    corpus = folder / "corpus"
    corpus.mkdir()
    for module in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        (corpus / module.name).write_bytes(module.read_bytes())
    vocabulary = 4096 if size == "full" else 500
    train_tokenizer([str(corpus)], str(folder / "tokenizer"), vocab_size=vocabulary)
    config.model.vocab_size, config.data.tokenizer = vocabulary, str(folder / "tokenizer.model")
    preprocess([str(corpus)], str(folder / "text"), config.data.tokenizer)
    config.data.train, config.data.validation = [DatasetSource(str(folder / "text"))], []
    config.checkpoint.interval, config.optimizer.warmup_steps = NEVER, 0
    if size == "tiny":
        config.model.num_hidden_layers, config.train.sequence_length = 1, 32
    return config


class StepTimes:
    """The beginning and end of every call of the engine, and the loop's own share of it."""

    def __init__(self, engine: Any) -> None:
        self.spans: list[tuple[float, float, float]] = []
        self.train_step = engine.train_step
        engine.train_step = self

    def __call__(self, micro_batches: Any, accepts: Any) -> Any:
        of_the_loop = 0.0

        def timed(*arguments: Any) -> Any:
            nonlocal of_the_loop
            begun = time.perf_counter()
            verdict = accepts(*arguments)
            of_the_loop += time.perf_counter() - begun
            return verdict

        begun = time.perf_counter()
        result = self.train_step(micro_batches, timed)
        self.spans.append((begun, time.perf_counter(), of_the_loop))
        return result

    def rows(self) -> list[tuple[float, float]]:
        """(seconds in the engine, seconds from there to the next step and in the loop's callback) of each step."""
        return [
            (end - begun - own, following[0] - end + own)
            for (begun, end, own), following in zip(self.spans[:-1], self.spans[1:], strict=True)
        ]


def loop_seconds(config: Config, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(in the engine, beside it) of each step, after two that are not counted; even steps are logged."""
    from dsmoe_megatron.training.loop import TrainingRun, open_data

    config.train.steps, config.logging.interval = steps + 4, 2
    run_dir = Path(config.train.run_dir)
    run_dir.mkdir()
    device = torch.device("cpu")
    with group_of_one():
        tokenizer = open_data(config)
        with model_parallel_groups(config.parallel, config.train.seed):
            run = TrainingRun(config, device, tokenizer, run_dir, StopSignals())
            times = StepTimes(run.engine)
            run.train()
    rows = times.rows()[2 : steps + 2]  # of steps 3 to steps + 2
    return {"unlogged": rows[0::2], "logged": rows[1::2]}


def start_seconds(recipe: Path) -> dict[str, float]:
    """Seconds of each part of one start, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_startup", str(recipe), str(time.time())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return parts


def measure(size: str, steps: int, starts: int) -> dict[str, Any]:
    """The whole report."""
    report: dict[str, Any] = {"surroundings": surroundings(prepare_device()), "steps": steps, "starts": starts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_recipe(folder, size)
        parts: list[dict[str, float]] = []
        for number in range(starts):
            config.train.run_dir, config.train.steps = str(folder / f"start_{number}"), 1
            save_config(config, folder / "recipe.yaml")
            parts.append(start_seconds(folder / "recipe.yaml"))
        report["start"] = {part: [each[part] for each in parts] for part in parts[0]}
        config.train.run_dir = str(folder / "run")
        kinds = loop_seconds(config, steps)
    for kind, rows in kinds.items():
        engine, beside = (statistics.median(row[place] for row in rows) for place in (0, 1))
        report[kind] = {"engine_seconds": engine, "beside_seconds": beside, "share": beside / engine}
    differences = [after[0] - before[0] for before, after in zip(kinds["unlogged"], kinds["logged"], strict=True)]
    report["counting_seconds"] = statistics.median(differences)
    report["limit_of_overhead"] = LIMIT_OF_OVERHEAD
    return report


def as_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    rows = [
        [
            f"{kind} step",
            f"{report[kind]['engine_seconds'] * 1e3:.1f} ms",
            f"{report[kind]['beside_seconds'] * 1e3:.2f} ms",
            f"{report[kind]['share']:.2%}: {'met' if report[kind]['share'] < LIMIT_OF_OVERHEAD else 'missed'}",
        ]
        for kind in ("unlogged", "logged")
    ]
    starts = [
        [part, f"{statistics.median(seconds):.2f} s [{min(seconds):.2f}, {max(seconds):.2f}]"]
        for part, seconds in report["start"].items()
    ]
    total = sum(statistics.median(seconds) for seconds in report["start"].values())
    return "\n".join(
        [
            surroundings_line(report["surroundings"]),
            "",
            f"Medians of {report['steps'] // 2} steps of each kind; goal: less than {LIMIT_OF_OVERHEAD:.0%} beside the "
            "engine.",
            "",
            *table(["", "in the engine", "beside it", "share"], rows),
            "",
            "A logged step counts the use of experts in its routers: median difference in the engine to the step "
            f"before it {report['counting_seconds'] * 1e3:+.1f} ms.",
            "",
            *table(["start, up to the end of the first step", f"median of {report['starts']} [min, max]"], starts),
            "",
            f"Together {total:.1f} s.",
        ]
    )


def run(arguments: Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    return measure(arguments.size, arguments.steps, arguments.starts)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("training_loop", "The loop beside its steps, and the start of a run")
    parser.add_argument("--steps", type=PositiveInt, default=40, help="timed steps, half of them logged")
    parser.add_argument("--starts", type=PositiveInt, default=5, help="timed starts")
    add_size_option(parser)
    return parser


def main() -> None:
    run_benchmark(build_parser(), run, as_markdown)


if __name__ == "__main__":
    main()
