"""Makes the runs of the study, a few at a time, one thread each; may be stopped or killed at any moment.

What is done is what lies in the results folder, one folder per run: a run folder without its checkpoints, small enough
for the repository. A run that was stopped or killed goes on from its own newest checkpoint. One that ended with an
error of its own (a loss that is not finite, say), or was killed again and again (for its memory, say), is kept as it
ended, with the reason, and not tried again until its results are removed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.paper_in_small.study import (
    EVALUATION,
    PlannedRun,
    Study,
    evaluation_command,
    read_lines,
    training_command,
)
from data_tools.indexed_dataset import write_whole
from dsmoe_megatron.runtime.processes import STOP_SIGNALS, StopSignals, stop_with_parent

COST = "cost.jsonl"  # of each process of a run: what it did, its time by the clock and of the processor
FAILURE = "failure.txt"
LOG = "output.log"
KEPT = ("config.yaml", "metrics.jsonl", "expert_use.jsonl", COST, EVALUATION, FAILURE)
POLL_SECONDS = 0.5
MOST_KILLS = 3  # of one run in a row


@dataclass
class Worker:
    """One process that trains or evaluates a run."""

    run: PlannedRun
    stage: str
    process: "subprocess.Popen[bytes]"
    run_dir: Path
    began: float = field(default_factory=time.perf_counter)

    def ended(self) -> dict[str, Any] | None:
        """What it cost, once it has ended."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return {
            "stage": self.stage,
            "exit_status": self.process.returncode,
            "wall_s": time.perf_counter() - self.began,
            "processor_s": usage.ru_utime + usage.ru_stime,
            "peak_bytes": 1024 * usage.ru_maxrss,
        }


class Runner:
    """Makes what is not done yet.

    Args:
        study: the runs.
        folder: of the study; gets `runs`.
        data_recipe: names the datasets, which lie beside it.
        results: folder of the results.
    """

    def __init__(self, study: Study, folder: Path, data_recipe: Path, results: Path) -> None:
        self.study, self.data_recipe, self.results = study, data_recipe, results
        self.run_dirs = folder / "runs"

    def make(self, processes: int) -> bool:
        """Make the runs in order, so many at a time; returns whether all are done, false when a signal to stop came."""
        stop = StopSignals()
        waiting = [run for run in self.study.runs if not self.is_done(run)]
        workers: list[Worker] = []
        with _listening(stop), tqdm(total=len(self.study.runs), unit=" runs", disable=None) as bar:
            bar.update(len(self.study.runs) - len(waiting))
            while (waiting and not stop.received) or workers:
                while waiting and len(workers) < processes and not stop.received:
                    workers.append(self._next_stage(waiting.pop(0)))
                time.sleep(POLL_SECONDS)
                for worker in list(workers):
                    if (cost := worker.ended()) is None:
                        continue
                    workers.remove(worker)
                    if self._stage_over(worker, cost, bool(stop.received)):
                        bar.update()
                    elif not stop.received:
                        workers.append(self._next_stage(worker.run))
                if stop.received:
                    _pass_on(workers)
        return not waiting and not stop.received

    def is_done(self, run: PlannedRun) -> bool:
        """Whether its results are there, good or bad."""
        folder = self.results / run.name
        return (folder / EVALUATION).is_file() or (folder / FAILURE).is_file()

    def _next_stage(self, run: PlannedRun) -> Worker:
        run_dir = self.run_dirs / run.name
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / FAILURE).unlink(missing_ok=True)  # of an earlier try, whose results were removed
        is_trained = "training" in _finished_stages(run_dir)
        stage = "evaluation" if is_trained else "training"
        if is_trained:
            command = evaluation_command(run, self.study, self.data_recipe.parent, run_dir)
        else:
            command = training_command(run, self.data_recipe, run_dir)
        tqdm.write(f"{time.strftime('%H:%M:%S')} {run.name}: {stage}")
        with (run_dir / LOG).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # an interrupt from the keyboard reaches this process alone, which passes it on
                preexec_fn=stop_with_parent,
            )
        return Worker(run, stage, process, run_dir)

    def _stage_over(self, worker: Worker, cost: dict[str, Any], stopped: bool) -> bool:
        """Take note of the end of a process; returns whether the run is done."""
        run_dir = worker.run_dir
        finished = cost["exit_status"] == 0 and (worker.stage != "training" or _is_trained(run_dir))
        with (run_dir / COST).open("a", encoding="utf-8") as file:
            file.write(json.dumps(cost | {"finished": finished}) + "\n")
        if not stopped and (reason := _failure(run_dir)) is not None:
            write_whole(run_dir / FAILURE, f"{worker.stage}: {reason}\n".encode())
            tqdm.write(f"{worker.run.name}: {worker.stage} failed: {reason}")
            tqdm.write(f"remove {self.results / worker.run.name} to have it tried again")
        elif worker.stage != "evaluation" or not finished:
            return False
        self._keep(run_dir)
        return True

    def _keep(self, run_dir: Path) -> None:
        """Copy what there is to see of a run; what says that it is done comes last."""
        folder = self.results / run_dir.name
        folder.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run_dir / name).is_file():
                content = (run_dir / name).read_bytes()
                if name == "expert_use.jsonl":  # large, and its last line tells how it ended
                    content = content.splitlines(keepends=True)[-1]
                write_whole(folder / name, content)


def _is_trained(run_dir: Path) -> bool:
    """Whether a training process ended because it was through, not because it was told to stop."""
    return any("validation_loss" in line for line in read_lines(run_dir / "metrics.jsonl"))


def _failure(run_dir: Path) -> str | None:
    """Why a run whose process has ended is not to go on; None if it is."""
    statuses = [int(line["exit_status"]) for line in read_lines(run_dir / COST)]
    if statuses[-1] > 0:
        lines = (run_dir / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"
    if len(statuses) >= MOST_KILLS and max(statuses[-MOST_KILLS:]) < 0:
        return f"killed {MOST_KILLS} times in a row, by signal {-statuses[-1]} the last time"
    return None


def _finished_stages(run_dir: Path) -> set[str]:
    return {line["stage"] for line in read_lines(run_dir / COST) if line["finished"]}


@contextlib.contextmanager
def _listening(stop: StopSignals) -> Iterator[None]:
    """Signals to stop, an interrupt from the keyboard too, end the runs in order for the time of the block."""
    numbers = (*STOP_SIGNALS, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    stop.listen((signal.SIGINT,))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(workers: list[Worker]) -> None:
    """Have training save and end; an evaluation is done anew."""
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process.pid, signal.SIGTERM)


def processes_of_this_machine() -> int:
    """As many as there are cores for this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
