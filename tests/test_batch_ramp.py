"""The ramp of the batch size, against megatron-core's own calculator of it."""

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from dsmoe_megatron.batch_ramp import batch_size_after, batch_sizes, samples_of_steps
from dsmoe_megatron.config import RampUpConfig, TrainConfig

RAMPS = [(4, 4, 100), (4, 2, 97), (2, 30, 1), (31, 1, 1000), (8, 8, 3)]


@pytest.mark.parametrize(("start", "increment", "samples"), RAMPS)
def test_sizes_are_megatrons(start: int, increment: int, samples: int) -> None:
    train = TrainConfig(global_batch_size=32, ramp_up=RampUpConfig(start, increment, samples))
    megatron = RampupBatchsizeNumMicroBatchesCalculator(32, 1, 1, False, 0, start, increment, samples)

    consumed, met = 0, set()
    for step in range(100):
        megatron.update(consumed, consistency_check=True)
        assert batch_size_after(train, consumed) == megatron.get_current_global_batch_size()
        assert samples_of_steps(train, step) == consumed
        met.add(megatron.get_current_global_batch_size())
        consumed += megatron.get_current_global_batch_size()
    assert max(met) == 32
    assert met <= set(batch_sizes(train))


def test_without_a_ramp_all_batches_are_full() -> None:
    train = TrainConfig(global_batch_size=32)

    assert batch_sizes(train) == [32]
    assert batch_size_after(train, 0) == batch_size_after(train, 10**9) == 32
    assert samples_of_steps(train, 7) == 7 * 32
