"""How large the batch of a step is: train.global_batch_size, and less than that on the ramp before it.

The size depends on the samples consumed so far and on nothing else, as in Megatron's --rampup-batch-size: start,
start + increment, ... up to the full size, where every size before the full one takes an equal share of
ramp_up.samples. A step begun within a share is taken whole.
"""

from dsmoe_megatron.config import TrainConfig


def batch_sizes(train: TrainConfig) -> list[int]:
    """Every size that the run goes through, the full one last."""
    ramp_up, full = train.ramp_up, train.global_batch_size
    if ramp_up.start_batch_size is None or ramp_up.increment is None:
        return [full]
    return [*range(ramp_up.start_batch_size, full, ramp_up.increment), full]


def batch_size_after(train: TrainConfig, consumed_samples: int) -> int:
    """Samples of the step that follows `consumed_samples` samples."""
    sizes = batch_sizes(train)
    # whole numbers: a share of the ramp need not be one
    level = consumed_samples * (len(sizes) - 1) // (train.ramp_up.samples or 1)
    return sizes[min(level, len(sizes) - 1)]


def samples_of_steps(train: TrainConfig, steps: int, consumed_samples: int = 0) -> int:
    """Samples that `steps` steps take together after `consumed_samples` samples."""
    sizes, samples = batch_sizes(train), consumed_samples
    for level, size in enumerate(sizes[:-1]):
        end = -(-(level + 1) * (train.ramp_up.samples or 1) // (len(sizes) - 1))  # first count of the next size
        taken = min(steps, max(0, -((samples - end) // size)))
        samples, steps = samples + taken * size, steps - taken
    return samples + steps * sizes[-1] - consumed_samples
