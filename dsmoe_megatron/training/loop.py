"""The training run, from a recipe to its last checkpoint."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from dsmoe_megatron.batch_ramp import batch_size_after, batch_sizes
from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import save_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import ConfigurationError, DSMoEError, TrainingError
from dsmoe_megatron.json_text import finite
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.run_folder import Progress
from dsmoe_megatron.runtime.distributed import (
    deterministic_algorithms,
    largest_of_ranks,
    model_parallel_groups,
    process_group,
    raised_on_every_rank,
    said_in_one_line,
    seed_dropout,
)
from dsmoe_megatron.runtime.processes import StopSignals
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer
from dsmoe_megatron.training.beginning import begin
from dsmoe_megatron.training.checkpoint import check_disk_space
from dsmoe_megatron.training.data import check_datasets, global_batches, training_batches
from dsmoe_megatron.training.engines.choice import build_engine
from dsmoe_megatron.training.engines.protocol import Batch, StepResult
from dsmoe_megatron.training.expert_use import expert_use, mutual_information_losses
from dsmoe_megatron.training.guards import Guards, Verdict
from dsmoe_megatron.training.hang_watch import HangWatch, grace_seconds
from dsmoe_megatron.training.metrics import MetricsWriter, progress_line, validation_line
from dsmoe_megatron.training.profiling import StepProfiler
from dsmoe_megatron.training.run_lock import one_job_in
from dsmoe_megatron.training.saving import CheckpointSaver, SaveReport
from dsmoe_megatron.training.stragglers import Stragglers
from dsmoe_megatron.training.throughput import Throughput
from dsmoe_megatron.training.validation import validate


def pretrain(config: Config, device: torch.device) -> None:
    """Train until train.steps, from the newest checkpoint of the run folder if there is one.

    Args:
        config: recipe that check_config accepted.
        device: that prepare_device chose.

    Raises:
        DSMoEError: one of the named errors, on every rank.
    """
    stop_signals = StopSignals()
    stop_signals.listen()
    limit_s = 60 * config.train.timeout_minutes
    with (
        said_in_one_line(),
        deterministic_algorithms(config.train.deterministic),
        # a collective that waits as long as it may outlasts the hang watch, which says more
        process_group(device, limit_s + 3 * grace_seconds(limit_s)),
    ):
        run_dir = Path(config.train.run_dir)
        with raised_on_every_rank():
            tokenizer = open_data(config)
            _make_run_dir(run_dir, config)
        watch = HangWatch(run_dir, limit_s, dist.get_rank(), dist.get_world_size())
        with (
            one_job_in(run_dir),
            watch.watching(),
            model_parallel_groups(config.parallel, config.train.seed),
        ):
            run = TrainingRun(config, device, tokenizer, run_dir, stop_signals, watch.beat)
            run.train()
            stop_signals.ignore()


def open_data(config: Config, world_size: int | None = None) -> Tokenizer:
    """Load the tokenizer, check the datasets against it, and settle the vocabulary size in `config`.

    Args:
        config: recipe.
        world_size: processes that it is to run on; None takes those of the process group.
    """
    if not config.data.train:
        raise ConfigurationError("data.train", [], "has no dataset: give a list of {prefix, weight}")
    if config.data.tokenizer is None:
        raise ConfigurationError("data.tokenizer", None, "must name the tokenizer that the data was made with")
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size not in (None, tokenizer.vocab_size):
        rule = f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens: set that, or null"
        raise ConfigurationError("model.vocab_size", config.model.vocab_size, rule)
    config.model.vocab_size = tokenizer.vocab_size
    check_config(config, world_size or dist.get_world_size())
    check_datasets([*config.data.train, *config.data.validation], tokenizer, config.data.separate_documents)
    return tokenizer


def _make_run_dir(run_dir: Path, config: Config) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"{run_dir}: cannot be made ({error.strerror}); set train.run_dir to a folder of yours"
        ) from error
    check_disk_space(run_dir, count_parameters(config.model).total or 0, config)


class TrainingRun:
    """Everything that a run holds: engine, data, progress, metrics.

    Args:
        config: checked recipe with a known vocabulary size.
        device: of this rank.
        tokenizer: of the data.
        run_dir: exists.
        stop_signals: end the run early when one has come.
        beat: is called with what was done whenever the run has got on.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        tokenizer: Tokenizer,
        run_dir: Path,
        stop_signals: StopSignals,
        beat: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config, self.run_dir, self.stop_signals, self.beat = config, run_dir, stop_signals, beat
        self.engine = build_engine(config, device)
        self.rank = parallel_state.get_data_parallel_rank()
        self.ranks = parallel_state.get_data_parallel_world_size()
        beginning = begin(self.engine, config, tokenizer, run_dir, self._say)
        self.progress = beginning.progress
        self.train_data, self.validation_data = beginning.train_data, beginning.validation_data
        self.saver = CheckpointSaver(self.engine, config, run_dir, self._report_save)
        self.metrics: MetricsWriter | None = None
        if dist.get_rank() == 0:
            save_config(config, run_dir / "config.yaml")
            self.metrics = MetricsWriter(run_dir, config, self.progress.step, self._say)
            if beginning.faults:
                self.metrics.event({"step": self.progress.step, "damaged_checkpoints": beginning.faults})
            self._say(_introduction(config, self.progress))
        self.validation_batches: list[list[Batch]] = []
        self.guards = Guards(config.train, self.progress.guards)
        self.stop_signal = 0
        self.profiler = StepProfiler(config.logging.profile, run_dir / "profile", device, dist.get_rank())
        self.stragglers = Stragglers(device, parallel_state.get_pipeline_model_parallel_rank(), self._say)
        self.engine.gradients_ready = self.stragglers.gradients_ready

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    def train(self) -> None:
        """Take the steps that are left; validate, log and save on the way and at the end.

        A stop signal ends it after the step that is under way, with a checkpoint and without validation.
        """
        config, progress = self.config, self.progress
        if progress.step >= config.train.steps:
            self._say(
                f"{self.run_dir} already has {progress.step} of train.steps = {config.train.steps} steps: nothing to do"
            )
            return
        self._agree()
        if self._stops():
            return
        if progress.step and self._is_due(config.evaluation.interval, False) and not self._is_validated():
            self._validate()
        try:
            self._take_steps()
            self.saver.finish()
        except DSMoEError as error:
            if error.on_every_rank:  # a checkpoint that is being written is as good as it was
                self.saver.complete()
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def _take_steps(self) -> None:
        config, progress = self.config, self.progress
        batches = training_batches(
            self.train_data, config, self.rank, self.ranks, progress.consumed_samples, progress.data_begin
        )
        throughput = Throughput(config, self.engine.device, dist.get_world_size())
        self.stragglers.step_begins()
        for micro_batches in batches:
            batch_size = batch_size_after(config.train, progress.consumed_samples)
            result = self._step(micro_batches, batch_size)
            throughput.step_done(batch_size)
            self.beat(f"step {progress.step}")
            last = progress.step == config.train.steps
            if self._is_logged(progress.step):
                figures = {**throughput.figures(progress), **self.stragglers.figures()}
                self._log(result, {"batch_size": batch_size, **figures})
            if self.guards.stop:
                self._give_up()
            stops = self._stops()
            # what a stopped run leaves out, the next start makes up for
            if last or (self._is_due(config.evaluation.interval, last) and not stops):
                with throughput.aside("validation"):
                    self._validate()
                if not stops:
                    self._agree()
                    stops = self._stops()
            self.saver.poll()
            if self._is_due(config.checkpoint.interval, last or stops):
                with throughput.aside("save"):
                    self.saver.start(progress)
            throughput.go_on()
            self.stragglers.step_begins()
            if last or stops:
                break
        self.profiler.close()

    def _report_save(self, report: SaveReport) -> None:
        self.beat(f"the save of step {report.step}")
        if dist.get_rank() == 0:
            print(report, file=sys.stdout if report.failure is None else sys.stderr, flush=True)
        if self.metrics is not None:
            self.metrics.save(report.line())

    def _stops(self) -> bool:
        """Whether a stop signal has come, to whichever rank, by the time that all last agreed on it."""
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self._say(f"{name}: stops after step {self.progress.step}; the same command goes on from there")
        return bool(self.stop_signal)

    def _agree(self, verdict: Verdict = Verdict.APPLIED) -> Verdict:
        """The worst verdict of all ranks; they learn of each other's stop signals on the way."""
        worst, self.stop_signal = largest_of_ranks(verdict, self.stop_signals.received)
        return Verdict(worst)

    def _is_validated(self) -> bool:
        line = self.progress.last_validation
        return line is not None and line["step"] == self.progress.step

    def _is_logged(self, step: int) -> bool:
        first = self.progress.first is None
        return first or step % self.config.logging.interval == 0 or step == self.config.train.steps

    def _is_due(self, interval: int, last: bool) -> bool:
        return last or (interval > 0 and self.progress.step % interval == 0)

    def _step(self, micro_batches: list[Batch], batch_size: int) -> StepResult:
        config, progress = self.config, self.progress
        if config.model.hidden_dropout or config.model.attention_dropout:
            seed_dropout(config.train.seed, progress.step)
        self._prepare_statistics()
        verdicts: list[Verdict] = []

        def accepts(lm_loss: float, grad_norm: float) -> bool:
            self.saver.before_update()
            verdicts.append(self._agree(self.guards.judge(lm_loss, grad_norm)))
            return verdicts[-1] is Verdict.APPLIED

        self.profiler.before(progress.step + 1)
        result = self.engine.train_step(micro_batches, accepts)
        samples = range(progress.data_position, progress.data_position + batch_size)
        progress.step += 1
        self.profiler.after(progress.step)
        progress.consumed_samples += batch_size
        progress.tokens += batch_size * config.train.sequence_length
        self.guards.remember(verdicts[0], progress.step, samples, result.lm_loss, result.grad_norm)
        if not result.applied:
            self._say(
                f"step {progress.step}: update left out, {self.guards.in_a_row} in a row: {verdicts[0].reason}: "
                f"lm_loss {result.lm_loss}, gradient norm {result.grad_norm}"
            )
        return result

    def _give_up(self) -> NoReturn:
        """Stop on bad steps in a row, leaving what there is to see beside the run's own checkpoints."""
        folder = self.run_dir / "post_mortem"
        self.saver.complete()
        saver = CheckpointSaver(self.engine, self.config, folder, self._report_save)
        saver.start(self.progress)
        saver.complete()
        last, count = self.progress.step, self.guards.in_a_row
        with raised_on_every_rank():
            if dist.get_rank() == 0:
                self.guards.write_batches(folder / "batches.json", self.train_data)
            raise TrainingError(
                f"steps {last - count + 1} to {last}: {count} updates in a row were left out "
                f"(train.stop_after_skipped), the last one: {self.guards.last_reason}; {folder} has a "
                "checkpoint and, in batches.json, the samples of these steps: look at them, or lower optimizer.lr"
            )
        raise AssertionError("unreachable: every rank has raised")

    def _prepare_statistics(self) -> None:
        """Expert use is counted in the steps that are logged."""
        counted = self.config.logging.expert_use and self._is_logged(self.progress.step + 1)
        thresholds = {"mlp": self.config.model.expert_threshold}
        own = self.config.model.attention_expert_threshold
        thresholds["attention"] = thresholds["mlp"] if own is None else own
        for router in self.engine.routers:
            router.control.statistics.reset()
            router.control.threshold = thresholds[router.options.kind] if counted else None

    def _log(self, result: StepResult, figures: dict[str, float | None]) -> None:
        config, progress = self.config, self.progress
        mi_losses = mutual_information_losses(self.engine.routers, config)
        line = {
            "step": progress.step,
            "tokens": progress.tokens,
            "lm_loss": finite(result.lm_loss),
            "mi_loss_attention": _mean_of_kind(mi_losses, "attention"),
            "mi_loss_mlp": _mean_of_kind(mi_losses, "mlp"),
            "grad_norm": finite(result.grad_norm),
            "skipped_updates": self.guards.skipped,
            "learning_rate": result.learning_rate,
            **figures,
        }
        if result.applied:
            progress.first = progress.first or line
            progress.last = line
        use = expert_use(self.engine.routers, config) if config.logging.expert_use else []
        if self.metrics is not None:
            self.metrics.training(line)
            if use:
                self.metrics.expert_use(progress.step, use)
        self._say(progress_line(line, config.train.steps))

    def _validate(self) -> None:
        if self.validation_data is None:
            return
        if not self.validation_batches:
            batches = global_batches(self.validation_data, self.config, self.rank, self.ranks)
            self.validation_batches = [next(batches) for _ in range(self.config.evaluation.batches)]
        line: dict[str, Any] = {"step": self.progress.step}
        name = f"a batch of the validation at step {self.progress.step}"
        line |= validate(self.engine, self.validation_batches, self.config, lambda: self.beat(name))
        self.progress.last_validation = line
        if self.metrics is not None:
            self.metrics.validation(line)
        self._say(validation_line(line))


def _mean_of_kind(losses: dict[tuple[int, str], float], kind: str) -> float | None:
    values = [loss for (_, router_kind), loss in losses.items() if router_kind == kind]
    return sum(values) / len(values) if values else None


def _introduction(config: Config, progress: Progress) -> str:
    count, parallel = count_parameters(config.model), config.parallel
    return (
        f"{count.total_without_embeddings:,} parameters without embeddings, {count.total or 0:,} in all | "
        f"{dist.get_world_size()} processes: tensor {parallel.tensor}, pipeline {parallel.pipeline}, "
        f"expert {parallel.expert}, context {parallel.context}, "
        f"data {parallel_state.get_data_parallel_world_size()} | "
        f"steps {progress.step + 1} to {config.train.steps} of {'up to ' if len(batch_sizes(config.train)) > 1 else ''}"
        f"{config.train.global_batch_size * config.train.sequence_length:,} tokens | {config.train.run_dir}"
    )
