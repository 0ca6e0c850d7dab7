"""Which library builds the linear layers and norms on this machine."""

import importlib.util

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider


def layer_backend(device: torch.device) -> BackendSpecProvider:
    """Transformer Engine's layers on CUDA where it is installed, else megatron-core's own on torch."""
    if device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    return LocalSpecProvider()
