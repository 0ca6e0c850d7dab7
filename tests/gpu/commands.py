"""The system's commands, each in a process of its own, on the GPU or on the CPU of the same machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import save_config
from tests.pretrain_job import training_lines

ROOT = Path(__file__).resolve().parents[2]
Device = Literal["gpu", "cpu"]


def command(device: Device, *words: object) -> str:
    """What `python` prints of these words.

    Raises:
        AssertionError: it failed; holds its messages.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def pretrain(device: Device, config: Config, *options: str) -> str:
    """What the run prints."""
    run_dir = Path(config.train.run_dir)
    recipe = run_dir.with_name(f"{run_dir.name}.yaml")
    save_config(config, recipe)
    return command(device, "-m", "dsmoe_megatron", "pretrain", "--config", recipe, *options)


def trained(device: Device, config: Config) -> dict[int, dict[str, Any]]:
    """step -> what the run's metrics say of it, but for what depends on the clock."""
    pretrain(device, config)
    return training_lines(Path(config.train.run_dir))
