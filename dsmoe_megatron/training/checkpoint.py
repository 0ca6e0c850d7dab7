"""Distributed checkpoints: one global tensor per parameter, so that every layout loads every other's.

run_folder.py says what lies where.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.config import Config, ModelConfig
from dsmoe_megatron.config_parsing import load_config, save_config
from dsmoe_megatron.errors import CheckpointError, TrainingError
from dsmoe_megatron.run_folder import LATEST, Progress, read_progress, step_folder_name
from dsmoe_megatron.runtime.processes import serve_this_rank
from dsmoe_megatron.training.engines.megatron import MegatronEngine

# what reading and writing shards raise; torch's CheckpointException derives from BaseException
SHARD_ERRORS = (OSError, RuntimeError, KeyError, EOFError, CheckpointingException, CheckpointException)

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


def save_checkpoint(engine: MegatronEngine, config: Config, progress: Progress, run_dir: Path) -> Path:
    """Write a checkpoint beside its final place, rename it when every rank is done, then move `latest`.

    Returns:
        The step folder.

    Raises:
        TrainingError: the disk is full or the folder cannot be written; nothing is taken for whole.
    """
    final = run_dir / "checkpoints" / step_folder_name(progress.step)
    unfinished = final.with_name(f"{final.name}.unfinished")
    _on_rank_0(lambda: _make_empty(unfinished), f"cannot make {unfinished}")
    _end_writer_with_this_process()
    state = engine.sharded_state()
    try:
        dist_checkpointing.save(state, str(unfinished))
    except SHARD_ERRORS as error:
        raise TrainingError(f"cannot save {final}: {_cause(error)}") from error

    def publish() -> None:
        save_config(config, unfinished / "config.yaml")
        _write_durably(unfinished / "progress.json", json.dumps(dataclasses.asdict(progress), indent=2))
        if final.exists():
            shutil.rmtree(final)
        unfinished.rename(final)
        _write_durably(run_dir / LATEST, final.name + "\n")
        _forget_old(run_dir, config.checkpoint.keep_last)

    _on_rank_0(publish, f"cannot finish {final}")
    return final


def _end_writer_with_this_process() -> None:
    """Start the process that gathers megatron-core's write results before megatron-core does: its own outlives a
    killed rank, with hundreds of megabytes."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=serve_this_rank)
        filesystem_async._results_queue = manager.Queue()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_durably(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _forget_old(run_dir: Path, keep_last: int) -> None:
    whole = sorted(path for path in (run_dir / "checkpoints").glob("step_????????") if path.is_dir())
    for folder in whole[:-keep_last] if keep_last else []:
        shutil.rmtree(folder)


def _on_rank_0(action: Any, complaint: str) -> None:
    """Do it on rank 0; a failure there is raised on every rank, so that none waits for the others."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure[0] = f"{complaint}: {error.strerror or error}"
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise TrainingError(failure[0])


def _cause(error: BaseException) -> str:
    """The last line: torch puts the ranks' tracebacks before it."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].strip()


def has_optimizer_state(folder: Path) -> bool:
    """Whether a step folder holds more than weights; an imported model's does not.

    Raises:
        CheckpointError: its table of contents cannot be read.
    """
    return any(name.startswith("optimizer.") for name in read_metadata(folder).state_dict_metadata)


def load_checkpoint(engine: MegatronEngine, config: Config, folder: Path) -> Progress:
    """Load weights, optimizer and schedule of a step folder, saved under any layout.

    Raises:
        CheckpointError: another architecture, or tensors that are missing, left over or unreadable.
    """
    check_same_architecture(folder, config.model)
    loaded = _load(engine.sharded_state(is_loading=True), folder)
    progress = read_progress(folder)
    engine.load_state(loaded, progress.step)
    return progress


def load_weights(engine: MegatronEngine, config: Config, folder: Path) -> None:
    """Load a step folder that holds weights alone, saved under any layout; the optimizer stays as new.

    Raises:
        CheckpointError: as load_checkpoint.
    """
    check_same_architecture(folder, config.model)
    engine.load_weights(_load(engine.sharded_weights(), folder))


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    read_metadata(folder)  # torch unpickles it without asking: look at it first
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
    except SHARD_ERRORS as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {_cause(error)}") from error
    return loaded


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
