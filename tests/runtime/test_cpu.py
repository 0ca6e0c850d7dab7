"""The CPU answers load only where they are meant to."""

import subprocess
import sys

import pytest
import torch

REFUSAL = """
from dsmoe_megatron.errors import EnvironmentNotSupportedError
{setup}
from dsmoe_megatron.runtime.cpu import answer_cuda_assumptions
try:
    answer_cuda_assumptions()
except EnvironmentNotSupportedError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("import torch; torch.cuda.is_available = lambda: True", "on a machine with CUDA"),
        (
            "import importlib.metadata as m; m.version = lambda name: '0.99.0'",
            "megatron-core 0.99.0 on a CPU: only 0.16.1",
        ),
        ("import megatron.core", "megatron.core was imported first"),
    ],
    ids=["with CUDA", "another megatron-core", "too late"],
)
def test_refuses_to_load(setup: str, message: str) -> None:
    program = REFUSAL.format(setup=setup)

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert message in answer.stdout


def test_nothing_of_it_is_in_model_or_training() -> None:
    program = (
        "import dsmoe_megatron.model.router, sys; "
        "print([name for name in sys.modules if name == 'dsmoe_megatron.runtime.cpu'])"
    )

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"


def test_leaves_device_contexts_alone() -> None:
    """Loading a model elsewhere builds it on the meta device; this process has the answers loaded."""
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
        assert torch.zeros(1).device.type == "meta"
    assert torch.empty(1, device="cuda").device.type == "cpu"


def test_megatron_core_comes_without_the_compiler_and_leaves_it_to_others() -> None:
    program = (
        "from dsmoe_megatron.runtime.distributed import prepare_device; prepare_device()\n"
        "import sys, dsmoe_megatron.training.loop, megatron.core.jit\n"
        "print([name for name in ('torch._inductor.compile_fx', 'wandb') if name in sys.modules])\n"
        "import torch, wandb\n"
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item(), wandb.__name__)\n"
    )

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert answer.stdout.splitlines() == ["[]", "2.0 wandb"]
