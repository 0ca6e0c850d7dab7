"""Loading distributed checkpoints: one global tensor per parameter, so that every layout loads every other's.

run_folder.py says what lies where; saving.py writes them.
"""

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.checkpoint_reading import CheckpointReader
from dsmoe_megatron.config import Config, ModelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import CheckpointError, TrainingError, first_line
from dsmoe_megatron.run_folder import Progress, read_progress
from dsmoe_megatron.training.engines.protocol import Engine
from dsmoe_megatron.training.optimizer_shards import PREFIX
from dsmoe_megatron.training.shard_writing import COMMON_FILE

READERS = 2  # threads per rank

# what may differ between a checkpoint's recipe and the one that loads it: nothing that shapes a weight
FREE_MODEL_KEYS = {
    "mi_alpha_attention",
    "mi_alpha_mlp",
    "mi_scope",
    "switch_loss_coefficient",
    "hidden_dropout",
    "attention_dropout",
    "max_position_embeddings",
    "initializer_range",
    "num_experts_per_tok",
    "attention_experts_per_tok",
    "expert_policy",
    "expert_threshold",
    "attention_expert_threshold",
}


def check_disk_space(run_dir: Path, parameters: int, config: Config) -> None:
    """Refuse to start where not even one checkpoint fits.

    Args:
        run_dir: exists.
        parameters: of the whole model.
        config: precision decides the bytes of a weight; each has a float32 master copy and two moments beside it.

    Raises:
        TrainingError: names the folder, what is needed and what is free.
    """
    needed = parameters * ((2 if config.train.precision == "bf16" else 4) + 3 * 4)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise TrainingError(
            f"{run_dir}: {free / 1e6:,.0f} MB free, but one checkpoint takes {needed / 1e6:,.0f} MB; "
            "free some or set train.run_dir to another disk"
        )


def has_optimizer_state(folder: Path) -> bool:
    """Whether a step folder holds more than weights; an imported model's, or one before the first update, does not.

    Raises:
        CheckpointError: its table of contents cannot be read.
    """
    return any(name.startswith("optimizer.") for name in read_metadata(folder).state_dict_metadata)


def load_checkpoint(engine: Engine, config: Config, folder: Path) -> Progress:
    """Load weights, optimizer and schedule of a step folder, saved under any layout. Every rank calls it.

    Raises:
        CheckpointError: another architecture, or tensors that are missing, left over or unreadable.
    """
    shards = sharded_tensors(engine.sharded_state(is_loading=True))
    names = _names_on_all_ranks(shards)
    check_same_architecture(folder, config.model)
    progress = read_progress(folder)
    _fill(shards, names, folder)
    engine.load_state(_common_state(folder), progress.step)
    return progress


def load_weights(engine: Engine, config: Config, folder: Path, step: int) -> None:
    """Load a step folder that holds weights alone, saved under any layout; the optimizer stays as new.

    Args:
        engine, config: to load into.
        folder: an imported model, or a checkpoint from before the first update.
        step: to set the schedule to.

    Raises:
        CheckpointError: as load_checkpoint.
    """
    shards = sharded_tensors(engine.sharded_weights())
    names = _names_on_all_ranks(shards)
    check_same_architecture(folder, config.model)
    _fill(shards, names, folder)
    engine.weights_loaded(step)


def sharded_tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    """Of an engine's `sharded_state` or `sharded_weights`, which this changes."""
    apply_factories(state)
    return [shard for shard in nested_values(state) if isinstance(shard, ShardedTensor)]


def _names_on_all_ranks(shards: list[ShardedTensor]) -> set[str]:
    """Before anything that can fail on one rank alone."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {shard.key for shard in shards})
    return set().union(*of_ranks)


def _fill(shards: list[ShardedTensor], names: set[str], folder: Path) -> None:
    """Read this rank's parts of the saved tensors into their place.

    Args:
        shards: of this rank.
        names: of the tensors of all ranks: each must be in the checkpoint, and no other.
        folder: of the checkpoint.
    """
    reader = CheckpointReader(folder)
    saved = set(reader.metadata.state_dict_metadata)
    for what, those in (("missing", names - saved), ("left over", saved - names)):
        if those:
            raise CheckpointError(f"{folder}: cannot be loaded: {what}: {', '.join(sorted(those)[:5])}")

    def read(shard: ShardedTensor) -> None:
        assert shard.data is not None
        name = _saved_values(reader, shard.key, shard.data.dtype)
        shape = tuple(reader.entry(name).size)
        if shape != tuple(shard.global_shape):
            raise CheckpointError(f"{folder}: {name} has shape {shape}, not {tuple(shard.global_shape)}")
        target = shard.data.detach().view((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
        reader.read_into(target, name, shard.global_offset)

    with ThreadPoolExecutor(READERS, "checkpoint reader") as threads:
        for _ in threads.map(read, shards):
            pass


def _saved_values(reader: CheckpointReader, key: str, dtype: torch.dtype) -> str:
    """The saved tensor that a weight or a state is read from: its own, unless that has lost digits.

    A weight that was saved in bf16 is a rounding of its float32 master. Where weights are float32 the optimizer trains
    them themselves, in the same memory: both must be read from the master, else the last one read would win, and
    data-parallel ranks would begin with rounded values in the ranges that others own.

    Args:
        reader: of the checkpoint.
        key: of what is read.
        dtype: that it has here.
    """
    master = f"{PREFIX}.param.{key}"
    is_rounded = reader.entry(key).properties.dtype.itemsize < dtype.itemsize
    return master if is_rounded and master in reader.metadata.state_dict_metadata else key


def _common_state(folder: Path) -> dict[str, Any]:
    """What no rank shards: hyperparameters and step count of the optimizer."""
    path = folder / COMMON_FILE
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged archive raises nearly anything
        reason = first_line(error)
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error


def check_same_architecture(folder: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint whose recipe shapes other weights.

    Raises:
        CheckpointError: names every key that differs, with both values.
    """
    saved, wanted = dataclasses.asdict(load_config(folder / "config.yaml").model), dataclasses.asdict(model)
    differing = [
        f"model.{key} is {saved[key]!r} there and {wanted[key]!r} here"
        for key in wanted
        if key not in FREE_MODEL_KEYS and saved[key] != wanted[key]
    ]
    if differing:
        raise CheckpointError(f"{folder}: a checkpoint of another architecture: {'; '.join(differing)}")
