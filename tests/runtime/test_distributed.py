"""Choosing the device: what megatron-core lacks without Transformer Engine is there on either kind."""

import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from dsmoe_megatron.runtime.distributed import prepare_device


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_routers_kernel_has_a_name(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without, every router fails at its first product: seen on a GPU. The GPU is a stand-in here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device_type == "cuda")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)

    assert prepare_device().type == device_type

    inputs, weight = torch.randn(2, 3), torch.randn(4, 3)
    torch.testing.assert_close(moe_utils.router_gating_linear(inputs, weight, None, torch.float32), inputs @ weight.T)
