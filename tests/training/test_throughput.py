"""What a run says of its speed: figures that follow from one another, and the time that is left."""

import datetime
import re
from pathlib import Path

import pytest

from dsmoe_megatron.config import RampUpConfig
from dsmoe_megatron.planning.flops import training_flops
from dsmoe_megatron.planning.hardware import load_hardware, peak_of_device
from dsmoe_megatron.training.throughput import times_left
from tests.pretrain_job import SmallData, pretrain_job, read_lines, run_config
from tests.worker_pool import WorkerPool


def test_figures_follow_from_one_another(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    ramp = {"global_batch_size": 8, "ramp_up": RampUpConfig(4, 4, 12), "steps": 9}
    logging = {"interval": 2, "tensorboard": False}
    config = run_config(small_data, tmp_path, train=ramp, logging=logging, evaluation={"interval": 4, "batches": 1})

    printed = worker_pool.run(2, pretrain_job, config)[0]

    config.model.vocab_size = 500
    lines = [line for line in read_lines(tmp_path) if "lm_loss" in line]
    samples = {1: 4, 2: 4, 4: 12, 6: 16, 8: 16, 9: 8}  # in the steps since the line before
    steps = {1: 1, 2: 1, 4: 2, 6: 2, 8: 2, 9: 1}
    assert [line["step"] for line in lines] == list(steps)
    for line in lines:
        step = line["step"]
        seconds = line["step_time_s"] * steps[step]
        assert line["tokens_per_s"] == pytest.approx(samples[step] * 32 / seconds)
        flops = line["tokens_per_s"] * training_flops(config).model
        assert line["model_tflops_per_s_per_device"] == pytest.approx(flops / 2 / 1e12)
        assert line["mfu"] is None  # a CPU's peak is not in the table
        training_left = (4 * 3 + 8 * 6 - line["tokens"] // 32) * seconds / samples[step]
        if step < 4:  # nothing else has been timed
            assert line["time_left_s"] == pytest.approx(training_left)
        elif step in (6, 8):
            assert line["time_left_s"] > training_left + 1e-6
    assert lines[-1]["time_left_s"] == 0
    shown = re.search(r"step 8/9 .* TFLOP/s per device \| (\d+:\d+:\d+) left", printed)
    assert shown is not None
    assert shown[1] == str(datetime.timedelta(seconds=round(lines[-2]["time_left_s"])))


@pytest.mark.parametrize(
    ("interval", "due"), [(0, [20]), (7, [7, 14, 20]), (10, [10, 20]), (20, [20]), (50, [20]), (1, list(range(1, 21)))]
)
def test_what_is_due_until_the_end_is_counted(interval: int, due: list[int]) -> None:
    for step in range(21):
        assert times_left(step, 20, interval) == len([each for each in due if each > step])


def test_the_peak_is_found_by_the_devices_name() -> None:
    assert peak_of_device("NVIDIA H100 80GB HBM3", "bf16") == load_hardware("h100").peak("bf16")
    assert peak_of_device("NVIDIA A100-SXM4-80GB", "fp32") == load_hardware("a100").peak("fp32")
    assert peak_of_device("NVIDIA H100 PCIe", "bf16") is None  # slower than the one of the table
    assert peak_of_device("", "bf16") is None
