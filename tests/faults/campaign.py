"""Train under faults: one after the other, each followed by the same command again, until the run is done.

    python -m tests.faults.campaign --folder FOLDER [--injections 100] [--seed 1] [--output TABLE]

The finished run must be the run without faults: every line of metrics.jsonl equal in all digits, none doubled, none
missing. All runs, the undisturbed one too, have steps with damaged gradients, whose updates are left out. Called again
it goes on where it was broken off. The exit code is 1 if anything was lost in silence, hung, or went otherwise wrong.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config
from tests.damaged_steps import DAMAGE
from tests.faults.injections import INJECTIONS, NEED_MOUNTS
from tests.faults.training_job import TrainingJob
from tests.pretrain_job import CLOCK, SmallData, make_small_data, run_config

STEPS, SAVED_EVERY, VALIDATED_EVERY = 60, 4, 10
DAMAGED_STEPS = {"7": "nan gradient", "8": "nan loss", "23": "infinite gradient", "41": "large gradient"}
STEPS_TO_STRIKE = 10  # a fault takes effect within them, or the run is done before it does
DISK_MEGABYTES = 160
# the processes of a run and how they share the model; runs take turns
LAYOUTS: dict[int, dict[str, Any]] = {2: {}, 4: {"tensor": 2}}
# metrics.jsonl also has lines on what happened to this run alone
RUN_LINES = ("lm_loss", "validation_loss")


@dataclass
class Outcome:
    """What became of one injection."""

    kind: str
    processes: int
    lost_steps: int | None = None
    hung: bool = False
    survivors: int = 0
    wrong: str = ""


class Campaign:
    """Faults in one run folder after the other.

    Args:
        folder: of runs and results; may hold those of an earlier call.
        data: to train on; its training set is damaged and mended.
        seed: of everything random.
        steps: of each run.
        processes: of each run, one of LAYOUTS.
        engine: section of the recipe; only megatron-core's has steps with damaged gradients too.
    """

    def __init__(
        self,
        folder: Path,
        data: SmallData,
        seed: int,
        steps: int = STEPS,
        processes: int = 2,
        engine: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.data, self.seed, self.steps, self.processes = folder, data, seed, steps, processes
        self.engine = engine or {}
        self.damaged_steps = {} if engine else DAMAGED_STEPS
        os.environ[DAMAGE] = json.dumps(self.damaged_steps)
        self.expected = self._undisturbed()

    def _config(self, name: str) -> Config:
        return run_config(
            self.data,
            self.folder / "runs" / name,
            parallel=dict(LAYOUTS[self.processes]),
            engine=self.engine,
            train={"steps": self.steps, "spike_deviations": 20.0, "spike_window": 16, "timeout_minutes": 0.5},
            checkpoint={"interval": SAVED_EVERY},
            evaluation={"interval": VALIDATED_EVERY, "batches": 1},
            logging={"tensorboard": False},
        )

    def _job(self, name: str) -> TrainingJob:
        # what a job prints does not belong on the disk that is filled
        program = ("-m", "tests.damaged_steps")
        return TrainingJob(self._config(name), self.folder / "logs", self.processes, program)

    def _undisturbed(self) -> list[dict[str, Any]]:
        job = self._job(f"undisturbed_{self.processes}")
        if job.last_step() < self.steps:
            code = job.start().end(600)
            assert code == 0, job.printed()
        lines = compared_lines(job)
        skipped = [line["skipped_updates"] for line in lines if "lm_loss" in line]
        assert skipped[-1] == sum(int(step) <= self.steps for step in self.damaged_steps), skipped
        return lines

    def run(self, kinds: Sequence[str], name: str) -> list[Outcome]:
        """Inject until the run is done or the kinds are used up, then let it finish; it must be the undisturbed one."""
        job, outcomes = self._job(name), []
        for number, kind in enumerate(kinds):
            if job.last_step() >= self.steps - STEPS_TO_STRIKE:
                break
            if not INJECTIONS[kind].possible(job):
                continue
            outcomes.append(self._inject(job, kind, random.Random(f"{self.seed} {name} {number}")))
            print(f"{name}: step {job.last_step()}/{self.steps}: {asdict(outcomes[-1])}", flush=True)
        shown = job.last_step()
        code = job.start().end(600)
        self._settle(outcomes, job, shown)
        if outcomes:
            if code != 0:
                outcomes[-1].wrong += f"the run does not finish: {last_line(job)}"
            elif compared_lines(job) != self.expected:
                outcomes[-1].wrong += f"silent loss: {first_difference(compared_lines(job), self.expected)}"
        job.kill()
        return outcomes

    def _inject(self, job: TrainingJob, kind: str, chance: random.Random) -> Outcome:
        injection, outcome = INJECTIONS[kind], Outcome(kind, self.processes)
        before = job.last_step()
        try:
            injection.strike(job, chance)
        except AssertionError as error:
            outcome.wrong = str(error)[-300:]
        code = job.end()
        outcome.hung, outcome.survivors = code is None, len(job.alive())
        job.kill()
        shown = max(before, job.last_step()) if injection.refuses else job.last_step()
        if injection.refuses and (code == 0 or "error: " not in job.printed() or "Traceback" in rank_output(job)):
            outcome.wrong += f"not refused in one line: {last_line(job)}"
        if not is_prefix(compared_lines(job), self.expected):
            outcome.wrong += f"silent loss: {first_difference(compared_lines(job), self.expected)}"
        kept = newest_checkpoint(job)
        outcome.lost_steps = shown - kept
        # while one checkpoint is being written the steps go on, to the next one at most
        limit = 0 if injection.saves else 2 * SAVED_EVERY
        if outcome.lost_steps > limit:
            outcome.wrong += f"{outcome.lost_steps} steps lost where at most {limit} may be"
        if injection.takes_a_checkpoint:
            outcome.lost_steps = max(before - job.begins_after, 0)
        return outcome

    def _settle(self, outcomes: Sequence[Outcome], job: TrainingJob, shown: int) -> None:
        """The last start says where it really began."""
        if outcomes and job.begins_after:
            outcomes[-1].lost_steps = shown - job.begins_after


def newest_checkpoint(job: TrainingJob) -> int:
    latest = job.run_dir / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.is_file() else 0


def compared_lines(job: TrainingJob) -> list[dict[str, Any]]:
    """Training and validation lines as they stand, without the clock's figures."""
    return [
        {key: value for key, value in line.items() if key not in CLOCK}
        for line in job.lines()
        if any(key in line for key in RUN_LINES)
    ]


def is_prefix(lines: Sequence[Any], expected: Sequence[Any]) -> bool:
    """What a run that was broken off shows is the undisturbed one's first steps."""
    training = [line for line in lines if "lm_loss" in line]
    return training == [line for line in expected if "lm_loss" in line][: len(training)]


def first_difference(lines: Sequence[Any], expected: Sequence[Any]) -> str:
    for line, other in zip(lines, expected, strict=False):
        if line != other:
            keys = [key for key in other if line.get(key) != other[key]]
            return f"step {line['step']} for {other['step']}: { ({key: (line.get(key), other[key]) for key in keys}) }"
    return f"{len(lines)} lines for {len(expected)}"


def rank_output(job: TrainingJob) -> str:
    """What the ranks printed; torchrun adds a traceback of its own."""
    return job.printed().split("torch/distributed/elastic/multiprocessing/api.py")[0]


def last_line(job: TrainingJob) -> str:
    return next((line for line in reversed(rank_output(job).splitlines()) if line.strip()), "nothing printed")


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        "| Fault | Injected | of 4 ranks | Survived | Lost steps, mean | max | Silent losses | Hangs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in [*INJECTIONS, None]:
        these = [outcome for outcome in outcomes if kind in (None, outcome.kind)]
        if not these:
            continue
        lost = [outcome.lost_steps or 0 for outcome in these]
        survived = sum(not (outcome.wrong or outcome.hung or outcome.survivors) for outcome in these)
        silent = sum("silent loss" in outcome.wrong for outcome in these)
        hangs = sum(outcome.hung or bool(outcome.survivors) for outcome in these)
        counts = f"{len(these)} | {sum(outcome.processes == 4 for outcome in these)} | {survived}"
        rows.append(f"| {kind or 'all'} | {counts} | {sum(lost) / len(lost):.1f} | {max(lost)} | {silent} | {hangs} |")
    return "\n".join(rows)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """A disk of its own at `folder`; yields why there is none, if so."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    try:
        yield done.stderr.strip() if done.returncode else ""
    finally:
        if not done.returncode:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("fault_runs"))
    parser.add_argument("--injections", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("fault_runs/table.md"))
    options = parser.parse_args()
    results = options.folder / "results.jsonl"
    data = make_small_data(options.folder / "data")
    outcomes = [Outcome(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    with small_disk(options.folder / "runs") as why_not:
        kinds = [kind for kind in INJECTIONS if not (why_not and kind in NEED_MOUNTS)]
        if why_not:
            print(f"left out: {', '.join(NEED_MOUNTS)}: {why_not}")
        campaigns = [Campaign(options.folder, data, options.seed, processes=processes) for processes in LAYOUTS]
        while len(outcomes) < options.injections:
            name = f"run_{len(outcomes)}"
            chance = random.Random(f"{options.seed} {len(outcomes)}")
            # a shuffled round of all kinds after the other, so that each comes as often as the others
            planned = [kind for _ in range(3) for kind in chance.sample(kinds, len(kinds))]
            # the layout that has had the fewest
            campaign = min(campaigns, key=lambda each: sum(one.processes == each.processes for one in outcomes))
            new = campaign.run(planned[: options.injections - len(outcomes)], name)
            outcomes += new
            with results.open("a") as file:
                file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in new)
            shutil.rmtree(options.folder / "runs" / name)
            options.output.write_text(table(outcomes) + "\n")
    print(table(outcomes))
    wrong = [outcome for outcome in outcomes if outcome.wrong or outcome.hung or outcome.survivors]
    for outcome in wrong:
        print(outcome)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
