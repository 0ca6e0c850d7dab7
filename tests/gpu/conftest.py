"""What the tests of this folder need: a GPU. They run on any one CUDA device.

    python -m pytest tests/gpu

Their peer is the CPU of the same machine: the same command in a process to which CUDA shows no device.
"""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
