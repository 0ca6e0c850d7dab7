"""Where curves go beside metrics.jsonl: TensorBoard and Weights & Biases.

They are conveniences: one that is not installed or fails, at its start or in any later call, is switched off with one
line, and the run goes on.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import to_dict

WANDB_RUN_ID = "wandb_run_id"
WANDB_KEY = "WANDB_API_KEY"
SECONDS_TO_FINISH = 60.0

Say = Callable[[str], None]


class Tracker(Protocol):
    """One place that curves go to."""

    def points(self, step: int, values: dict[str, float]) -> None:
        """One point of each named curve."""

    def close(self) -> None:
        """Nothing more will come."""


class Trackers:
    """Those that the recipe asks for, on the one rank that writes.

    Args:
        run_dir: exists.
        config: recipe.
        resumed_step: the step that the run goes on from; 0 starts anew.
        logged_step: the newest step that was written before.
        say: takes one line.
    """

    def __init__(self, run_dir: Path, config: Config, resumed_step: int, logged_step: int, say: Say) -> None:
        self.say = say
        self.trackers: dict[str, Tracker] = {}
        if config.logging.tensorboard:
            self._guarded("TensorBoard", lambda: self._add("TensorBoard", _TensorBoard(run_dir, resumed_step)))
        if config.logging.wandb.project is not None:
            name = "Weights & Biases"
            self._guarded(name, lambda: self._add(name, _WeightsAndBiases(run_dir, config, logged_step)))

    def _add(self, name: str, tracker: Tracker) -> None:
        self.trackers[name] = tracker

    def points(self, step: int, values: dict[str, float]) -> None:
        """One point of each named curve."""
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, lambda tracker=tracker: tracker.points(step, values))  # type: ignore[misc]

    def close(self) -> None:
        """Nothing more will come."""
        for name, tracker in list(self.trackers.items()):
            self._guarded(name, tracker.close)

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a library or its service does wrong: the run is worth more
            self.trackers.pop(name, None)
            self.say(f"warning: {name} is off, the run goes on without it: {one_line(error)}")


def one_line(error: Exception) -> str:
    """What went wrong, without a key that may stand in it."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    key = os.environ.get(WANDB_KEY)
    return text.replace(key, "***") if key else text


class _TensorBoard:
    def __init__(self, run_dir: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what was written of later steps is passed over by TensorBoard
        self.writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def points(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    """One W&B run per run folder: its id is kept there, and a resumed run goes on under it.

    W&B takes no step back: steps that it has had before are not sent again, and what comes late, as the report of a
    save that ran beside later steps, is a point of the newest step.
    """

    def __init__(self, run_dir: Path, config: Config, logged_step: int) -> None:
        import wandb

        section, kept = config.logging.wandb, run_dir / WANDB_RUN_ID
        known = kept.is_file()
        if not known:
            kept.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
        self.logged_step = self.newest_step = logged_step if known else 0
        self.run: Any = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or run_dir.resolve().name,
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode="offline" if section.offline else "online",
            dir=str(run_dir),
            config=to_dict(config),
            # neither output nor source is sent; the end of a run does not wait for a server that has gone
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, finish_timeout=SECONDS_TO_FINISH
            ),
        )

    def points(self, step: int, values: dict[str, float]) -> None:
        if step > self.logged_step:
            self.newest_step = max(self.newest_step, step)
            self.run.log(values, step=self.newest_step)

    def close(self) -> None:
        self.run.finish()
