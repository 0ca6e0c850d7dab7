"""Train every case of tests/deepspeed_cases.py under both engines and print the table of docs/deepspeed.md.

python -m docs.generate_deepspeed
"""

import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.measuring import table
from tests.deepspeed_cases import CASES, BothEngines
from tests.layout_cases import differences
from tests.worker_pool import WorkerPool

HEADER = ("DeepSpeed", "Processes", "Loss", "Mutual information", "Gradient norm", "Gradient, step 1")


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        engines = BothEngines(WorkerPool(), Path(folder))
        for case in tqdm(CASES):
            found = differences(engines.zero(case), engines.megatron(case))
            figures = (f"{value:.1e}" if value else "0" for _, value in found)
            rows.append((str(case), str(case.processes), *figures))
    print(*table(HEADER, rows), sep="\n")


if __name__ == "__main__":
    main()
