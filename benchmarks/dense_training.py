"""What training an MoE model densely costs, beside the dense model and megatron-core's own MoE layer.

    python benchmarks/dense_training.py [--repeats 9] [--threads 2] [--json FILE]

Three models of the same size take turns in one process: the dense baseline; DS-MoE; megatron-core's MoELayer with top-k
= all experts, which computes the same sum through its token dispatcher. Measured are one MLP layer (forward and
backward) and a whole training step, in time and in live tensor bytes. Seconds depend on the machine and on what else
runs on it: the results are ratios within a repeat, in which the models' order rotates.
"""

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fc, PositiveInt
from torch.profiler import ProfilerActivity, profile, record_function

from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import DSMoEError, exit_with
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device, process_group

DENSE, DSMOE, MEGATRON = "dense", "DS-MoE", "Megatron-Core MoE"
RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
WARMUPS = 2
MEASURED_STEP = "measured step"

Run = Callable[[], object]
Build = Callable[[Config, torch.device], Run]


@dataclass(frozen=True)
class Limit:
    """What the ratio of one model to another must keep to."""

    model: str
    to: str
    bound: Literal["<=", ">="]
    value: float

    def met_by(self, ratio: float) -> bool:
        return ratio <= self.value if self.bound == "<=" else ratio >= self.value


TIME_LIMITS = (Limit(DSMOE, DENSE, "<=", 1.05), Limit(MEGATRON, DSMOE, ">=", 3.0))
MEMORY_LIMIT = Limit(DSMOE, DENSE, "<=", 1.15)
