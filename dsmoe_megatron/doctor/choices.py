"""What a recipe would be computed with in an environment, and whether it can run there at all.

The rules repeat what runtime/backends.py, model/specs.py and megatron-core 0.16.1 (optimizer/__init__.py,
optimizer/clip_grads.py, tensor_parallel/layers.py) decide at run time; tests hold them against what these build.
"""

from dataclasses import dataclass, replace

from dsmoe_megatron.config import Config
from dsmoe_megatron.deepspeed_settings import INSTALL
from dsmoe_megatron.doctor.environment import Environment
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.planning.estimate import estimate, is_memory_known, smallest_world_size
from dsmoe_megatron.planning.hardware import load_hardware

SUPPORTED_CORE = "0.16.1"
# padded to a plausible size where the recipe leaves the vocabulary to the tokenizer
USUAL_VOCABULARY = 50257
TRANSFORMER_ENGINE = "pip install --no-build-isolation 'transformer_engine[pytorch]'"
NVIDIA_APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
    "pip install --no-build-isolation -v ."
)


@dataclass(frozen=True)
class Choice:
    """One part of the computation.

    Attributes:
        part: what is computed.
        implementation: what computes it here.
        better: what would compute it faster, None where there is nothing.
        install: the command that brings it.
    """

    part: str
    implementation: str
    better: str | None = None
    install: str | None = None


def choices(environment: Environment, config: Config) -> list[Choice]:
    """What each part of a step is computed with.

    Args:
        environment: what is here.
        config: checked recipe.
    """
    engine_on_cuda = environment.on_cuda and environment.has("transformer-engine")
    wants_engine = None if engine_on_cuda or not environment.on_cuda else "Transformer Engine"
    install = TRANSFORMER_ENGINE if wants_engine else None
    layers = "Transformer Engine" if engine_on_cuda else "torch (megatron-core's own layers)"
    return [
        Choice("linear", layers, wants_engine, install),
        Choice("norm", _norm(environment, config), wants_engine, install),
        Choice("attention", _attention(environment, config)),
        *(_of_deepspeed(environment, config) if config.engine.name == "deepspeed" else _of_megatron(environment)),
        Choice("communication", _backend(environment)),
    ]


def _of_deepspeed(environment: Environment, config: Config) -> list[Choice]:
    """What training/engines/deepspeed.py takes, whatever else is installed."""
    adam = "DeepSpeedCPUAdam" if config.engine.offload_optimizer else "torch AdamW"
    fused = ", fused" if environment.on_cuda and not config.engine.offload_optimizer else ""
    return [
        Choice("Adam", adam + fused),
        Choice("gradient norm", f"DeepSpeed ZeRO-{config.engine.zero_stage}, on torch"),
        Choice("gradient accumulation", f"DeepSpeed ZeRO-{config.engine.zero_stage}, in float32"),
    ]


def _of_megatron(environment: Environment) -> list[Choice]:
    return [
        _adam(environment),
        _gradient_norm(environment),
        Choice("gradient accumulation", "torch: products, then a sum (the recipe's engine never fuses them)"),
    ]


def _norm(environment: Environment, config: Config) -> str:
    name = "RMSNorm" if config.model.norm_type == "rmsnorm" else "LayerNorm"
    if environment.on_cuda and environment.has("transformer-engine"):
        return f"Transformer Engine {name}"
    fused = environment.on_cuda and "fused_layer_norm_cuda" in environment.apex_extensions
    return f"apex Fused{name}" if fused else f"torch {name}"


def _attention(environment: Environment, config: Config) -> str:
    if not environment.on_cuda:
        return "torch scaled_dot_product_attention, its CPU flash kernel"
    kernel = "flash" if config.train.precision == "bf16" else "memory-efficient"
    return f"torch scaled_dot_product_attention, its {kernel} kernel"


def _adam(environment: Environment) -> Choice:
    # megatron-core takes the first that can be imported, on whatever device
    if environment.has("transformer-engine"):
        return Choice("Adam", "Transformer Engine FusedAdam")
    if environment.apex == "nvidia":
        return Choice("Adam", "apex FusedAdam")
    better = "Transformer Engine's or apex's FusedAdam" if environment.on_cuda else None
    return Choice("Adam", "torch AdamW", better, TRANSFORMER_ENGINE if better else None)


def _gradient_norm(environment: Environment) -> Choice:
    if environment.has("transformer-engine"):
        return Choice("gradient norm", "Transformer Engine multi_tensor_l2norm")
    if environment.apex == "nvidia" and "amp_C" in environment.apex_extensions:
        return Choice("gradient norm", "apex multi_tensor_l2norm (amp_C)")
    better = "apex's amp_C" if environment.on_cuda else None
    return Choice("gradient norm", "megatron-core's own loop on torch", better, NVIDIA_APEX if better else None)


def _backend(environment: Environment) -> str:
    return "NCCL, gloo for host tensors" if environment.on_cuda else "gloo"


def reasons_against(environment: Environment, config: Config) -> list[str]:
    """Why the recipe cannot run here; empty where it can.

    Args:
        environment: what is here.
        config: recipe; it need not have been checked.
    """
    reasons = []
    if environment.torch is None:
        reasons.append("torch is not installed: pip install '.[train]'")
    core = environment.libraries.get("megatron-core")
    if core is None:
        reasons.append("megatron-core is not installed: pip install '.[train]'")
    elif core != SUPPORTED_CORE:
        reasons.append(f"megatron-core {core} is installed, but this is written on {SUPPORTED_CORE}")
    if config.engine.name == "deepspeed" and not environment.has("deepspeed"):
        reasons.append(f"engine.name is deepspeed, which is not installed: {INSTALL}")
    needed_backend = "nccl" if environment.on_cuda else "gloo"
    if environment.torch is not None and needed_backend not in environment.backends:
        reasons.append(f"torch was built without {needed_backend}")
    try:
        reasons += _reasons_of_size(environment, config)
    except ConfigurationError as error:
        reasons.append(str(error))
    return reasons


def _reasons_of_size(environment: Environment, config: Config) -> list[str]:
    """The layout's processes and their memory against what this one machine has."""
    vocabulary = config.model.vocab_size or USUAL_VOCABULARY
    config = replace(config, model=replace(config.model, vocab_size=vocabulary))
    fewest = smallest_world_size(config)
    processes = max(fewest, len(environment.devices))
    # the memory of a rank is the same on every row of the table; only its limit is not
    needed = estimate(config, processes, load_hardware("h100")).peak_memory if is_memory_known(config) else 0
    if environment.device_memory is None:
        if environment.memory is None or needed * processes <= environment.memory:
            return []
        return [
            f"{processes} process(es) of {needed / 1e9:,.1f} GB, but this machine has "
            f"{environment.memory / 1e9:,.0f} GB of memory and no GPU"
        ]
    reasons = []
    if fewest > len(environment.devices):
        reasons.append(f"its layout needs {fewest} GPUs or more, and {len(environment.devices)} are here")
    if needed > environment.device_memory:
        reasons.append(
            f"{needed / 1e9:,.1f} GB on each of {processes} GPUs, but those here have "
            f"{environment.device_memory / 1e9:,.0f} GB"
        )
    return reasons
