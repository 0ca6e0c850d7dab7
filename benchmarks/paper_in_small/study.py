"""The study as it is written down in study.yaml: which runs there are, and the commands that make each of them."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from dsmoe_megatron.errors import ConfigurationError

HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
EVALUATION = "evaluation.json"  # in a run folder
COPYING = "copying.json"  # in a folder of results
FOLDER = Path("paper_in_small_run")  # corpus, data, run folders
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        entry: of the list that it is one seed of; what is compared.
        model: recipe of the architecture, a file of recipes/ without its ending.
        seed: of initial weights and data order: runs of one seed read the same samples in the same order.
        overrides: dotted keys of the recipe.
    """

    entry: str
    model: str
    seed: int
    overrides: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.entry}_seed_{self.seed}"

    @property
    def family(self) -> str:
        """dense, dsmoe, smoe or moa (attention experts alone)."""
        return self.model.split("_")[0]

    @property
    def has_plain_attention(self) -> bool:
        """DS-MoE has attention experts unless its recipe's name says gqa, others if it says moa."""
        return "gqa" in self.model if self.family == "dsmoe" else "moa" not in self.model


@dataclass(frozen=True)
class Policies:
    """What `evaluate` measures of a finished run.

    Attributes:
        max_tokens: scored of text and of code each.
        thresholds, threshold_top_k: eps of the policies of these names.
        top_k: K of the MLP experts.
    """

    max_tokens: int
    thresholds: list[float]
    top_k: list[int]
    threshold_top_k: list[float]

    def arguments(self, run: PlannedRun) -> list[Any]:
        """Options of `evaluate`; other K alone for a sparse-trained model, none for one without MLP experts."""
        options: list[Any] = ["--max-tokens", self.max_tokens]
        if run.family in ("dsmoe", "smoe"):
            options += ["--top-k", *self.top_k]
        if run.family == "dsmoe":
            options += ["--thresholds", *self.thresholds, "--threshold-top-k", *self.threshold_top_k]
        return options


@dataclass(frozen=True)
class Study:
    """All of it.

    Attributes:
        corpus: where the text is from: Debian's packages, or what lies on this machine, for a try.
        evaluation: what is measured of each run.
        runs: in the order in which they are made.
    """

    corpus: Literal["debian_packages", "this_machine"]
    evaluation: Policies
    runs: list[PlannedRun] = field(default_factory=list)

    def only(self, names: Sequence[str]) -> "Study":
        """These runs, in this order.

        Raises:
            ConfigurationError: one is not planned.
        """
        planned = {run.name: run for run in self.runs}
        for name in names:
            if name not in planned:
                raise ConfigurationError("--runs", name, f"is not one of {', '.join(planned)}")
        return replace(self, runs=[planned[name] for name in dict.fromkeys(names)])


def read_study(path: Path) -> Study:
    """The study that a file like study.yaml describes: all first seeds come before all second ones.

    Raises:
        ConfigurationError: two runs have one name, or a model has no recipe.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    runs = list(_in_rounds(content["runs"], content["overrides"]))
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise ConfigurationError("runs", run.name, f"is there twice in {path}")
        if not (RECIPES / f"{run.model}.yaml").is_file():
            raise ConfigurationError("runs.model", run.model, f"has no recipe in {RECIPES}")
    return Study(content["corpus"], Policies(**content["evaluation"]), runs)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _in_rounds(entries: list[dict[str, Any]], common: dict[str, Any]) -> Iterator[PlannedRun]:
    for number in range(max(len(entry["seeds"]) for entry in entries)):
        for entry in entries:
            if number < len(entry["seeds"]):
                overrides = common | entry.get("overrides", {})
                yield PlannedRun(entry["name"], entry["model"], entry["seeds"][number], overrides)


def training_command(run: PlannedRun, data_recipe: Path, run_dir: Path) -> list[str]:
    """Start or continue the training of a run."""
    recipes = [RECIPES / "common.yaml", RECIPES / f"{run.model}.yaml", data_recipe]
    settings = {"train.run_dir": run_dir, "train.seed": run.seed, **run.overrides}
    configs = [word for recipe in recipes for word in ("--config", recipe)]
    options = [f"--{key}={value}" for key, value in settings.items()]
    return _python("pretrain", *configs, *options)


def evaluation_command(run: PlannedRun, study: Study, data: Path, run_dir: Path) -> list[str]:
    """Measure a trained run; the result is in its folder only when it is whole."""
    prefixes = [data / "text_validation", data / "code_validation"]
    options = study.evaluation.arguments(run)
    return _python("evaluate", "--checkpoint", run_dir, "--data", *prefixes, *options, "--output", run_dir / EVALUATION)


def _python(verb: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "dsmoe_megatron", verb, *map(str, arguments)]
