"""The verb `doctor`."""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.doctor.choices import Choice, choices, reasons_against
from dsmoe_megatron.doctor.environment import Environment, inspect_environment

UNRELATED_APEX = (
    "apex: the package installed under this name is not NVIDIA's but an unrelated one of PyPI; "
    "pip uninstall apex, and install NVIDIA's from its repository"
)
TORCHRUN_DOES_NOT_WAIT = (
    "torchrun: this one does not know --shutdown-timeout and --signals-to-handle: at SIGTERM it kills ranks that "
    "have not saved after 30 s, and SIGUSR1 ends it at once; torch 2.13 knows both"
)


@dataclass(frozen=True)
class Finding:
    """What is to be said of one recipe.

    Attributes:
        recipe: its name.
        uses: what it is computed with.
        reasons: why it cannot run here; empty where it can.
    """

    recipe: str
    uses: list[Choice]
    reasons: list[str]


def build_parser(program: str = "dsmoe-megatron doctor") -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="What this machine and environment have, and what recipes would use of it. "
        "Ends with 1 where a recipe cannot run here.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, nargs="+", default=[], metavar="RECIPE", help="recipes; default: one of the defaults"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def doctor(arguments: Sequence[str], program: str = "dsmoe-megatron doctor") -> int:
    """Run the verb; prints what it finds.

    Returns:
        The exit code: 1 where a recipe cannot run here.

    Raises:
        ConfigurationError: a recipe cannot be read.
    """
    options = build_parser(program).parse_args(list(arguments))
    recipes = {str(path): load_config(path) for path in options.config} or {"default recipe": Config()}
    environment = inspect_environment()
    findings = [examine(environment, name, config) for name, config in recipes.items()]
    if options.json:
        report = {
            "environment": asdict(environment),
            "warnings": warnings(environment),
            "recipes": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        print(as_text(environment, findings))
    return int(any(finding.reasons for finding in findings))


def examine(environment: Environment, name: str, config: Config) -> Finding:
    """What one recipe would use, and why it cannot run."""
    return Finding(name, choices(environment, config), reasons_against(environment, config))


def warnings(environment: Environment) -> list[str]:
    found = {UNRELATED_APEX: environment.apex == "unrelated", TORCHRUN_DOES_NOT_WAIT: not environment.torchrun_waits}
    return [warning for warning, holds in found.items() if holds]


def as_text(environment: Environment, findings: Sequence[Finding]) -> str:
    """The report for a terminal; recipes that use the same are told together."""
    lines = [*_machine(environment), *(f"warning: {warning}" for warning in warnings(environment))]
    for _, alike in itertools.groupby(sorted(findings, key=_uses), key=_uses):
        group = list(alike)
        lines += ["", *_choices(group[0].uses)]
        for finding in group:
            verdict = "; ".join(finding.reasons)
            lines.append(f"{finding.recipe}: {f'cannot run here: {verdict}' if verdict else 'can run here'}")
    return "\n".join(lines)


def _uses(finding: Finding) -> str:
    return str(finding.uses)


def _choices(found: Sequence[Choice]) -> list[str]:
    lines = []
    for choice in found:
        lines.append(f"{choice.part:<24} {choice.implementation}")
        if choice.better:
            lines.append(f"{'':<24} faster: {choice.better}: {choice.install}")
    return lines


def _machine(environment: Environment) -> list[str]:
    memory = "unknown memory" if environment.memory is None else f"{environment.memory / 1e9:,.0f} GB"
    devices = ", ".join(environment.devices) or "none that torch sees"
    apex = {"none": "-", "unrelated": "another package of that name", "nvidia": "NVIDIA's"}[environment.apex]
    if environment.apex == "nvidia":
        apex += f", with {', '.join(environment.apex_extensions) or 'no extension built'}"
    deepspeed = environment.libraries["deepspeed"] or "-"
    if environment.libraries["deepspeed"]:
        deepspeed += f", built: {', '.join(environment.deepspeed_operators) or 'nothing (at first use)'}"
    rows = {
        "machine": f"{environment.cores} cores, {memory}",
        "GPUs": devices,
        "Python": environment.python,
        "torch": ", ".join([environment.torch or "-", f"CUDA {environment.cuda or '-'}", *environment.backends]),
        **{name: version or "-" for name, version in environment.libraries.items() if name != "deepspeed"},
        "DeepSpeed": deepspeed,
        "apex": apex,
    }
    return [f"{name:<24} {value}" for name, value in rows.items()]
