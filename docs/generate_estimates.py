"""Print docs/estimate.md from the recipes, the paper's figures and the planner.

python docs/generate_estimates.py > docs/estimate.md
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsmoe_megatron.config import Config, ParallelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.planning.estimate import Estimate, estimate
from dsmoe_megatron.planning.flops import training_flops
from dsmoe_megatron.planning.hardware import load_hardware
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.planning.presentation import layout_words
from dsmoe_megatron.planning.search import search

RECIPES = Path(__file__).resolve().parent.parent / "launchers" / "recipes"
GIB = 2**30


@dataclass(frozen=True)
class PaperModel:
    """One row of arXiv 2404.05567.

    Attributes:
        name: the paper's.
        recipe: its recipe here.
        millions: parameters without embeddings, Table 1.
        gpus: H100s, section 4.1.
        hours: of training, section 4.1; None where it does not say.
    """

    name: str
    recipe: str
    millions: int
    gpus: int
    hours: int | None = None


PAPER = (
    PaperModel("DS-MoE-1B", "dsmoe_1b", 1067, 8, 24),
    PaperModel("DS-MoE-3B", "dsmoe_3b", 2846, 32, 64),
    PaperModel("DS-MoE-6B", "dsmoe_6b", 6343, 32, 124),
    PaperModel("Dense-1B", "dense_1b", 1017, 8),
    PaperModel("Dense-3B", "dense_3b", 2705, 32),
    PaperModel("Dense-6B", "dense_6b", 6186, 32),
    PaperModel("SMoE-1B", "smoe_1b", 1042, 8),
    PaperModel("SMoE-1.5B", "smoe_1_5b", 1445, 8),
    PaperModel("SMoE-5B", "smoe_5b", 4911, 32),
)
WITHIN = 0.005

INTRODUCTION = """\
# What a run costs, beforehand

<!-- Written by docs/generate_estimates.py. Change it or dsmoe_megatron/planning/, then run
python docs/generate_estimates.py > docs/estimate.md -->

```bash
python -m dsmoe_megatron estimate --config launchers/recipes/dsmoe_6b.yaml --gpus 32 --gpu h100
python -m dsmoe_megatron estimate --config launchers/recipes/dsmoe_6b.yaml --gpus 32 --gpu h100 --search
python -m dsmoe_megatron estimate --config launchers/recipes/dsmoe_6b.yaml --gpus 32 \\
  --parallel.tensor 1 --parallel.sequence false --parallel.pipeline 4 --train.micro_batch_size 4 --picture memory.svg
```

From a recipe and a number of GPUs, without torch and in a second: parameters, FLOPs per token, memory and traffic of
a rank of each pipeline stage, time per step, utilisation, GPU-hours. `--search` tries layouts instead (every TP, PP
of equal stages, EP, CP, recompute mode and micro-batch of a power of two that the GPUs allow), prints the `--top` ones
and says why the others lose. `--json` prints everything as JSON, `parameters.total_without_embeddings` in it;
`--picture` draws the memory per rank. Recipe keys can be given as well. `--gpu` names a row of
[hardware.yaml](../dsmoe_megatron/planning/hardware.yaml) (`h100`, `h200`, `a100`, `cpu`), and `--hardware FILE` adds
rows of your own. Without `--gpus` it is `WORLD_SIZE`, else the fewest that the layout can run on. Where the recipe
leaves the vocabulary to the tokenizer, give `--model.vocab_size`; without it only parameters are estimated.

![Memory per rank of DS-MoE-6B on 32 GPUs in 4 pipeline stages, micro-batch 4](images/estimate.svg)

## What is counted and what is assumed
"""
CHECKED = ("Part", "How it is known", "Held against")
CHECKS = (
    (
        "parameters, in all and per rank",
        "counted",
        "the paper's totals (below); built models (`tests/planning/test_ranks.py`), of up to 1024 ranks "
        "([table](estimate_against_reality.md))",
    ),
    (
        "FLOPs per token",
        "counted: matrix products, causal half of the scores",
        "torch's `FlopCounterMode` on a training step: equal for five models and three recompute modes "
        "(`tests/planning/test_flops.py`)",
    ),
    (
        "memory per rank",
        "derived tensor by tensor",
        "live bytes of training steps on a CPU: within 7 % ([table](estimate_against_reality.md)); on an H100 the "
        "allocator's peak of DS-MoE-1B and Dense-1B: within 0.3 %",
    ),
    (
        "traffic per rank",
        "counted, collective by collective",
        "the collectives of training steps on gloo, for seventeen layouts: equal but for padded gradient buffers, "
        "below 1 % (`tests/planning/test_traffic.py`)",
    ),
    ("peaks, memory, bandwidths", "datasheets, named in the table", ""),
    (
        "time per step",
        "**assumed** shares of these peaks, named in the table and in every estimate",
        "the paper's GPU-hours (below), a few steps on a CPU, and steps of two models on one H100",
    ),
)
LIMITS = """
So whether a recipe fits, and what it sends, is worth more than how long it takes, and times serve to compare layouts.
Left out of the time: overlap of communication inside layers with computation (megatron-core hides part of it behind
weight gradients), kernels that fuse elementwise work, data loading, checkpoints and validation.

On one H100 a step of Dense-1B over 32,768 tokens took 0.626 s where 0.593 s are estimated, one of DS-MoE-1B 1.088 s
where it is 0.765 s ([benchmarks.md](benchmarks.md#training-steps-on-one-h100)): matrix products, attention and routers
take what is estimated within 5 %, elementwise work 1.6 to 1.8 times that, and DS-MoE's smaller operations keep the
device waiting for the host. How long the host takes to start a layer was corrected after it, from an assumed 1.5 ms to
6 ms; the rest stands as it was assumed.

On the machine of the `cpu` row, which was busy with other work, one process took (median of 4 steps; 4 layers, 16
experts, float32) 2.01 s for 1024 tokens at width 512, 2.66 s with full recompute, 0.95 s for 1024 tokens at width 256;
estimated are 2.07, 2.63 and 0.90 s. Two processes on its two busy cores took 1.3 to 1.6 times the estimate.
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [INTRODUCTION, _table(CHECKED, CHECKS) + LIMITS, _parameters(), _hours(), _recipes(), _best_layouts()]
    )


def _recipe(name: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml")


def _estimate(config: Config, gpus: int) -> Estimate:
    return estimate(config, gpus, load_hardware("h100"))


def _parameters() -> str:
    rows = []
    for paper in PAPER:
        # the paper's totals fit this router in all of its models; megatron-core's own, of the smoe recipes, is linear
        model = replace(_recipe(paper.recipe).model, router_type="mlp", router_hidden_size=512)
        ours = count_parameters(model).total_without_embeddings / 1e6
        difference = ours / paper.millions - 1
        remark = "" if abs(difference) <= WITHIN else "unexplained"
        rows.append([paper.name, f"{paper.millions}M", f"{ours:,.0f}M", f"{difference:+.1%}", remark])
    return (
        "## Parameters of the paper's models\n\n"
        "Without embeddings, Table 1 of [arXiv 2404.05567](https://arxiv.org/abs/2404.05567). The paper does not\n"
        "state the shape of its routers; counted here is an MLP of width 512, which fits seven of nine totals within\n"
        "0.5 %. The recipes of the SMoE models have megatron-core's linear router: 1,020M, 1,423M and 4,824M.\n\n"
        + _table(["Model", "Paper", "Counted", "Difference", ""], rows)
        + "\nDS-MoE-3B is 2793M in the paper's Table 5.\n"
    )


def _hours() -> str:
    """The paper's GPU-hours, their utilisation, and the prediction for the layout nearest to the paper's."""
    rows = []
    for paper in PAPER:
        if paper.hours is None:
            continue
        config = _recipe(paper.recipe)
        tokens = config.train.steps * config.train.global_batch_size * config.train.sequence_length
        spent = paper.gpus * paper.hours
        flops = training_flops(config).model * tokens
        implied = flops / (spent * 3600 * load_hardware("h100").peak("bf16"))
        as_paper = replace(config, parallel=ParallelConfig(overlap=True), train=replace(config.train, recompute="full"))
        alike, own = _estimate(as_paper, paper.gpus).time, _estimate(config, paper.gpus).time
        rows.append(
            [
                paper.name,
                f"{flops:.3g}",
                f"{spent}",
                f"{implied:.1%}",
                f"{alike.gpu_hours:,.0f} ({alike.gpu_hours / spent - 1:+.0%})",
                f"{alike.model_flops_utilisation:.1%}",
                f"{alike.routers / alike.total:.0%}",
                f"{own.gpu_hours:,.0f}",
                f"{own.model_flops_utilisation:.1%}",
            ]
        )
    return (
        "## The paper's GPU-hours\n\n"
        "The paper trained with FSDP and activation checkpointing; nearest to that here are data parallelism with the\n"
        "optimizer sharded, `train.recompute: full` and `parallel.overlap: true`. Utilisation (MFU) is of 989.4\n"
        "TFLOP/s, without what is computed twice. The efficiencies were not fitted to these hours.\n\n"
        + _table(
            [
                "Model",
                "FLOPs of the run",
                "H100-hours, paper",
                "MFU that they imply",
                "H100-hours, predicted for that set-up",
                "MFU",
                "of it routers",
                "H100-hours, predicted for the recipe's layout",
                "MFU",
            ],
            rows,
        )
        + "\nRouters compute in float32, whose peak on an H100 is a fifteenth of that of bf16: a twentieth of the\n"
        "operations or less is predicted to take the share of the time that the table shows.\n"
    )


def _recipes() -> str:
    rows = []
    for paper in PAPER:
        found = _estimate(_recipe(paper.recipe), paper.gpus)
        rows.append(
            [
                f"`{paper.recipe}`",
                f"{paper.gpus}",
                layout_words(found.config.parallel, paper.gpus),
                f"{found.config.train.micro_batch_size}",
                f"{found.flops.model / 1e9:.1f}",
                f"{found.peak_memory / GIB:.1f}",
                f"{found.time.total:.2f}",
                f"{found.time.model_flops_utilisation:.0%}",
                f"{found.time.days:.1f}",
            ]
        )
    header = ["Recipe", "H100s", "Layout", "Micro-batch", "GFLOP per token", "GiB per rank", "s/step", "MFU", "Days"]
    usable = load_hardware("h100").usable_memory / GIB
    return f"## The recipes as they stand\n\nOf an H100's 80 GB {usable:.1f} GiB are reckoned with.\n\n" + _table(
        header, rows
    )


def _best_layouts() -> str:
    rows = []
    for paper in (PAPER[0], PAPER[2]):
        result = search(_recipe(paper.recipe), paper.gpus, load_hardware("h100"))
        best = result.ranked[0]
        assert best.time is not None  # of a ranked layout
        rows.append(
            [
                paper.name,
                f"{paper.gpus}",
                f"{result.tried:,}",
                f"{len(result.ranked):,}",
                layout_words(best.config.parallel, paper.gpus),
                f"{best.config.train.micro_batch_size}",
                best.config.train.recompute,
                f"{best.memory / GIB:.1f}",
                f"{best.time.total:.2f}",
                f"{best.time.model_flops_utilisation:.0%}",
            ]
        )
    header = ["Model", "H100s", "Tried", "Fit", "Fastest", "Micro-batch", "Recompute", "GiB per rank", "s/step", "MFU"]
    return "## What the search finds\n\n" + _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
