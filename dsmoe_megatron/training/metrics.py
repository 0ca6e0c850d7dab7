"""What a run leaves to read: metrics.jsonl, expert_use.jsonl, TensorBoard, and a line on the terminal."""

import datetime
import json
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import LoggingConfig

METRICS, EXPERT_USE = "metrics.jsonl", "expert_use.jsonl"


class MetricsWriter:
    """Writes on one rank only; lines of steps after `resumed_step` in a run that is continued are taken back.

    Args:
        run_dir: exists.
        section: what to write.
        resumed_step: the step that the run goes on from; 0 starts anew.
    """

    def __init__(self, run_dir: Path, section: LoggingConfig, resumed_step: int) -> None:
        self.run_dir = run_dir
        for name in (METRICS, EXPERT_USE):
            _keep_steps(run_dir / name, resumed_step)
        self.tensorboard: Any = None
        if section.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def training(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; every number becomes a TensorBoard curve."""
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

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _curves(self, group: str, line: dict[str, Any]) -> None:
        if self.tensorboard is None:
            return
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self.tensorboard.add_scalar(f"{group}/{name}", value, line["step"])

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()


def _keep_steps(path: Path, last_step: int) -> None:
    """Drop the lines of later steps, and a last line that a crash cut short."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] <= last_step:
                kept.append(text + "\n")
        except (ValueError, KeyError):
            break
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("".join(kept), encoding="utf-8")
    unfinished.replace(path)


def progress_line(line: dict[str, Any], steps: int) -> str:
    """The terminal's view of a training line."""
    left = datetime.timedelta(seconds=round((steps - line["step"]) * line["step_time_s"]))
    mutual_information = [
        f"mi {kind} {line[key]:.3f}"
        for kind, key in (("attention", "mi_loss_attention"), ("mlp", "mi_loss_mlp"))
        if line[key] is not None
    ]
    parts = [
        f"step {line['step']}/{steps}",
        f"lm_loss {line['lm_loss']:.4f}",
        *mutual_information,
        f"grad_norm {line['grad_norm']:.3f}",
        f"lr {line['learning_rate']:.2e}",
        f"{line['tokens_per_s']:,.0f} tokens/s",
        f"{left} left",
    ]
    return " | ".join(parts)


def validation_line(line: dict[str, Any]) -> str:
    """The terminal's view of a validation line."""
    policies = [
        f"{name}: perplexity {figures['perplexity']:.2f} at {figures['active_share']:.0%} active"
        for name, figures in line["policies"].items()
    ]
    return " | ".join([f"validation at step {line['step']}", f"loss {line['validation_loss']:.4f}", *policies])
