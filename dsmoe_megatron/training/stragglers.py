"""Which rank is slow: the time of each from the beginning of a step until its gradients wait for the others'.

In that time a rank waits for its data and goes forward and backward; the gradient reduction and the optimizer, where
all wait for all, come after. Ranks of one model replica wait for one another within it (tensor, context, expert and
pipeline parallelism), so that a slow one makes its replica slow: what is found is a replica, by one of its ranks.
Pipeline stages have unlike work and are compared among themselves.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

FACTOR = 1.3
"""Times the median of its stage from which on a rank counts as slow."""
REPORTS = 3
"""Reports in a row in which it must be slow before it is named."""


class Stragglers:
    """Times this rank's steps; `figures` compares the ranks.

    Args:
        device: of this rank; on CUDA the device's time is taken, by events.
        stage: this rank's pipeline stage.
        say: takes one line, on every rank the same.
    """

    def __init__(self, device: torch.device, stage: int, say: Callable[[str], None]) -> None:
        self.on_cuda, self.stage, self.say = device.type == "cuda", stage, say
        self.spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self.slow_reports: dict[int, int] = {}
        self.step_begins()

    def step_begins(self) -> None:
        """Training goes on, with the wait for data."""
        self.started = self._now()

    def gradients_ready(self) -> None:
        """The backward passes of the step are done on this rank."""
        self.spans.append((self.started, self._now()))

    def figures(self) -> dict[str, float | int]:
        """Of the steps since the last call, means per rank; a collective. Empty where there is one rank.

        Returns:
            rank_time_median_s, rank_time_max_s [s] and slowest_rank, the one farthest above its stage's median.
        """
        mine = statistics.fmean(self._seconds(*span) for span in self.spans)
        self.spans.clear()
        if dist.get_world_size() == 1:
            return {}
        own = torch.tensor([mine, self.stage], dtype=torch.float64, device="cuda" if self.on_cuda else "cpu")
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
        seconds, stages = zip(*(row.tolist() for row in rows), strict=True)
        ratios = ratios_to_median(seconds, stages)
        for rank in named_now(ratios, self.slow_reports):
            hosts: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(hosts, platform.node())
            self.say(
                f"warning: rank {rank} on {hosts[rank]} was slow in the last {REPORTS} reports: {ratios[rank]:.2f} "
                f"times the median ({seconds[rank]:.3f} s until its gradients were ready)"
            )
        return {
            "rank_time_median_s": statistics.median(seconds),
            "rank_time_max_s": max(seconds),
            "slowest_rank": ratios.index(max(ratios)),
        }

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return float(begin.elapsed_time(end)) / 1e3
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin


def ratios_to_median(seconds: Sequence[float], stages: Sequence[float]) -> list[float]:
    """Each rank's seconds over the median of its pipeline stage; of two ranks the median is the faster one."""
    medians = {
        stage: statistics.median_low(time for time, its in zip(seconds, stages, strict=True) if its == stage)
        for stage in set(stages)
    }
    return [time / medians[stage] for time, stage in zip(seconds, stages, strict=True)]


def named_now(ratios: Sequence[float], slow_reports: dict[int, int]) -> list[int]:
    """Ranks that have been slow for REPORTS reports with this one; `slow_reports` counts them, and is changed."""
    for rank, ratio in enumerate(ratios):
        slow_reports[rank] = slow_reports.get(rank, 0) + 1 if ratio > FACTOR else 0
    return [rank for rank, count in slow_reports.items() if count == REPORTS]
