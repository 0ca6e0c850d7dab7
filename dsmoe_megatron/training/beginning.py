"""Where a run begins: at its newest whole checkpoint, at one that the recipe names, or anew; and with which data."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsmoe_megatron.batch_ramp import samples_of_steps
from dsmoe_megatron.checkpoint_manifest import NOT_CHECKED
from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import CheckpointError, ConfigurationError, TrainingError
from dsmoe_megatron.run_folder import Progress, is_step_folder, read_progress
from dsmoe_megatron.runtime.distributed import raised_on_every_rank
from dsmoe_megatron.tokenizers import Tokenizer
from dsmoe_megatron.training.blends import cache_dir_of
from dsmoe_megatron.training.checkpoint import has_optimizer_state, load_checkpoint, load_weights
from dsmoe_megatron.training.data import build_datasets, data_identity
from dsmoe_megatron.training.engines.protocol import Engine
from dsmoe_megatron.training.resuming import Choice, choose_checkpoint
from dsmoe_megatron.training.retention import clean_up

Say = Callable[[str], None]


@dataclass(frozen=True)
class Beginning:
    """What the first step of this process starts with; the engine is loaded.

    Attributes:
        progress: how far the run has come.
        train_data: maps a sample's index to its tensors; progress.data_position is the next one.
        validation_data: likewise, or None.
        faults: of checkpoints that were passed over, a line each.
    """

    progress: Progress
    train_data: Any
    validation_data: Any
    faults: list[str]


def begin(engine: Engine, config: Config, tokenizer: Tokenizer, run_dir: Path, say: Say) -> Beginning:
    """Find the checkpoint, open the data where it left them, load the engine.

    Args:
        engine: as new.
        config: checked recipe with a known vocabulary size.
        tokenizer: of the data.
        run_dir: exists; what a killed run has left unfinished in it is removed.
        say: takes a line, on every rank.

    Raises:
        DSMoEError: on every rank.
    """
    choice = _choose(config, run_dir)
    progress, has_optimizer = Progress(), False
    if choice is not None:
        with raised_on_every_rank():
            has_optimizer = has_optimizer_state(choice.folder)
            progress = read_progress(choice.folder)
            if progress.step:
                _check_batch_size(config, choice.folder)
    train_data, validation_data = _open_data(config, tokenizer, progress, choice, say)
    if choice is not None:
        _load(engine, config, choice, has_optimizer, progress.step, say)
    return Beginning(progress, train_data, validation_data, choice.faults if choice is not None else [])


def _choose(config: Config, run_dir: Path) -> Choice | None:
    with raised_on_every_rank():
        if is_step_folder(run_dir):  # a run there would begin again with it for ever
            rule = "is a step folder, not a run's: name another, and give this one as checkpoint.load"
            raise ConfigurationError("train.run_dir", str(run_dir), rule)
    with raised_on_every_rank():
        if dist.get_rank() == 0:
            try:
                clean_up(run_dir)
            except OSError as error:
                raise TrainingError(f"{run_dir}: cannot remove unfinished checkpoints: {error}") from error
    section = config.checkpoint
    choice = choose_checkpoint(run_dir, section.strict, is_own=True)
    if choice is None and section.load is not None:
        choice = choose_checkpoint(Path(section.load), section.strict, is_own=False)
        with raised_on_every_rank():
            if choice is None:
                raise CheckpointError(f"{section.load}: no checkpoint there (checkpoint.load)")
    for fault in choice.faults if choice is not None and dist.get_rank() == 0 else []:
        print(f"WARNING: damaged checkpoint passed over: {fault}", file=sys.stderr, flush=True)
    return choice


def _check_batch_size(config: Config, folder: Path) -> None:
    if config.checkpoint.allow_other_data:
        return
    saved = load_config(folder / "config.yaml").train
    for key in ("global_batch_size", "ramp_up"):
        then, now = getattr(saved, key), getattr(config.train, key)
        if then != now:
            rule = (
                f"{folder} was trained with {then}: restore it, or set checkpoint.allow_other_data to go on where the "
                "data were left, in other batches"
            )
            raise ConfigurationError(f"train.{key}", now, rule)


def _open_data(
    config: Config, tokenizer: Tokenizer, progress: Progress, choice: Choice | None, say: Say
) -> tuple[Any, Any]:
    """The datasets for the rest of the run; `progress` is told which data they are."""

    def build() -> tuple[Any, Any, str]:
        steps = max(0, config.train.steps - progress.step)
        left = samples_of_steps(config.train, steps, progress.consumed_samples)
        samples = max(1, progress.data_position + left)
        train, validation = build_datasets(config, tokenizer, cache_dir_of(config), say, samples)
        return train, validation, data_identity(config, tokenizer, train)

    train, validation, identity = build()
    if progress.data_identity not in ("", identity):
        with raised_on_every_rank():
            if not config.checkpoint.allow_other_data:
                raise CheckpointError(
                    f"{choice.folder if choice else ''}: was trained on other data (blend, tokenizer, "
                    "train.sequence_length, train.seed or, where a dataset is repeated, train.steps differ), so the "
                    "samples that it has seen are unknown here; restore them, start in a new train.run_dir, or set "
                    "checkpoint.allow_other_data to read these from their beginning"
                )
        progress.data_begin = progress.consumed_samples
        train, validation, identity = build()  # as many as are left, from the first one
        say("other data than the checkpoint's: they are read from their beginning (checkpoint.allow_other_data)")
    progress.data_identity = identity
    return train, validation


def _load(engine: Engine, config: Config, choice: Choice, has_optimizer: bool, step: int, say: Say) -> None:
    unchecked = "" if choice.is_checked else f" ({NOT_CHECKED})"
    with raised_on_every_rank():
        if has_optimizer:
            load_checkpoint(engine, config, choice.folder)
        else:
            load_weights(engine, config, choice.folder, step)
    if has_optimizer:
        say(f"resumed from {choice.folder}{unchecked}")
    elif step:
        say(f"resumed from {choice.folder}{unchecked}: no update was applied up to step {step}")
    else:
        say(f"started from {choice.folder}{unchecked}: weights alone, so the optimizer is fresh and this is step 0")
