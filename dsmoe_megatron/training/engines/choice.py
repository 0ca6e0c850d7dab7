"""The engine that a recipe names."""

import os

import torch

from dsmoe_megatron.config import Config
from dsmoe_megatron.training.engines.protocol import Engine


def build_engine(config: Config, device: torch.device) -> Engine:
    """Model, optimizer and schedule of this rank, with initial weights.

    Args:
        config: checked recipe with a known vocabulary size.
        device: of this rank.
    """
    if config.engine.name == "deepspeed":
        if device.type == "cpu":  # else every rank warns that there is no GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from dsmoe_megatron.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, device)
    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    return MegatronEngine(config, device)
