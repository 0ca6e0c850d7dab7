"""What runs have left to read: metrics.jsonl, expert_use.jsonl, config.yaml, and results of `evaluate`."""

import json
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import ConfigurationError, DataError
from dsmoe_megatron.planning.parameters import count_parameters

METRICS, EXPERT_USE, RECIPE = "metrics.jsonl", "expert_use.jsonl", "config.yaml"
EVALUATIONS = "evaluation*.json"  # in a run folder

Line = dict[str, Any]


@dataclass
class Run:
    """One run, or results of `evaluate` of a model without one.

    Attributes:
        name: for legends; no two runs have the same.
        folder: of the run; None without one.
        model: architecture; None where there is no recipe.
        training: training lines in order.
        validation: validation lines in order.
        expert_use: lines of expert_use.jsonl in order.
        evaluations: results of `evaluate`, by the name of their file; each has windows of its own.
        remarks: what could not be read, a sentence each.
    """

    name: str
    folder: Path | None = None
    model: ModelConfig | None = None
    training: list[Line] = field(default_factory=list)
    validation: list[Line] = field(default_factory=list)
    expert_use: list[Line] = field(default_factory=list)
    evaluations: dict[str, Line] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int | None:
        """Without embeddings."""
        if self.model is not None:
            return count_parameters(self.model).total_without_embeddings
        counts = (evaluation["parameters_without_embeddings"] for evaluation in self.evaluations.values())
        return next(counts, None)

    def tokens_at(self, step: int) -> float:
        """Tokens that the run had seen at a step, between two lines as if each step took the same number."""
        if not self.training:
            return step
        after = bisect_left(self.training, step, key=lambda line: line["step"])
        start = self.training[after - 1] if after else {"step": 0, "tokens": 0}
        if after == len(self.training):
            return float(step * start["tokens"] / start["step"])
        end = self.training[after]
        tokens_per_step = (end["tokens"] - start["tokens"]) / (end["step"] - start["step"])
        return float(start["tokens"] + (step - start["step"]) * tokens_per_step)


def read_runs(folders: Sequence[Path], evaluations: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each of which is a run folder or holds some.

    Args:
        folders: in the order of the legend.
        evaluations: results of `evaluate` that lie elsewhere; one of a checkpoint of a run goes to it, others stand
            for themselves.

    Raises:
        DataError: a folder holds no run, a run holds no line, or a result is none.
    """
    paths = list(dict.fromkeys(path.absolute() for folder in folders for path in _run_folders(folder)))
    runs = [_read_run(path, name) for path, name in zip(paths, _short_names(paths), strict=True)]
    in_runs = {path.resolve() for folder in paths for path in folder.glob(EVALUATIONS)}
    for path in (path for path in evaluations if path.resolve() not in in_runs):
        result = _read_evaluation(path)
        checkpoint = Path(result["checkpoint"]).absolute()
        owners = [run for run in runs if run.folder and (run.folder == checkpoint or run.folder in checkpoint.parents)]
        if not owners:
            owners = [Run(_free_name(path.stem, [run.name for run in runs]))]
            runs += owners
        owners[0].evaluations[_free_name(path.stem, owners[0].evaluations)] = result
    return runs


def _run_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if (folder / METRICS).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    if not found:
        raise DataError(f"{folder}: neither it nor a folder in it has {METRICS}: it holds no run")
    return found


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _free_name(name: str, taken: Collection[str]) -> str:
    numbered = (f"{name} ({number})" for number in range(2, len(taken) + 3))
    return next(candidate for candidate in (name, *numbered) if candidate not in taken)


def _read_run(folder: Path, name: str) -> Run:
    run = Run(name, folder)
    lines = list(_read_lines(folder / METRICS, run))
    # what was not finite is null there
    run.training = [line for line in lines if line.get("lm_loss") and line.get("step") and "tokens" in line]
    run.validation = [line for line in lines if "validation_loss" in line and _has_figures(line)]
    if not run.training and not run.validation:
        raise DataError(f"{folder / METRICS}: has no whole line yet: nothing to report of this run")
    if (folder / EXPERT_USE).is_file():
        run.expert_use = [line for line in _read_lines(folder / EXPERT_USE, run) if line.get("routers")]
    if (folder / RECIPE).is_file():
        try:
            run.model = load_config(folder / RECIPE).model
        except ConfigurationError as error:
            run.remarks.append(f"{RECIPE} cannot be read, so sizes are unknown: {error}.")
    for path in sorted(folder.glob(EVALUATIONS)):
        try:
            run.evaluations[path.stem] = _read_evaluation(path)
        except DataError as error:
            run.remarks.append(f"{path.name} is left out: {error}.")
    return run


def _has_figures(validation: Line) -> bool:
    policies = validation.get("policies")
    return isinstance(policies, dict) and all(figures["perplexity"] is not None for figures in policies.values())


def _read_lines(path: Path, run: Run) -> Iterator[Line]:
    """Whole lines; the last one may have been cut short by a crash, or be being written."""
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    damaged = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            yield line
        elif text.strip():
            damaged.append(number)
    if damaged == [len(texts)]:
        run.remarks.append(f"The last line of {path.name} is cut short and left out.")
    elif damaged:
        places = ", ".join(map(str, damaged[:5])) + ("..." if len(damaged) > 5 else "")
        run.remarks.append(f"{len(damaged)} lines of {path.name} cannot be read and are left out: {places}.")


def _read_evaluation(path: Path) -> Line:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(result, dict) or not {"checkpoint", "policies", "parameters_without_embeddings"} <= set(result):
        raise DataError(f"{path}: not a result of evaluate --data ... --output FILE")
    return result
