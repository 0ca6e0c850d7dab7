"""Whether a recipe can run here: the model is built, takes two steps on made-up tokens, is saved and loaded.

Nothing is read from or written into the run folder; the checkpoint goes to a temporary folder on the same disk.
"""

import math
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from dsmoe_megatron.config import Config
from dsmoe_megatron.errors import ConfigurationError, TrainingError, first_line
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.run_folder import Progress
from dsmoe_megatron.runtime.distributed import (
    deterministic_algorithms,
    model_parallel_groups,
    process_group,
    raised_on_every_rank,
)
from dsmoe_megatron.training.checkpoint import check_disk_space, load_checkpoint, sharded_tensors
from dsmoe_megatron.training.data import global_batches
from dsmoe_megatron.training.engines.choice import build_engine
from dsmoe_megatron.training.engines.protocol import Batch, Engine
from dsmoe_megatron.training.loop import open_data
from dsmoe_megatron.training.saving import CheckpointSaver, SaveReport

Rows = dict[str, str]


def check_run(config: Config, device: torch.device) -> None:
    """Print a table of what was found.

    Args:
        config: recipe that check_config accepted.
        device: that prepare_device chose.

    Raises:
        DSMoEError: what stands in the way of a run.
    """
    with deterministic_algorithms(config.train.deterministic), process_group(device, 60 * config.train.timeout_minutes):
        with raised_on_every_rank():
            rows = {"data": _check_data(config)}
        with model_parallel_groups(config.parallel, config.train.seed), _temporary_folder(config) as folder:
            try:
                rows |= _check_training(config, device, folder)
            except torch.OutOfMemoryError as error:
                rule = "make train.micro_batch_size smaller, set train.recompute, or split the model over more GPUs"
                raise TrainingError(f"does not fit into memory: {first_line(error)}; {rule}") from error
        if dist.get_rank() == 0:
            width = max(map(len, rows))
            print("\n".join(f"{name:<{width}}  {text}" for name, text in rows.items()), flush=True)


def _check_data(config: Config) -> str:
    sources = [*config.data.train, *config.data.validation]
    if any(Path(f"{source.prefix}.{ending}").exists() for source in sources for ending in ("idx", "bin")):
        open_data(config)
        return f"{len(sources)} datasets and their tokenizer are in order; the steps below are on made-up tokens"
    if config.model.vocab_size is None:
        rule = "must be set where the data is not there: its tokenizer would say it"
        raise ConfigurationError("model.vocab_size", None, rule)
    return "not there, so not checked; the steps below are on made-up tokens"


@contextmanager
def _temporary_folder(config: Config) -> Iterator[Path]:
    """A folder that all ranks share, beside the run folder or what will hold it, for the time of the block."""
    folder: list[str | None] = [None]
    with raised_on_every_rank():
        if dist.get_rank() == 0:
            run_dir = Path(config.train.run_dir).absolute()
            place = next(parent for parent in run_dir.parents if parent.is_dir())
            check_disk_space(place, count_parameters(config.model).total or 0, config)
            try:
                folder = [tempfile.mkdtemp(prefix=".check_", dir=place)]
            except OSError as error:
                rule = f"cannot be written ({error.strerror}); set train.run_dir to a folder of yours"
                raise TrainingError(f"{place}: {rule}") from error
    dist.broadcast_object_list(folder, src=0)
    try:
        yield Path(str(folder[0]))
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(str(folder[0]), ignore_errors=True)


def _check_training(config: Config, device: torch.device, folder: Path) -> Rows:
    engine = build_engine(config, device)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = list(global_batches(MadeUpSamples(config, batches=2), config, rank, ranks))
    seconds = [_step_seconds(engine, batch) for batch in batches]
    memory = _most_over_ranks(_peak_bytes(device))
    tokens_per_s = config.train.global_batch_size * config.train.sequence_length / seconds[-1]
    kind = "allocated on the GPU" if device.type == "cuda" else "of the process"
    return {
        "parameters": _parameters(config),
        "processes": f"{dist.get_world_size()}, {ranks} replicas of the model",
        "first step": f"{seconds[0]:.2f} s",
        "second step": f"{seconds[1]:.2f} s, {tokens_per_s:,.0f} tokens/s",
        "memory": f"{memory / 2**20:,.0f} MiB {kind} at most, on the rank that needs most",
        "checkpoint": _check_checkpoint(engine, config, batches[0], folder),
    }


def _parameters(config: Config) -> str:
    count = count_parameters(config.model)
    return f"{count.total_without_embeddings:,} without embeddings, {count.total or 0:,} in all"


class MadeUpSamples:
    """Random tokens in the shape of a dataset's samples.

    Args:
        config: recipe with a known vocabulary size.
        batches: full batches that there are samples for.
    """

    def __init__(self, config: Config, batches: int) -> None:
        self.vocab_size, self.length = config.model.vocab_size or 1, config.train.sequence_length
        self.samples = batches * config.train.global_batch_size

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(self.vocab_size, (self.length + 1,), generator=torch.Generator().manual_seed(index))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.length),
            "position_ids": torch.arange(self.length),
        }


def _step_seconds(engine: Engine, batch: list[Batch]) -> float:
    started = time.perf_counter()
    result = engine.train_step(batch)  # its loss has been read from the device
    if not math.isfinite(result.lm_loss + result.grad_norm):
        raise TrainingError(f"made-up tokens: lm_loss {result.lm_loss}, gradient norm {result.grad_norm}: not finite")
    return time.perf_counter() - started


def _check_checkpoint(engine: Engine, config: Config, batch: list[Batch], folder: Path) -> str:
    """Save, wipe the weights out, load, and see that the model is the same again."""
    loss = engine.evaluate(batch)
    started = time.perf_counter()
    reports: list[SaveReport] = []
    saver = CheckpointSaver(engine, config, folder, reports.append)
    saver.start(Progress(step=2))
    saver.finish()
    checkpoint = reports[-1].folder
    saved = time.perf_counter()
    for weight in sharded_tensors(engine.sharded_weights()):
        assert weight.data is not None
        weight.data.detach().zero_()
    load_checkpoint(engine, config, checkpoint)
    loaded = time.perf_counter()
    again = engine.evaluate(batch)
    if again != loss:
        raise TrainingError(f"{checkpoint}: a loss of {loss} is {again} after saving and loading")
    return f"{reports[-1].bytes / 1e6:,.1f} MB, saved in {saved - started:.1f} s, loaded in {loaded - saved:.1f} s"


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _most_over_ranks(value: int) -> int:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return int(max(values))
