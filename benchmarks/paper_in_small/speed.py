"""How fast the study's models infer: exports of DS-MoE, dense and sparse, beside the export of the dense model.

    python -m benchmarks.paper_in_small.speed [--dsmoe RUN] [--dense RUN] [--folder DIR] [--json FILE]

Prefill and decoding as in benchmarks/sparse_inference.py: float32, one process, the models take turns, ratios are taken
within a repeat. Its report, speed.json in the results folder, is shown by the document. Wants a quiet machine.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from benchmarks.measuring import paired_seconds, run_benchmark, surroundings, surroundings_line, table
from benchmarks.paper_in_small.study import FOLDER, RESULTS
from benchmarks.sparse_inference import Scenario, forward_passes
from checkpoints_tools.export_hf import export
from dsmoe_megatron.evaluation.loading import LoadedModel, load_model
from dsmoe_megatron.inference.policy import ExpertPolicy, policy_name

FILE = "speed.json"
SCENARIOS = (Scenario(1, 32, True), Scenario(8, 32, True), Scenario(1, 256, False), Scenario(8, 256, False))
POLICIES = (
    ExpertPolicy(),
    ExpertPolicy("threshold", expert_threshold=0.48),
    ExpertPolicy("threshold", expert_threshold=1.0),
    ExpertPolicy("topk", num_experts_per_tok=4),
)


@torch.inference_mode()
def measure(arguments: Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"surroundings": surroundings(torch.device("cpu")), "rows": []}
    with tempfile.TemporaryDirectory() as scratch:
        dense, dsmoe = (
            exported(arguments.folder / "runs" / run, Path(scratch) / run) for run in (arguments.dense, arguments.dsmoe)
        )
        for scenario in SCENARIOS:
            runs: dict[str, Callable[[], object]] = {arguments.dense: forward_passes(dense.model, scenario)}
            runs |= {policy_name(policy): under(dsmoe, policy, scenario) for policy in POLICIES}
            seconds = paired_seconds(runs, arguments.repeats, torch.device("cpu"))
            tokens = scenario.batch * scenario.tokens
            for name, own in seconds.items():
                ratios = [base.wall / run.wall for base, run in zip(seconds[arguments.dense], own, strict=True)]
                report["rows"].append(
                    {
                        "scenario": scenario.name if scenario.decode else f"{scenario.name}, batch {scenario.batch}",
                        "model": arguments.dense if name == arguments.dense else f"{arguments.dsmoe}, {name}",
                        "tokens_per_s": tokens / statistics.median(run.wall for run in own),
                        "over_dense_model": statistics.median(ratios),
                    }
                )
    return report


def exported(run_dir: Path, folder: Path) -> LoadedModel:
    """The export of a run, loaded."""
    export(run_dir, folder)
    return load_model(folder)


def under(loaded: LoadedModel, policy: ExpertPolicy, scenario: Scenario) -> Callable[[], object]:
    """The work of a scenario under a policy."""
    passes = forward_passes(loaded.model, scenario)

    def run() -> object:
        loaded.set_policy(policy)
        return passes()

    return run


def as_markdown(report: dict[str, Any]) -> str:
    return "\n".join([surroundings_line(report["surroundings"]), "", *speed_table(report)])


def speed_table(report: dict[str, Any]) -> list[str]:
    """A row per scenario and contestant."""
    rows = [
        [row["scenario"], row["model"], f"{row['tokens_per_s']:,.0f}", f"{row['over_dense_model']:.2f}"]
        for row in report["rows"]
    ]
    return table(["", "Model", "Tokens/s", "Over the dense model"], rows)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m benchmarks.paper_in_small.speed", description="Speed of the study's models")
    parser.add_argument("--dsmoe", type=str, default="dsmoe_12m_alpha_3e-3_seed_1", metavar="RUN", help="DS-MoE run")
    parser.add_argument("--dense", type=str, default="dense_12m_lr_2e-3_seed_1", metavar="RUN", help="dense run")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="of the study")
    parser.add_argument("--repeats", type=PositiveInt, default=9, help="runs of each contestant")
    parser.add_argument("--json", type=Path, default=RESULTS / FILE, metavar="FILE", help="report to write")
    return parser


if __name__ == "__main__":
    run_benchmark(build_parser(), measure, as_markdown)
