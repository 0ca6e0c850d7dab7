"""How fast a run is: seconds per step, tokens and model FLOPs per second, utilisation, and the time that is left."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

import torch

from dsmoe_megatron.batch_ramp import samples_of_steps
from dsmoe_megatron.config import Config
from dsmoe_megatron.planning.flops import training_flops
from dsmoe_megatron.planning.hardware import peak_of_device
from dsmoe_megatron.run_folder import Progress

Aside = Literal["validation", "save"]


class Throughput:
    """Times training steps; what happens between `step_done` and `go_on` does not count as training.

    Args:
        config: recipe with a known vocabulary size.
        device: of this rank; all are taken to be alike.
        world_size: processes of the run.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int) -> None:
        self.config, self.world_size = config, world_size
        self.flops_per_token = training_flops(config).model
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_of_device(name, config.train.precision)
        self.aside_seconds: dict[Aside, float] = {"validation": 0.0, "save": 0.0}
        self.seconds, self.steps, self.samples = 0.0, 0, 0
        self.go_on()

    def go_on(self) -> None:
        """Training begins, or begins again."""
        self.started = time.perf_counter()

    def step_done(self, samples: int) -> None:
        """A step over `samples` samples has ended."""
        self.seconds += time.perf_counter() - self.started
        self.steps += 1
        self.samples += samples

    @contextlib.contextmanager
    def aside(self, what: Aside) -> Iterator[None]:
        """Times what is no training but will come again; the newest time stands for those to come."""
        started = time.perf_counter()
        yield
        self.aside_seconds[what] = time.perf_counter() - started

    def figures(self, progress: Progress) -> dict[str, float | None]:
        """Of the steps since the last call, with the time that is left of the run.

        Returns:
            step_time_s [s]; tokens_per_s over all devices; model_tflops_per_s_per_device: model FLOPs as
            planning/flops.py counts them, without recomputation; mfu: their share of the device's peak, null where the
            peak is not known; time_left_s [s], validations and checkpoints included once one has been timed.
        """
        tokens_per_s = self.samples * self.config.train.sequence_length / self.seconds
        flops_per_s = tokens_per_s * self.flops_per_token / self.world_size
        figures = {
            "step_time_s": self.seconds / self.steps,
            "tokens_per_s": tokens_per_s,
            "model_tflops_per_s_per_device": flops_per_s / 1e12,
            "mfu": None if self.peak is None else flops_per_s / self.peak,
            "time_left_s": self._time_left(progress),
        }
        self.seconds, self.steps, self.samples = 0.0, 0, 0
        return figures

    def _time_left(self, progress: Progress) -> float:
        config, seconds = self.config, self.aside_seconds
        validations, saves = (
            times_left(progress.step, config.train.steps, interval)
            for interval in (config.evaluation.interval, config.checkpoint.interval)
        )
        left = samples_of_steps(config.train, config.train.steps - progress.step, progress.consumed_samples)
        training = left * self.seconds / self.samples
        return training + validations * seconds["validation"] + saves * seconds["save"]


def times_left(step: int, last: int, interval: int) -> int:
    """How often something still comes that comes every `interval` steps (0: never) and at the last step."""
    if step >= last:
        return 0
    regular = last // interval - step // interval if interval else 0
    return regular + (interval == 0 or last % interval > 0)
