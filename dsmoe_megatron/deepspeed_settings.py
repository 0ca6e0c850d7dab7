"""The recipe in DeepSpeed's words, with the user's own DeepSpeed configuration laid over it.

The user's file may tune how DeepSpeed communicates and what it logs. What is trained is the recipe's: a key that says
otherwise is refused, and so is one that nobody has tried here. Nothing here imports torch or DeepSpeed.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config
from dsmoe_megatron.errors import ConfigurationError

INSTALL = "pip install 'dsmoe-megatron[train,deepspeed]'"
OFF = (None, False, {}, "none")

# beside the keys that the recipe settles
TUNING = {
    *("comms_logger", "communication_data_type", "csv_monitor", "dump_state", "flops_profiler", "memory_breakdown"),
    *("prescale_gradients", "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb"),
}
ZERO_TUNING = {
    *("allgather_bucket_size", "contiguous_gradients", "overlap_comm", "reduce_bucket_size", "reduce_scatter"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold"),
    *("stage3_prefetch_bucket_size", "sub_group_size", "use_multi_rank_bucket_allreduce"),
}
OFFLOAD_TUNING = {"pin_memory"}


def require_deepspeed(config: Config) -> None:
    """Refuse a recipe for DeepSpeed where that is not installed.

    Raises:
        ConfigurationError: says how to install it.
    """
    if config.engine.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigurationError("engine.name", "deepspeed", f"DeepSpeed is not installed: {INSTALL}")


def settings(config: Config, on_cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Args:
        config: recipe that `check_deepspeed_config` accepted.
        on_cuda: whether tensors lie on GPUs.
    """
    zero: dict[str, Any] = {
        "stage": config.engine.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    ours = {
        # batches grow and DeepSpeed counts none of their micro-batches: each step tells it when its gradients are done
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }
    if config.engine.deepspeed_config is None:
        return ours
    users = _read(config.engine.deepspeed_config)
    settled = {path[0] for path, *_ in _settled(config, 1)} - {"zero_optimization"}
    return _laid_over(ours, {key: value for key, value in users.items() if key not in settled})


def check_deepspeed_config(config: Config, data_parallel: int) -> None:
    """Refuse a user's DeepSpeed configuration that contradicts the recipe or asks for what was never tried.

    Args:
        config: recipe; engine.deepspeed_config may be null.
        data_parallel: number of data-parallel ranks.

    Raises:
        ConfigurationError: the first key, with both values and the recipe's key.
    """
    file = config.engine.deepspeed_config
    if file is None:
        return
    users = _read(file)
    settled = list(_settled(config, data_parallel))
    for path, wanted, rule in settled:
        value = _at(users, path)
        if value in ("auto", None) or value == wanted or (value in OFF and wanted in OFF):
            continue
        _refuse(file, f"{'.'.join(path)} is {json.dumps(value)} there, {json.dumps(wanted)} by {rule}")
    zero = users.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    for name, section, tuning in (
        ("", users, TUNING),
        ("zero_optimization.", zero, ZERO_TUNING),
        ("zero_optimization.offload_optimizer.", offload, OFFLOAD_TUNING),
    ):
        known = tuning | {key for path, *_ in settled for key in path}
        unknown = sorted(set(section) - known)
        if unknown:
            rule = f"{name}{unknown[0]} is not among the keys that were tried here: {', '.join(sorted(tuning))}"
            _refuse(file, f"{rule}; remove it")
    if zero.get("overlap_comm") and config.engine.zero_stage == 1:
        _refuse(file, "zero_optimization.overlap_comm needs engine.zero_stage 2 or 3; remove it")


def _settled(config: Config, data_parallel: int) -> Iterator[tuple[tuple[str, ...], object, str]]:
    """Path of a DeepSpeed key, the value that the recipe gives it, and the recipe's key for it."""
    train, engine = config.train, config.engine
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel)
    yield ("train_batch_size",), train.global_batch_size, "train.global_batch_size: set that"
    yield ("train_micro_batch_size_per_gpu",), train.micro_batch_size, "train.micro_batch_size: set that"
    rule = "train.global_batch_size over micro-batches and replicas: set that"
    yield ("gradient_accumulation_steps",), micro_batches, rule
    yield ("gradient_clipping",), config.optimizer.clip_grad, "optimizer.clip_grad: set that"
    precision = f"train.precision = {train.precision}: set that"
    yield ("bf16", "enabled"), train.precision == "bf16", precision
    yield ("fp16", "enabled"), False, f"{precision} (fp32 or bf16)"
    yield ("zero_optimization", "stage"), engine.zero_stage, "engine.zero_stage: set that"
    device = "cpu" if engine.offload_optimizer else "none"
    yield ("zero_optimization", "offload_optimizer", "device"), device, "engine.offload_optimizer: set that"
    yield ("optimizer",), None, "the recipe's section optimizer: set its keys"
    yield ("scheduler",), None, "optimizer.schedule, warmup_steps and decay_steps: set these"


def _read(file: str) -> dict[str, Any]:
    try:
        users = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError("engine.deepspeed_config", file, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigurationError("engine.deepspeed_config", file, f"is not JSON ({error})") from error
    sections = [users, *(users.get(key) or {} for key in ("zero_optimization", "bf16", "fp16"))] if users else [{}]
    if not all(isinstance(section, dict) for section in sections):
        _refuse(file, "must be a JSON object, and so must its sections")
    return dict(users)


def _at(section: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        section = section.get(key) if isinstance(section, dict) else None
    return section


def _laid_over(ours: dict[str, Any], users: dict[str, Any]) -> dict[str, Any]:
    result = dict(ours)
    for key, value in users.items():
        if value == "auto":
            continue
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _laid_over(result[key], value) if both else value
    return result


def _refuse(file: str, rule: str) -> None:
    raise ConfigurationError("engine.deepspeed_config", file, rule)
