"""A whole training run as a job for the worker pool: data from disk, loop, checkpoints, metrics."""

import contextlib
import io
import json
import os
import shutil
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config, DataConfig, DatasetSource, EvaluationConfig, PolicyConfig
from dsmoe_megatron.runtime.processes import StopSignals
from tests.damaged_steps import damage_steps
from tests.training_jobs import tiny_config

TRAIN_MODULES = ("argparse.py", "ast.py", "calendar.py", "copy.py", "csv.py", "datetime.py", "difflib.py", "dis.py")
VALIDATION_MODULES = ("fractions.py", "ftplib.py", "functools.py", "gettext.py")
# figures of metrics.jsonl that depend on the clock
CLOCK = {
    *("step_time_s", "tokens_per_s", "model_tflops_per_s_per_device", "mfu", "time_left_s"),
    *("rank_time_median_s", "rank_time_max_s", "slowest_rank"),
}


@dataclass(frozen=True)
class SmallData:
    """Real code of the standard library, ready to train on.

    Attributes:
        tokenizer: SPEC of a sentencepiece model of 500 tokens, a number that needs padding.
        train: dataset prefix.
        validation: dataset prefix, of other files.
    """

    tokenizer: str
    train: str
    validation: str


def make_small_data(folder: Path) -> SmallData:
    """Tokenizer and datasets of modules of the standard library, unless they are there."""
    from data_tools.preprocess import preprocess
    from data_tools.train_tokenizer import train_tokenizer

    library = Path(sysconfig.get_paths()["stdlib"])
    data = SmallData(str(folder / "tokenizer.model"), str(folder / "train_set"), str(folder / "validation_set"))
    if Path(f"{data.validation}.manifest.json").exists():
        return data
    for name, modules in (("train", TRAIN_MODULES), ("validation", VALIDATION_MODULES)):
        (folder / name).mkdir(parents=True)
        for module in modules:
            shutil.copy(library / module, folder / name / module)
    train_tokenizer([str(folder / "train")], str(folder / "tokenizer"), vocab_size=500)
    preprocess([str(folder / "train")], data.train, data.tokenizer)
    preprocess([str(folder / "validation")], data.validation, data.tokenizer)
    return data


def run_config(small_data: SmallData, run_dir: Path, /, **sections: dict[str, Any]) -> Config:
    """The tiny model on the small data; `sections` change single values (`train={"steps": 4}`)."""
    config = tiny_config({"vocab_size": None, **sections.pop("model", {})}, sections.pop("parallel", {}))
    config.data = DataConfig(
        # two datasets, so that blending is exercised
        train=[DatasetSource(small_data.train, 0.7), DatasetSource(small_data.validation, 0.3)],
        validation=[DatasetSource(small_data.validation)],
        tokenizer=small_data.tokenizer,
    )
    policies = [PolicyConfig("topk", num_experts_per_tok=2), PolicyConfig("threshold", expert_threshold=1.0)]
    config.evaluation = EvaluationConfig(interval=0, batches=2, policies=policies)
    config.train.run_dir = str(run_dir)
    config.train.steps = 6
    config.logging.interval = 1
    config.checkpoint.interval = 3
    for section, values in sections.items():
        for key, value in values.items():
            setattr(getattr(config, section), key, value)
    return config


def pretrain_job(
    config: Config, stop_signals: StopSignals | None = None, prepare: Callable[[Any], object] = lambda _: None
) -> str:
    """Train; returns what the run printed on this rank.

    Args:
        config: of the run.
        stop_signals: end it early.
        prepare: called with the TrainingRun before it trains.
    """
    import torch

    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.loop import TrainingRun, open_data

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        tokenizer = open_data(config)
        run_dir = Path(config.train.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        with model_parallel_groups(config.parallel, config.train.seed):
            run = TrainingRun(config, torch.device("cpu"), tokenizer, run_dir, stop_signals or StopSignals())
            prepare(run)
            run.train()
    return printed.getvalue()


def stopped_job(config: Config, rank: int, number: int, after_step: int, times: int) -> str:
    """Train; when the metrics show a step, one rank sends itself the signal, and again until the end."""
    import torch.distributed as dist

    def send() -> None:
        metrics = Path(config.train.run_dir) / "metrics.jsonl"
        while after_step and not (metrics.is_file() and f'"step": {after_step},' in metrics.read_text()):
            time.sleep(0.001)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    stop_signals = StopSignals()
    stop_signals.listen()
    if dist.get_rank() == rank:
        threading.Thread(target=send, daemon=True).start()
    return pretrain_job(config, stop_signals)


def damaged_job(config: Config, damages: dict[int, str]) -> str:
    """Train with the gradients or losses of some steps damaged; see tests/damaged_steps.py."""
    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    damage_steps(MegatronEngine, damages)
    return pretrain_job(config)


def refused_damaged_job(config: Config, damages: dict[int, str]) -> str:
    return _refusal(damaged_job, config, damages)


def refused_job(config: Config) -> str:
    return _refusal(pretrain_job, config)


def _refusal(job: Callable[..., str], *arguments: Any) -> str:
    """Try to train; returns the error that this rank raised, as `Name: message`.

    Raises:
        AssertionError: the run was not refused.
    """
    from dsmoe_megatron.errors import DSMoEError

    try:
        job(*arguments)
    except DSMoEError as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("the run was not refused")


def read_lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text(encoding="utf-8").splitlines()]


def training_lines(run_dir: Path) -> dict[int, dict[str, Any]]:
    """step -> its line, without the figures that depend on the clock."""
    lines = [line for line in read_lines(run_dir) if "lm_loss" in line]
    return {line["step"]: {key: value for key, value in line.items() if key not in CLOCK} for line in lines}
