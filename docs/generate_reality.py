"""Hold the estimates against built models and real steps, and print docs/estimate_against_reality.md.

python -m docs.generate_reality > docs/estimate_against_reality.md
"""

import importlib.metadata
import platform

from tqdm import tqdm

from benchmarks.measuring import table
from dsmoe_megatron.planning.memory import rank_memory
from tests.planning.test_memory import CASES, TOLERANCE, Measured, config_of, measure
from tests.planning.test_simulated_layouts import LAYOUTS
from tests.simulated_layouts import BuiltRank, build_layouts, ends_and_middle
from tests.worker_pool import WorkerPool

INTRODUCTION = f"""\
# Estimates against reality

<!-- Written by docs/generate_reality.py. Run python -m docs.generate_reality > docs/estimate_against_reality.md -->

`make test` holds the same cases. FLOPs and traffic, which are counted and not estimated, are held against torch's FLOP
counter and against the collectives of real steps (`tests/planning/test_flops.py`, `tests/planning/test_traffic.py`).

## Memory of a training step

The peak of live tensor bytes in the second step, from the profiler's allocator events, on a CPU over gloo: the fullest
rank of the stage that deviates most. "Own" is what the step holds beyond weights, gradient buffers and optimizer state.
Both must be within {TOLERANCE:.0%}. The models have 32 to 256 units of width: what is checked is the sum over tensors,
not a size.
"""
SIMULATED = """\
## Layouts of 64 to 1024 processes

Ranks of layouts that fit no machine at hand, built by the code that trains on the meta device, in torch's fake process
group: every parameter's shape and the members of every group in which a rank communicates, against the planner. The 19B
is the shape of the paper's speed test (Table 6), its attention as wide as the model.
"""
MEMORY_HEADER = ("Case", "Processes", "Stage", "Measured", "Planned", "Ratio", "Own, measured", "Own, planned", "Ratio")
SIMULATED_HEADER = ("Layout", "Processes", "Rank", "Stage", "Parameters built", "Planned", "Sizes of its groups", "")


def main() -> None:
    pool = WorkerPool()
    memory = [memory_row(pool, name) for name in tqdm(CASES)]
    simulated = build_layouts(pool, LAYOUTS, [ends_and_middle(layout) for layout in LAYOUTS])
    print(INTRODUCTION)
    print(*table(MEMORY_HEADER, memory), "", sep="\n")
    print(SIMULATED)
    rows = [
        simulated_row(layout.name, layout.processes, rank)
        for layout, ranks in zip(LAYOUTS, simulated, strict=True)
        for rank in ranks
    ]
    print(*table(SIMULATED_HEADER, rows), "", sep="\n")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    print(f"Made with Python {platform.python_version()}, {versions}.")


def memory_row(pool: WorkerPool, name: str) -> tuple[str, ...]:
    processes, *sections = CASES[name]
    config = config_of(*sections)
    ranks: list[Measured] = pool.run(processes, measure, config)

    def ratio(rank: Measured) -> float:
        return rank_memory(config, processes, rank.stage, device="cpu").total / rank.live.peak

    rank = max(ranks, key=lambda rank: abs(ratio(rank) - 1))
    planned = rank_memory(config, processes, rank.stage, device="cpu")
    own = planned.activations + planned.logits
    return (
        *(name, str(processes), str(rank.stage)),
        *(mebibytes(rank.live.peak), mebibytes(planned.total), f"{ratio(rank):.3f}"),
        *(mebibytes(rank.live.own_peak), mebibytes(own), f"{own / rank.live.own_peak:.3f}"),
    )


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def simulated_row(name: str, processes: int, rank: BuiltRank) -> tuple[str, ...]:
    groups = ", ".join(f"{group} {size}" for group, size in rank.group_sizes.items() if size > 1)
    built, predicted = (f"{sum(counts.values()):,}" for counts in (rank.parameters, rank.predicted))
    verdict = "equal" if rank.is_as_predicted else "DIFFERENT"
    return (name, str(processes), str(rank.rank), str(rank.stage), built, predicted, groups, verdict)


if __name__ == "__main__":
    main()
