"""Train every layout of tests/layout_cases.py beside the single process and print docs/layouts.md.

python -m docs.generate_layouts > docs/layouts.md
"""

import importlib.metadata
import platform
from collections.abc import Iterator

from tqdm import tqdm

from benchmarks.measuring import table
from tests.layout_cases import MODELS, STEPS, TOLERANCE, Case, Differences, Runs, cases
from tests.worker_pool import WorkerPool

INTRODUCTION = f"""\
# Every layout, one set of numbers

<!-- Written by docs/generate_layouts.py. Run python -m docs.generate_layouts > docs/layouts.md -->

Each row is a training run of {STEPS} optimizer steps on real text, in real processes over gloo, against one process
with the same recipe and seed: the largest relative difference of the language-model loss, of the mutual-information
losses and of the gradient norm over all steps, and of the gradient of any parameter in the first step, relative to its
largest element (gathered over the ranks through the checkpoint's global tensors; every element must be covered and
replicas must agree). Initial weights are equal bit for bit. In float32 everything must be below {TOLERANCE:.0e};
mutual-information losses below 0.1 nats are held against 0.1 nats. `make test` runs the same cases.

TP tensor, SP sequence, PP pipeline, DP data, EP expert, ETP expert-tensor, CP context parallelism. The global batch is
8 samples in micro-batches of 2 throughout: DP4 has no gradient accumulation, one process has 4 micro-batches. Models
have 4 layers where there are pipeline stages and in bf16, else 2.
"""
BF16 = """\
## bf16

Rounding differs with the layout, and training amplifies it. A layout may be twice as far from the single process as the
single process in bf16 is from itself in float32 (first row), since both are rounded.
"""
LIMITS = """\
## What the layout does change

- The mean expert probability of the mutual-information loss is taken over one micro-batch (`model.mi_scope:
  micro_batch`) or over it on all data-parallel ranks (`data_parallel`). The entropy of a mean is not linear, so the
  first is the same in every layout with the same micro-batch size, the second with the same micro-batch size x
  data-parallel size (two ranks of 2 samples equal one rank of 4). The weight of the loss never depends on micro-batches
  or ranks.
- With dropout, ranks that hold different tokens or shards draw different masks: runs repeat in the same layout only.
- Differences of rounding grow with the steps, as Adam divides small gradients by their own size. With a learning rate
  of 3e-3 in the place of 1e-3 three rows came to 1.0e-5 to 1.7e-5 after 10 steps (mutual-information losses and a
  gradient norm under context and sequence parallelism), their gradients of the first step within 7e-7.
- Nothing here has run on a GPU.
"""
HEADER = ("Layout", "Processes", "Loss", "Mutual information", "Gradient norm", "Gradient, step 1", "of")


def main() -> None:
    runs = Runs(WorkerPool())
    everything = cases()
    for case in tqdm(everything):
        runs.trace(case)
    print(INTRODUCTION)
    print(f"Made with Python {platform.python_version()}, {', '.join(map(version, ('torch', 'megatron-core')))}.\n")
    for model in MODELS:
        own = [case for case in everything if case.model == model and case.precision == "fp32"]
        print(f"## {model}\n")
        print(*table(HEADER, [row(case.name, case, runs.differences(case)) for case in own]), "", sep="\n")
    print(BF16)
    half_precision = [case for case in everything if case.precision == "bf16"]
    print(*table(HEADER, list(bf16_rows(runs, half_precision))), "", sep="\n")
    print(LIMITS, end="")


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def bf16_rows(runs: Runs, half_precision: list[Case]) -> Iterator[tuple[str, ...]]:
    single = half_precision[0].single_process()
    rounding = runs.rounding(half_precision[0])
    yield ("one process, bf16 against float32", "1", *(f"{value:.1e}" for _, value in rounding), "")
    for case in half_precision:
        assert case.single_process() == single, f"{case} is compared with another process"
        yield row(case.name, case, runs.differences(case))


def row(name: str, case: Case, found: Differences) -> tuple[str, ...]:
    parameter = f"`{found.worst_parameter}`" if found.gradient else ""
    return (name, str(case.processes), *(f"{value:.1e}" if value else "0" for _, value in found), parameter)


if __name__ == "__main__":
    main()
