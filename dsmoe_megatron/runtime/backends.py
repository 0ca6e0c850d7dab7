"""Which library builds the linear layers and norms on this machine.

Norms stay separate from the linear layers whoever builds them: the routers read the normalised input. They are classes
that build something else, as megatron-core's TENorm is: it calls classes only.
"""

import importlib.util

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class TorchNorm:
    """torch's RMSNorm or LayerNorm, fit for sequence parallelism, which megatron-core's wrapper of them refuses."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:  # type: ignore[misc]
        norm_class = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        return _on_device(norm_class(hidden_size, eps=eps), config)


class ApexNorm:
    """NVIDIA apex's fused RMSNorm or LayerNorm; megatron-core's wrapper knows its LayerNorm only."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:  # type: ignore[misc]
        from apex.normalization import FusedLayerNorm, FusedRMSNorm

        norm_class = FusedRMSNorm if config.normalization == "RMSNorm" else FusedLayerNorm
        return _on_device(norm_class(hidden_size, eps=eps), config)


def _on_device(norm: nn.Module, config: TransformerConfig) -> nn.Module:
    norm = norm.to(device=torch.cuda.current_device(), dtype=config.params_dtype)
    for parameter in norm.parameters():
        # each rank normalises its own tokens: megatron-core sums the gradient over the tensor-parallel ranks
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's own linear layers, and torch's norms."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:  # noqa: ARG002 (the interface's)
        return TorchNorm


class ApexSpecProvider(LocalSpecProvider):
    """megatron-core's own linear layers, and apex's norms."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:  # noqa: ARG002 (the interface's)
        return ApexNorm


def layer_backend(device: torch.device) -> BackendSpecProvider:
    """On CUDA Transformer Engine's layers, or apex's norms, where they are installed; else torch's."""
    if device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    # the extension's name: the unrelated package that PyPI calls apex has none
    if device.type == "cuda" and importlib.util.find_spec("fused_layer_norm_cuda") is not None:
        return ApexSpecProvider()
    return TorchSpecProvider()
