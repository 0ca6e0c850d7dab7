"""The recipe in DeepSpeed's words, with the user's own DeepSpeed configuration laid over it.

The user's file may tune how DeepSpeed communicates and what it says. What is trained is the recipe's: a key that says
otherwise is refused, and so is one that was never tried here. Nothing here imports torch or DeepSpeed.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from dsmoe_megatron.config import Config
from dsmoe_megatron.errors import ConfigurationError

INSTALL = "pip install '.[train,deepspeed]'"
KEY = "engine.deepspeed_config"
LARGEST_BUCKET = 50_000_000  # values that are reduced or gathered at once

# what may be tuned, by section
TUNING = {
    "": {"comms_logger", "dump_state", "memory_breakdown", "steps_per_print", "wall_clock_breakdown"},
    "zero_optimization": {
        *("allgather_bucket_size", "contiguous_gradients", "overlap_comm", "reduce_bucket_size", "reduce_scatter"),
        *("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold"),
        *("stage3_prefetch_bucket_size", "sub_group_size", "use_multi_rank_bucket_allreduce"),
    },
    "zero_optimization.offload_optimizer": {"pin_memory"},
    "bf16": set(),
}
# what the recipe says, by section
SETTLED = {
    "": {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("bf16", "fp16", "optimizer", "scheduler"),
    },
    "zero_optimization": {"stage"},
    "zero_optimization.offload_optimizer": {"device"},
    "bf16": {"enabled"},
}


def require_deepspeed(config: Config) -> None:
    """Refuse a recipe for DeepSpeed where that is not installed.

    Raises:
        ConfigurationError: says how to install it.
    """
    if config.engine.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigurationError("engine.name", "deepspeed", f"DeepSpeed is not installed: {INSTALL}")


def settings(config: Config, parameters: int, on_cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Args:
        config: recipe that `check_deepspeed_config` accepted.
        parameters: of this rank's part of the model; a buffer takes an eighth of it, at most LARGEST_BUCKET.
        on_cuda: whether tensors lie on GPUs.
    """
    bucket = min(2 * (parameters // 16) or 2, LARGEST_BUCKET)  # DeepSpeed wants an even number
    zero: dict[str, Any] = {
        "stage": config.engine.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_cuda}
    recipe = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        # batches grow: not DeepSpeed but the engine knows how many micro-batches make a step
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.clip_grad,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }
    users = {} if config.engine.deepspeed_config is None else _read(config.engine.deepspeed_config)
    return _laid_over(recipe, {key: value for key, value in users.items() if key not in SETTLED[""]})


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
    for path, wanted, keys in _recipe(config, data_parallel):
        value = _at(users, path)
        if value not in (None, "auto", wanted):
            rule = f"{path} is {json.dumps(value)} there and {json.dumps(wanted)} by the recipe"
            _refuse(file, f"{rule}: set {keys}, or remove it there")
    for name, keys in (
        ("optimizer", "optimizer.lr, weight_decay, beta1, beta2 and eps"),
        ("scheduler", "optimizer.schedule, warmup_steps, decay_steps and min_lr"),
    ):
        if users.get(name):
            _refuse(file, f"{name} is the recipe's: remove it there and set {keys}")
    for section, tuning in TUNING.items():
        sections = {each.rpartition(".")[2] for each in TUNING if each.rpartition(".")[0] == section}
        unknown = sorted(set(_at(users, section) or {}) - tuning - SETTLED[section] - sections)
        if unknown:
            name = ".".join(part for part in (section, unknown[0]) if part)
            may_be_set = f"; {section or 'the file'} may set {', '.join(sorted(tuning))}" if tuning else ""
            _refuse(file, f"{name} was never tried with this engine: remove it{may_be_set}")
    if _at(users, "zero_optimization.overlap_comm") is True and config.engine.zero_stage == 1:
        _refuse(file, "zero_optimization.overlap_comm needs engine.zero_stage 2 or 3: remove it")


def _recipe(config: Config, data_parallel: int) -> Iterator[tuple[str, object, str]]:
    """A key of DeepSpeed's, the value that the recipe gives it, and the recipe's keys that do."""
    train, engine = config.train, config.engine
    yield "train_batch_size", train.global_batch_size, "train.global_batch_size"
    yield "train_micro_batch_size_per_gpu", train.micro_batch_size, "train.micro_batch_size"
    micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel)
    yield "gradient_accumulation_steps", micro_batches, "train.global_batch_size and train.micro_batch_size"
    yield "gradient_clipping", config.optimizer.clip_grad, "optimizer.clip_grad"
    yield "bf16.enabled", train.precision == "bf16", "train.precision"
    yield "fp16.enabled", False, "train.precision (fp32 or bf16)"
    yield "zero_optimization.stage", engine.zero_stage, "engine.zero_stage"
    device = "cpu" if engine.offload_optimizer else "none"
    yield "zero_optimization.offload_optimizer.device", device, "engine.offload_optimizer (to the CPU)"


def _read(file: str) -> dict[str, Any]:
    try:
        users = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(KEY, file, f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not text
        raise ConfigurationError(KEY, file, f"is not JSON: {error}") from error
    if not isinstance(users, dict):
        _refuse(file, "is no JSON object")
    for section in (*TUNING, "fp16"):
        if section and not isinstance(_at(users, section) or {}, dict):
            _refuse(file, f"{section} is no JSON object")
    return users


def _at(users: dict[str, Any], path: str) -> Any:
    value: Any = users
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _laid_over(recipe: dict[str, Any], users: dict[str, Any]) -> dict[str, Any]:
    result = dict(recipe)
    for key, value in users.items():
        if value in (None, "auto"):
            continue
        result[key] = _laid_over(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def _refuse(file: str, rule: str) -> NoReturn:
    raise ConfigurationError(KEY, file, rule)
