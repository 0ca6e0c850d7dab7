"""What finished runs left in the results folder, and the figures that the document takes from it."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.paper_in_small.data import KINDS
from benchmarks.paper_in_small.runner import COST, FAILURE
from benchmarks.paper_in_small.study import COPYING, EVALUATION, PlannedRun, Study, read_lines

Entry = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One run that has ended.

    Attributes:
        run: as planned.
        settings: its whole recipe; empty where it failed before the trainer wrote one.
        training: lines of its metrics with a training loss.
        evaluation: result of `evaluate`; None where it failed before.
        costs: of its processes.
        failure: how it failed; None if it did not.
        folder: where all this lies.
        copying: losses of passages that are read twice; None where they were not measured.
    """

    run: PlannedRun
    settings: Entry
    training: list[Entry]
    evaluation: Entry | None
    costs: list[Entry]
    failure: str | None
    folder: Path
    copying: Entry | None = None

    @property
    def policies(self) -> dict[str, Entry]:
        """Under each policy; the first is the model as it was trained."""
        return {} if self.evaluation is None else dict(self.evaluation["policies"])

    @cached_property
    def as_trained(self) -> Entry:
        return next(iter(self.policies.values()))

    @property
    def group(self) -> str:
        """Which runs it is compared with: the size, and the tokens that it was trained on."""
        size = self.run.model.split("_")[-1]
        return f"{size}, {self.training[-1]['tokens'] / 1e6:.3g}M tokens" if self.training else size

    @property
    def learning_rate(self) -> float:
        """The highest of the schedule."""
        return float(self.settings["optimizer"]["lr"])

    @property
    def mi_alpha(self) -> float | None:
        """Weight of the mutual-information loss, the same for all routers that have it; None where none has."""
        model = self.settings["model"]
        if model["attention_type"] == "moa":
            return float(model["mi_alpha_attention"])
        return float(model["mi_alpha_mlp"]) if self.run.family == "dsmoe" else None

    @property
    def loss_by_tokens(self) -> dict[int, float]:
        """Training loss [nats per token] after so many tokens, where it was finite."""
        return {line["tokens"]: line["lm_loss"] for line in self.training if line["lm_loss"] is not None}

    @property
    def device(self) -> str:
        """What it was made on; runs that do not say were made before a GPU could be."""
        return "cpu" if self.evaluation is None else self.evaluation.get("device", "cpu")

    @property
    def tokens_per_s(self) -> float:
        """Of training, median over its lines."""
        return statistics.median(line["tokens_per_s"] for line in self.training if "tokens_per_s" in line)

    def under(self, rule: str) -> list[Entry]:
        """Policies of one rule, by rising active share."""
        found = [policy for policy in self.policies.values() if policy["policy"]["expert_policy"] == rule]
        return sorted(found, key=lambda policy: policy["active_share"])

    def threshold(self, eps: float) -> Entry | None:
        """Under the threshold policy of one eps for all experts."""
        found = (policy for policy in self.under("threshold") if policy["policy"]["expert_threshold"] == eps)
        return next(found, None)

    def loss_at_share(self, share: float, rule: str = "threshold") -> float | None:
        """Loss [nats per token] where so much of the parameters is active, between two measured policies of a rule.

        None where no policy of the rule is as sparse.
        """
        points = [(policy["active_share"], loss(policy)) for policy in [*self.under(rule), *self.under("dense")]]
        for (low, low_loss), (high, high_loss) in pairwise(points):
            if low <= share <= high and high > low:
                return low_loss + (high_loss - low_loss) * (share - low) / (high - low)
        return None


def loss(policy: Entry, kinds: dict[str, float] | None = None) -> float:
    """Nats per token, text and code weighed as in training, or one of them."""
    weights = kinds or KINDS
    by_kind = {Path(name).name.split("_")[0]: value for name, value in policy["loss_by_data"].items()}
    return sum(weight * by_kind[kind] for kind, weight in weights.items()) / sum(weights.values())


def loss_as_trained(result: Result) -> float:
    """Of a run under the policy that its model was trained with."""
    return loss(result.as_trained)


def perplexity(policy: Entry, kinds: dict[str, float] | None = None) -> float:
    """exp of the loss."""
    return math.exp(loss(policy, kinds))


def read_results(folder: Path, study: Study) -> list[Result]:
    """The ended runs, in the order of the study."""
    return [_read(folder / run.name, run) for run in study.runs if (folder / run.name).is_dir()]


def _read(folder: Path, run: PlannedRun) -> Result:
    settings, failure = folder / "config.yaml", folder / FAILURE
    return Result(
        run,
        yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else {},
        [line for line in read_lines(folder / "metrics.jsonl") if "lm_loss" in line],
        read_json(folder / EVALUATION),
        read_lines(folder / COST),
        failure.read_text(encoding="utf-8").strip() if failure.is_file() else None,
        folder,
        read_json(folder / COPYING),
    )


def read_json(path: Path) -> Entry | None:
    """The object of a file; None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds.

    Attributes:
        values: of each seed, none of those that do not have it.
    """

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half_range(self) -> float:
        """Half the distance of smallest and largest."""
        return (max(self.values) - min(self.values)) / 2

    def text(self, form: str) -> str:
        """Mean and, of several seeds, half the range; empty without values."""
        if not self.values:
            return ""
        half = f" ± {self.half_range:{form}}" if len(self.values) > 1 else ""
        return f"{self.mean:{form}}{half}"


def spread(results: Sequence[Result], figure: Callable[[Result], float | None]) -> Spread:
    """A figure of each run that has it."""
    values = [figure(result) for result in results if result.evaluation is not None]
    return Spread([value for value in values if value is not None])


def by_entry(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The seeds of each entry of the study, in its order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.run.entry, []).append(result)
    return found


def by_group(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs that may be compared, in the order of the study."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.group, []).append(result)
    return found


def ranked(results: Sequence[Result]) -> list[Result]:
    """Group by group, and in each the entries by the mean of their losses as trained, the best one first."""

    def mean_loss(seeds: list[Result]) -> float:
        return statistics.fmean(map(loss_as_trained, seeds))

    entries = [sorted(by_entry(runs).values(), key=mean_loss) for runs in by_group(results).values()]
    return [result for of_group in entries for seeds in of_group for result in seeds]


def with_best_learning_rates(results: Sequence[Result]) -> list[Result]:
    """Without the entries that differ from a better one in their learning rate alone, judged by their first seeds."""
    best: dict[str, list[Result]] = {}
    for runs in by_entry(results).values():
        trial = str((runs[0].run.model, runs[0].group, _without_learning_rate(runs[0].run)))
        if trial not in best or loss_as_trained(runs[0]) < loss_as_trained(best[trial][0]):
            best[trial] = runs
    return [result for result in results if any(result in runs for runs in best.values())]


def _without_learning_rate(run: PlannedRun) -> dict[str, Any]:
    return {key: value for key, value in run.overrides.items() if key != "optimizer.lr"}
