"""A training run as a user starts it, torchrun and its ranks, for tests that disturb it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import save_config

ROOT = Path(__file__).resolve().parents[2]
MARK = "DSMOE_TEST_JOB"
VERB = ("-m", "dsmoe_megatron", "pretrain")
INTRODUCTION = re.compile(r"\| steps (\d+) to ")
# torchrun gives ranks 30 s after one of them has failed; a run that takes longer than this hangs
SECONDS_TO_END = 120.0


class TrainingJob:
    """`torchrun ... pretrain` in processes of its own.

    Args:
        config: recipe.
        logs: folder of the recipe and of what the job prints.
        processes: ranks.
        program: what torchrun starts, with its arguments.
    """

    def __init__(self, config: Config, logs: Path, processes: int = 2, program: Sequence[str] = VERB) -> None:
        self.config, self.run_dir, self.processes = config, Path(config.train.run_dir), processes
        logs.mkdir(parents=True, exist_ok=True)
        recipe = logs / f"{self.run_dir.name}.yaml"
        save_config(config, recipe)
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        self.command = [*torchrun, *program, "--config", str(recipe)]
        self.output = logs / f"{self.run_dir.name}.log"
        self.mark = ""
        self.process: subprocess.Popen[bytes] | None = None
        self.printed_before = 0

    def start(self) -> "TrainingJob":
        self.mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.printed_before = self.output.stat().st_size if self.output.exists() else 0
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        return self

    def printed(self) -> str:
        """What the job has printed since its last start."""
        with self.output.open("rb") as file:
            file.seek(self.printed_before)
            return file.read().decode(errors="replace")

    def alive(self) -> list[psutil.Process]:
        """Every process of the job, wherever it has been handed on to."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number) and "--config" in process.cmdline():
                    return process
        raise AssertionError(f"rank {number} is not there:\n{self.printed()}")

    def torchrun(self) -> int:
        """Process id of torchrun."""
        assert self.process is not None
        return self.process.pid

    def wait_until(self, what: Callable[[], object], seconds: float = 60.0) -> None:
        """Poll until `what` is true.

        Raises:
            AssertionError: the job ended before, or the time is over.
        """
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while not what():
            ended = self.process.poll() is not None
            if (ended and not what()) or time.monotonic() > deadline:
                raise AssertionError(
                    f"{'ended' if ended else 'no progress'} (exit code {self.process.poll()}):\n{self.printed()}"
                )
            time.sleep(0.005)

    def wait_for_introduction(self) -> None:
        """Until the run has said from which step it goes on."""
        self.wait_until(lambda: INTRODUCTION.search(self.printed()))

    @property
    def begins_after(self) -> int:
        """The step that this start goes on from."""
        found = INTRODUCTION.search(self.printed())
        return int(found.group(1)) - 1 if found else 0

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.last_step() >= step)

    def last_step(self) -> int:
        """The last training step that the metrics show."""
        return max((line["step"] for line in self.lines() if "lm_loss" in line), default=0)

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl."""
        lines = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            for text in (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(text))
        return lines

    def end(self, seconds: float = SECONDS_TO_END) -> int | None:
        """Wait until torchrun has ended and then for its processes; the exit code, None if one of them is left."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        try:
            code = self.process.wait(seconds)
            while self.alive():
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)
        except subprocess.TimeoutExpired:
            return None
        return code

    def kill(self) -> None:
        """End whatever is left."""
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.kill()


@contextlib.contextmanager
def started(job: TrainingJob) -> Iterator[TrainingJob]:
    """The job for the time of the block; nothing of it is left behind."""
    try:
        yield job.start()
    finally:
        job.kill()
