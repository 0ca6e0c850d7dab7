"""What this machine and this Python environment have. Nothing is built or initialised to find out."""

import ast
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Apex = Literal["none", "nvidia", "unrelated"]
# the extensions of NVIDIA apex that megatron-core 0.16.1 looks for: clip_grads.py, tensor_parallel/layers.py,
# fusions/fused_layer_norm.py, fusions/fused_softmax.py
APEX_EXTENSIONS = (
    "amp_C",
    "fused_layer_norm_cuda",
    "fused_weight_gradient_mlp_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)
LIBRARIES = {
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine",
    "deepspeed": "deepspeed",
    "flash-attn": "flash_attn",
    "transformers": "transformers",
    "sentencepiece": "sentencepiece",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


@dataclass(frozen=True)
class Environment:
    """What is here.

    Attributes:
        python, torch: versions; torch is None where it is not installed.
        cuda: version that torch was built for, None for a build without.
        devices: names of the CUDA devices that torch sees.
        device_memory: of the smallest of them [bytes]; None without any.
        cores: processors that this process may use.
        memory: of the machine [bytes], None where the system does not say.
        backends: of torch.distributed, in this build.
        libraries: version by name; None: not installed.
        apex: NVIDIA's, the unrelated package of that name on PyPI, or none.
        apex_extensions: of NVIDIA's, those that megatron-core looks for and that are built.
        deepspeed_operators: that were built when it was installed; others are built at their first use.
        torchrun_waits: for ranks that save at a signal to stop, as long as it is told.
    """

    python: str
    torch: str | None
    cuda: str | None
    devices: tuple[str, ...]
    device_memory: int | None
    cores: int
    memory: int | None
    backends: tuple[str, ...]
    libraries: dict[str, str | None] = field(default_factory=dict)
    apex: Apex = "none"
    apex_extensions: tuple[str, ...] = ()
    deepspeed_operators: tuple[str, ...] = ()
    torchrun_waits: bool = True

    @property
    def on_cuda(self) -> bool:
        return bool(self.devices)

    def has(self, library: str) -> bool:
        return self.libraries.get(library) is not None


def inspect_environment() -> Environment:
    """Look at what is installed and at the devices."""
    libraries = {name: _version(name, module) for name, module in LIBRARIES.items()}
    apex = _apex()
    return Environment(
        python=platform.python_version(),
        **_of_torch(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        libraries=libraries,
        apex=apex,
        apex_extensions=tuple(name for name in APEX_EXTENSIONS if _is_there(name)) if apex == "nvidia" else (),
        deepspeed_operators=_deepspeed_operators() if libraries["deepspeed"] else (),
    )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not there
        return False


def _version(distribution: str, module: str) -> str | None:
    """None where the module cannot be imported; wheels of other names (transformer_engine_cu12) count as well."""
    if not _is_there(module):
        return None
    names = importlib.metadata.packages_distributions().get(module.partition(".")[0], [distribution])
    for name in (distribution, *names):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _apex() -> Apex:
    """PyPI's package `apex` is another one: NVIDIA's is installed from its repository and has apex.optimizers."""
    if not _is_there("apex"):
        return "none"
    return "nvidia" if _is_there("apex.optimizers") else "unrelated"


def _of_torch() -> dict[str, Any]:
    if not _is_there("torch"):
        return {"torch": None, "cuda": None, "devices": (), "device_memory": None, "backends": ()}
    import torch
    import torch.distributed as dist
    from torch.distributed.run import get_args_parser

    torchrun_options = vars(get_args_parser().parse_args(["program"]))
    available: dict[str, Callable[[], bool]] = {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "mpi": dist.is_mpi_available,
    }
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "devices": tuple(device.name for device in devices),
        "device_memory": min((device.total_memory for device in devices), default=None),
        "backends": tuple(name for name, is_there in available.items() if dist.is_available() and is_there()),
        "torchrun_waits": {"shutdown_timeout", "signals_to_handle"} <= torchrun_options.keys(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _deepspeed_operators() -> tuple[str, ...]:
    """DeepSpeed writes down what its installation built; importing it would take seconds and probe compilers."""
    found = importlib.util.find_spec("deepspeed")
    for folder in (found and found.submodule_search_locations) or ():
        record = Path(folder) / "git_version_info_installed.py"
        if record.is_file():
            operators = _literals(record.read_text(encoding="utf-8")).get("installed_ops", {})
            return tuple(name for name, built in operators.items() if built) if isinstance(operators, dict) else ()
    return ()


def _literals(source: str) -> dict[str, object]:
    """The constants that a file of assignments holds; nothing of it is run."""
    values: dict[str, object] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                values[statement.targets[0].id] = ast.literal_eval(statement.value)
            except ValueError:
                continue
    return values
