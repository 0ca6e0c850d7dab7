"""What a run leaves to read: metrics.jsonl, expert_use.jsonl, the trackers' curves, and a line on the terminal."""

import datetime
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config
from dsmoe_megatron.durable import write_durably
from dsmoe_megatron.json_text import json_text
from dsmoe_megatron.perplexity import shown
from dsmoe_megatron.training.trackers import Say, Trackers

METRICS, EXPERT_USE = "metrics.jsonl", "expert_use.jsonl"


class MetricsWriter:
    """Writes on one rank only; lines of steps after `resumed_step` in a run that is continued are taken back.

    Args:
        run_dir: exists.
        config: recipe; its logging section says what to write.
        resumed_step: the step that the run goes on from; 0 starts anew.
        say: takes one line.
    """

    def __init__(self, run_dir: Path, config: Config, resumed_step: int, say: Say) -> None:
        self.run_dir = run_dir
        self._waiting: dict[str, str] = {}
        logged_step = max(_keep_steps(run_dir / name, resumed_step) for name in (METRICS, EXPERT_USE))
        self.trackers = Trackers(run_dir, config, resumed_step, logged_step, say)

    def training(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; every number becomes a curve."""
        self._append(METRICS, line)
        self._curves("train", line)

    def validation(self, line: dict[str, Any]) -> None:
        """A validation line; each policy becomes a pair of curves."""
        self._append(METRICS, line)
        step = line["step"]
        self._curves("validation", {"step": step, "loss": line["validation_loss"]})
        for name, figures in line["policies"].items():
            self._curves(f"validation/{name}", {"step": step, **figures})

    def expert_use(self, step: int, routers: list[dict[str, Any]]) -> None:
        """Per-layer expert use; the shares of single experts stay in the file."""
        self._append(EXPERT_USE, {"step": step, "routers": routers})
        for router in routers:
            numbers = {name: value for name, value in router.items() if isinstance(value, float)}
            self._curves(f"experts/{router['kind']}/layer_{router['layer']:02d}", {"step": step, **numbers})

    def event(self, line: dict[str, Any]) -> None:
        """A line on something that happens now and then; its numbers are no curves."""
        self._append(METRICS, line)

    def save(self, line: dict[str, Any]) -> None:
        """A line on a checkpoint; its times and size become curves."""
        self._append(METRICS, line)
        self._curves("checkpoint", line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Lines for which there is no room, while a checkpoint fills the disk, wait for the next one."""
        text = self._waiting.pop(name, "") + json_text(line) + "\n"
        try:
            _append_whole(self.run_dir / name, text)
        except OSError as error:
            self._waiting[name] = text
            print(f"{self.run_dir / name}: {error.strerror}: its lines wait", file=sys.stderr, flush=True)

    def _curves(self, group: str, line: dict[str, Any]) -> None:
        numbers = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
        self.trackers.points(line["step"], {f"{group}/{name}": value for name, value in numbers.items()})

    def close(self) -> None:
        """Write what waits, and end the trackers."""
        for name, text in self._waiting.items():
            try:
                _append_whole(self.run_dir / name, text)
            except OSError as error:
                lost = f"{text.count(chr(10))} lines could not be written"
                print(f"{self.run_dir / name}: {error.strerror}: {lost}", file=sys.stderr, flush=True)
        self._waiting = {}
        self.trackers.close()


def _append_whole(path: Path, text: str) -> None:
    """Append all of it, or nothing: half a line would spoil what follows."""
    with path.open("ab", buffering=0) as file:
        size, data = file.seek(0, os.SEEK_END), text.encode()
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def _keep_steps(path: Path, last_step: int) -> int:
    """Drop the lines of later steps and those that are damaged; returns the newest step there was.

    A last line that a crash cut short is no damage; others are told of.
    """
    if not path.is_file():
        return 0
    kept, damaged, newest = [], [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, text in enumerate(lines, 1):
        step = _step_of(text)
        if step is None:
            damaged += [number] if text.endswith("\n") else []
            continue
        newest = max(newest, step)
        if step <= last_step:
            kept.append(text.rstrip("\n") + "\n")
    if damaged:
        print(f"{path}: {len(damaged)} damaged lines are dropped, the first is line {damaged[0]}", file=sys.stderr)
    write_durably(path, "".join(kept))
    return newest


def _step_of(text: str) -> int | None:
    """The step of a line, None where it is no line of metrics."""
    try:
        step = json.loads(text)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def progress_line(line: dict[str, Any], steps: int) -> str:
    """The terminal's view of a training line."""
    left = datetime.timedelta(seconds=round(line["time_left_s"]))
    mutual_information = [
        f"mi {kind} {line[key]:.3f}"
        for kind, key in (("attention", "mi_loss_attention"), ("mlp", "mi_loss_mlp"))
        if line[key] is not None
    ]
    parts = [
        f"step {line['step']}/{steps}",
        f"lm_loss {shown(line['lm_loss'], '.4f')}",
        *mutual_information,
        f"grad_norm {shown(line['grad_norm'], '.3f')}",
        f"lr {line['learning_rate']:.2e}",
        f"{line['tokens_per_s']:,.0f} tokens/s",
        f"{line['model_tflops_per_s_per_device']:.3g} TFLOP/s per device",
        *([] if line["mfu"] is None else [f"MFU {line['mfu']:.1%}"]),
        f"{left} left",
    ]
    return " | ".join(parts)


def validation_line(line: dict[str, Any]) -> str:
    """The terminal's view of a validation line."""
    policies = [
        f"{name}: perplexity {shown(figures['perplexity'], '.2f')} at {figures['active_share']:.0%} active"
        for name, figures in line["policies"].items()
    ]
    return " | ".join(
        [f"validation at step {line['step']}", f"loss {shown(line['validation_loss'], '.4f')}", *policies]
    )
