"""Guards against updates that would spoil the weights.

A step whose loss or gradient norm is not finite is not applied: weights, optimizer state and AdamW's step counts stay
as they are; the schedule and the place in the data move on. With `train.spike_deviations` the same goes for a spike: a
loss or a gradient norm further above its mean than so many standard deviations, both over the applied ones of the last
`train.spike_window` steps. That is OLMo-core's rule (SkipStepOptimizer), with its window of 128; it uses 6 deviations.
After `train.stop_after_skipped` steps in a row that were not applied, the run stops.
"""

import json
import math
import statistics
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import TrainConfig
from dsmoe_megatron.json_text import finite


class Verdict(IntEnum):
    """On the gradient of one step; where ranks differ the largest holds."""

    APPLIED = 0
    SPIKE = 1
    NOT_FINITE = 2

    @property
    def reason(self) -> str:
        return {Verdict.APPLIED: "applied", Verdict.SPIKE: "a spike", Verdict.NOT_FINITE: "not finite"}[self]


class Guards:
    """Judges every step before its update.

    Args:
        section: limits.
        memory: what judging depends on, as it was saved; changed in place, empty for a run that begins.
    """

    def __init__(self, section: TrainConfig, memory: dict[str, Any]) -> None:
        self.section, self.memory = section, memory
        memory.setdefault("skipped", 0)
        memory.setdefault("in_a_row", [])
        memory.setdefault("lm_losses", [])
        memory.setdefault("grad_norms", [])

    def judge(self, lm_loss: float, grad_norm: float) -> Verdict:
        """What to do with a step; the same wherever the loss and the norm are."""
        if not (math.isfinite(lm_loss) and math.isfinite(grad_norm)):
            return Verdict.NOT_FINITE
        spike = self._is_spike(lm_loss, self.memory["lm_losses"]) or self._is_spike(
            grad_norm, self.memory["grad_norms"]
        )
        return Verdict.SPIKE if spike else Verdict.APPLIED

    def _is_spike(self, value: float, earlier: Sequence[float]) -> bool:
        if not self.section.spike_deviations or len(earlier) < self.section.spike_window // 2:
            return False
        limit = statistics.fmean(earlier) + self.section.spike_deviations * statistics.pstdev(earlier)
        return value > limit

    def remember(self, verdict: Verdict, step: int, samples: range, lm_loss: float, grad_norm: float) -> None:
        """Take note of what became of a step.

        Args:
            verdict: that all ranks agreed on.
            step: its number.
            samples: of its global batch, by their index in the run.
            lm_loss, grad_norm: of the step.
        """
        if verdict is Verdict.APPLIED:
            self.memory["in_a_row"] = []
            if self.section.spike_deviations:
                for name, value in (("lm_losses", lm_loss), ("grad_norms", grad_norm)):
                    self.memory[name] = [*self.memory[name], value][-self.section.spike_window :]
            return
        self.memory["skipped"] += 1
        self.memory["in_a_row"].append(
            {
                "step": step,
                "samples": [samples.start, samples.stop],
                "reason": verdict.reason,
                "lm_loss": finite(lm_loss),
                "grad_norm": finite(grad_norm),
            }
        )

    @property
    def skipped(self) -> int:
        """Updates that were not applied, over the whole run."""
        return int(self.memory["skipped"])

    @property
    def in_a_row(self) -> int:
        """Updates that were not applied, up to now and without one that was."""
        return len(self.memory["in_a_row"])

    @property
    def last_reason(self) -> str:
        return str(self.memory["in_a_row"][-1]["reason"])

    @property
    def stop(self) -> bool:
        return self.in_a_row >= self.section.stop_after_skipped

    def write_batches(self, path: Path, data: Any) -> None:
        """Write which samples the steps in a row took.

        Args:
            path: of a JSON file: a list with an object per step.
            data: training set; a blend says which of its datasets a sample is of.
        """
        batches = [
            {**step, "samples": [_sample(data, index) for index in range(*step["samples"])]}
            for step in self.memory["in_a_row"]
        ]
        path.write_text(json.dumps(batches, indent=1) + "\n", encoding="utf-8")


def _sample(data: Any, index: int) -> dict[str, Any]:
    """Where a sample of the run comes from: its index in the run, its dataset, its index there."""
    datasets = getattr(data, "datasets", None)
    if datasets is None:
        return {"index": index, "dataset": str(data.dataset_path), "sample": index}
    which = int(data.dataset_index[index])
    place = int(data.dataset_sample_index[index])
    return {"index": index, "dataset": str(datasets[which].dataset_path), "sample": place}
