"""What a checkpoint costs: how long training stands still for it, and its speed beside plain files of the same bytes.

    python -m benchmarks.checkpointing [--megabytes 1000] [--width 1024] [--repeats 5] [--folder DIR] [--json FILE]

A model of so much state (weights, master copies, two moments) is trained on this process. In every repeat, in changing
order: a save that training waits for, a save beside the training, a check, a load, the same bytes written as plain
files and synced, and the checkpoint's files read into memory that is there, by as many threads. What is read is dropped
from the page cache first, so that it comes from the disk.
"""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_drw, PositiveInt

from benchmarks.measuring import (
    benchmark_parser,
    random_micro_batches,
    run_benchmark,
    single_batch,
    surroundings,
    surroundings_line,
    table,
)
from dsmoe_megatron.config import Config, ModelConfig
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.run_folder import Progress
from dsmoe_megatron.runtime.distributed import group_of_one, model_parallel_groups, prepare_device

LIMIT_OF_STALL = 0.05  # of the time of a save that training waits for
LIMIT_OF_SPEED = 0.7  # bytes per second, of plain files'
STATE_BYTES = 16  # per parameter in float32: weight, master copy, two moments
WAITING, BESIDE, LOAD, CHECK, WRITE, READ = "waiting", "beside", "load", "check", "plain write", "plain read"


def model_of(megabytes: int, width: int) -> ModelConfig:
    """As many layers of a width as the state asks for."""
    model = ModelConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_attention_experts=width // 128,
        head_dim=64,
        num_experts=32,
        moe_intermediate_size=width // 8,
        vocab_size=1024,
    )
    count = count_parameters(model)
    wanted = megabytes * 1e6 / STATE_BYTES - (count.embeddings or 0)
    model.num_hidden_layers = max(1, round(wanted / count.total_without_embeddings))
    return model


class Bench:
    """A run that can be saved and loaded.

    Args:
        config: of one process.
        device: of this process.
        folder: scratch space.
    """

    def __init__(self, config: Config, device: torch.device, folder: Path) -> None:
        from dsmoe_megatron.training.engines.choice import build_engine
        from dsmoe_megatron.training.saving import CheckpointSaver

        self.config, self.folder = config, folder
        self.engine = build_engine(config, device)
        self.micro_batches = random_micro_batches(config)
        self.reports: list[Any] = []
        self.saver = CheckpointSaver(self.engine, config, folder, self.reports.append)
        self.steps = 0
        self.train_step()

    def train_step(self) -> float:
        """One step, and what the loop does for a save beside it; returns its seconds."""
        began = time.perf_counter()
        self.engine.train_step(self.micro_batches, self._accepts)
        self.saver.poll()
        self.steps += 1
        return time.perf_counter() - began

    def _accepts(self, _lm_loss: float, _grad_norm: float) -> bool:
        self.saver.before_update()
        return True

    def save(self, asynchronous: bool) -> dict[str, float]:
        """Save once; beside steps, if asynchronous, until it is over."""
        self.config.checkpoint.asynchronous = asynchronous
        done, durations = len(self.reports), []
        self.train_step()
        self.saver.start(Progress(step=self.steps))
        while len(self.reports) == done:
            durations.append(self.train_step())
        report = self.reports[-1]
        assert report.failure is None, report.failure
        return {
            "stall": report.save_stall_s,
            "seconds": report.save_s,
            "step": median(durations) if durations else 0.0,
            "bytes": report.bytes,
        }

    @property
    def newest(self) -> Path:
        return Path(self.reports[-1].folder)

    def check(self) -> None:
        from dsmoe_megatron.training.resuming import choose_checkpoint

        assert choose_checkpoint(self.folder, strict=True, is_own=True) is not None

    def load(self) -> None:
        from dsmoe_megatron.training.checkpoint import load_checkpoint

        load_checkpoint(self.engine, self.config, self.newest)


def drop_from_cache(folder: Path) -> None:
    """Let what is read next come from the disk; the files are synced."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def write_plainly(folder: Path, contents: dict[str, bytearray], threads: int) -> None:
    """Files of these contents, synced."""

    def write(name: str) -> None:
        with (folder / name).open("wb", buffering=0) as file:
            left = memoryview(contents[name])
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, contents))


def read_plainly(folder: Path, contents: dict[str, bytearray], threads: int) -> None:
    """Files into memory of their size."""

    def read(name: str) -> None:
        with (folder / name).open("rb", buffering=0) as file:
            left = memoryview(contents[name])
            while left and (count := file.readinto(left)):
                left = left[count:]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, contents))


def timed(action: Callable[[], object]) -> dict[str, float]:
    began = time.perf_counter()
    action()
    return {"seconds": time.perf_counter() - began}


def turns(bench: Bench, scratch: Path, repeats: int) -> Iterator[dict[str, dict[str, float]]]:
    """Every run in every repeat, in changing order."""
    from dsmoe_megatron.training.shard_writing import FILES_PER_RANK

    bench.save(asynchronous=False)
    bench.save(asynchronous=True)  # which makes the memory for the copies
    contents = {path.name: bytearray(path.read_bytes()) for path in bench.newest.iterdir()}
    plain, before = scratch / "plain", scratch / "plain_before"
    plain.mkdir()

    def write() -> dict[str, float]:
        # as a checkpoint: the one before goes when the new one is there, whose memory and blocks are fresh therefore
        plain.rename(before)
        plain.mkdir()
        seconds = timed(lambda: write_plainly(plain, contents, FILES_PER_RANK))
        shutil.rmtree(before)
        return seconds

    def cold(action: Callable[[], object], folder: Callable[[], Path]) -> dict[str, float]:
        drop_from_cache(folder())
        return timed(action)

    runs: dict[str, Callable[[], dict[str, float]]] = {
        WAITING: lambda: bench.save(asynchronous=False),
        BESIDE: lambda: bench.save(asynchronous=True),
        LOAD: lambda: cold(bench.load, lambda: bench.newest),
        CHECK: lambda: cold(bench.check, lambda: bench.newest),
        WRITE: write,
        READ: lambda: cold(lambda: read_plainly(bench.newest, contents, FILES_PER_RANK), lambda: bench.newest),
    }
    order = random.Random(1234)
    write()  # the one before
    for _ in range(repeats):
        found = {}
        for name in order.sample(list(runs), len(runs)):
            os.sync()  # what others have left to write
            found[name] = runs[name]()
        found["step"] = {"seconds": median([bench.train_step() for _ in range(3)])}
        yield found


def measure(arguments: Namespace) -> dict[str, Any]:
    device = prepare_device()
    around = surroundings(device)
    config = single_batch(model_of(arguments.megabytes, int(arguments.width)), 2, 128)
    config.checkpoint.keep_last = 1
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as scratch,
        group_of_one(),
        model_parallel_groups(config.parallel, config.train.seed),
    ):
        run_dir = Path(scratch) / "run"
        run_dir.mkdir()
        bench = Bench(config, device, run_dir)
        found = list(turns(bench, Path(scratch), arguments.repeats))
    return {"surroundings": around, "megabytes": arguments.megabytes, "turns": found}


def as_markdown(report: dict[str, Any]) -> str:
    found = report["turns"]

    def middle(figure: Callable[[dict[str, Any]], float]) -> float:
        return float(median(figure(turn) for turn in found))

    def speed(name: str) -> str:
        return f"{middle(lambda turn: turn[WAITING]['bytes'] / turn[name]['seconds'] / 1e9):.2f} GB/s"

    stall = middle(lambda turn: turn[BESIDE]["stall"] / turn[WAITING]["seconds"])
    written = middle(lambda turn: turn[WRITE]["seconds"] / turn[WAITING]["seconds"])
    loaded = middle(lambda turn: turn[READ]["seconds"] / turn[LOAD]["seconds"])
    checked = middle(lambda turn: turn[READ]["seconds"] / turn[CHECK]["seconds"])
    slower = middle(lambda turn: turn[BESIDE]["step"] / turn["step"]["seconds"])
    rows = [
        ["checkpoint", f"{found[0][WAITING]['bytes'] / 1e6:,.0f} MB", ""],
        ["save, training waits", f"{middle(lambda turn: turn[WAITING]['seconds']):.2f} s, {speed(WAITING)}", ""],
        ["its speed over a plain write's", f"{written:.2f}", verdict(written >= LIMIT_OF_SPEED)],
        ["save beside the training", f"{middle(lambda turn: turn[BESIDE]['seconds']):.2f} s, {speed(BESIDE)}", ""],
        ["training stands still", f"{1e3 * middle(lambda turn: turn[BESIDE]['stall']):.0f} ms", ""],
        ["that over the save that waits", f"{stall:.1%}", verdict(stall < LIMIT_OF_STALL)],
        ["step beside a save over one without", f"{slower:.2f}", ""],
        ["load", f"{middle(lambda turn: turn[LOAD]['seconds']):.2f} s, {speed(LOAD)}", ""],
        ["its speed over a plain read's", f"{loaded:.2f}", verdict(loaded >= LIMIT_OF_SPEED)],
        ["check before a load", f"{middle(lambda turn: turn[CHECK]['seconds']):.2f} s, {speed(CHECK)}", ""],
        ["its speed over a plain read's", f"{checked:.2f}", ""],
        ["plain write, plain read", f"{speed(WRITE)}, {speed(READ)}", ""],
    ]
    limits = f"Limits: stall below {LIMIT_OF_STALL:.0%}, speeds at least {LIMIT_OF_SPEED} of plain files'."
    return "\n".join([surroundings_line(report["surroundings"]), "", *table(["", "median", "limit"], rows), "", limits])


def verdict(kept: bool) -> str:
    return "kept" if kept else "MISSED"


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("checkpointing", "How long training stands still for a checkpoint, and its speed.")
    parser.add_argument("--megabytes", type=PositiveInt, default=1000, help="of state, nearly the checkpoint's size")
    parser.add_argument("--width", type=PositiveInt, default=1024, help="of the model, half of DS-MoE-1B's")
    parser.add_argument("--repeats", type=PositiveInt, default=5, help="turns of each")
    parser.add_argument("--folder", type=Path_drw, default=None, help="scratch space of four times the size")
    return parser


if __name__ == "__main__":
    run_benchmark(build_parser(), measure, as_markdown)
