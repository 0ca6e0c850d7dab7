"""DeepSpeed's ZeRO trains to the numbers of megatron-core's engine: losses, gradient norms, gradients."""

import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import Config
from tests.layout_cases import MODELS, STEPS, TOLERANCE, differences
from tests.training_jobs import Trace, run_layout, tiny_config
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed"
)

SEQUENCE = {"tensor": 2, "sequence": True}
TIED = "SwiGLU, mlp router, tied"
# no parameter stays whole and every structure is cut up, as in a large model
SMALL_PIECES = {"stage3_param_persistence_threshold": 0, "sub_group_size": 20_000, "reduce_bucket_size": 30_000}


@dataclass(frozen=True)
class Case:
    """A recipe, trained by both engines.

    Attributes:
        stage: of ZeRO.
        processes, parallel: the layout.
        precision, offload, pieces: as their names say; `pieces` takes SMALL_PIECES.
        model: key of MODELS.
        recompute: under DeepSpeed alone.
        scope: of the mutual-information losses.
    """

    stage: int
    processes: int = 2
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    offload: bool = False
    pieces: bool = False
    model: str = "DS-MoE"
    recompute: str = "none"
    scope: str = "micro_batch"

    def __str__(self) -> str:
        layout = " ".join(f"{key}={value}" for key, value in self.parallel.items())
        words = (f"ZeRO-{self.stage} on {self.processes}", layout, "offload" * self.offload, "pieces" * self.pieces)
        others = (value for value in (self.model, self.recompute, self.precision, self.scope))
        return ", ".join(word for word in (*words, *others) if word not in ("", "DS-MoE", "none", "micro_batch"))

    def zero(self, folder: Path) -> Config:
        """The recipe under DeepSpeed."""
        config = self._config(self.parallel, self.recompute, self.precision)
        config.engine.name, config.engine.zero_stage = "deepspeed", self.stage
        config.engine.offload_optimizer = self.offload
        if self.pieces:
            file = folder / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": SMALL_PIECES}))
            config.engine.deepspeed_config = str(file)
        return config

    def megatron(self) -> tuple[Config, int]:
        """The recipe under megatron-core's engine, and its processes.

        In float32 that is a single process wherever the recipe is the same mathematics there. In bf16 layouts differ
        by more than engines.
        """
        if self.precision == "bf16":
            return self._config(self.parallel, "none", "bf16"), self.processes
        return self._config({}, "none", "fp32"), self.processes if self.scope == "data_parallel" else 1

    def _config(self, parallel: dict[str, Any], recompute: str, precision: str) -> Config:
        model = {**MODELS[self.model], "num_hidden_layers": 2, "mi_scope": self.scope}
        return tiny_config(model, parallel, precision=precision, recompute=recompute)


CASES = [
    Case(1),
    Case(2),
    Case(3, pieces=True),
    Case(1, processes=4, parallel={"tensor": 2}),
    Case(2, processes=4, parallel=SEQUENCE),
    Case(3, processes=4, parallel=SEQUENCE, pieces=True),
    Case(2, parallel={"context": 2}),
    Case(3, offload=True),
    Case(2, model=TIED, recompute="full", pieces=True),
    Case(3, model=TIED, recompute="selective", pieces=True),
    Case(1, parallel=SEQUENCE, model="sparse baseline"),
    Case(2, scope="data_parallel"),
    Case(1, precision="bf16"),
    Case(1, processes=4, parallel=SEQUENCE, precision="bf16"),
    Case(2, precision="bf16", offload=True),
    Case(2, processes=4, parallel={"tensor": 2}, precision="bf16"),
    Case(3, precision="bf16", pieces=True),
]


class MegatronRuns:
    """What megatron-core's engine makes of the recipes; each is trained once.

    Args:
        pool: where they run.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.traces: dict[str, Trace] = {}

    def trace(self, case: Case) -> Trace:
        config, processes = case.megatron()
        key = f"{config} on {processes}"
        if key not in self.traces:
            self.traces[key] = run_layout(self.pool, config, processes, STEPS)
        return self.traces[key]

    def limits(self, case: Case) -> dict[str, float]:
        """What may lie between the engines: rounding in float32; in bf16 as much as lies between bf16 and float32."""
        if case.precision == "fp32":
            return dict.fromkeys(("loss", "mi_loss", "grad_norm", "gradient"), TOLERANCE)
        return dict(differences(self.trace(case), self.trace(replace(case, precision="fp32"))))


@pytest.fixture(scope="module")
def megatron_runs(worker_pool: WorkerPool) -> MegatronRuns:
    return MegatronRuns(worker_pool)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_engine_of_megatron_core(
    worker_pool: WorkerPool, megatron_runs: MegatronRuns, tmp_path: Path, case: Case
) -> None:
    expected, limits = megatron_runs.trace(case), megatron_runs.limits(case)

    actual = run_layout(worker_pool, case.zero(tmp_path), case.processes, STEPS)

    found = differences(actual, expected)
    assert {name: value for name, value in found if not value <= limits[name]} == {}, found
    initial = expected.initial_weights
    assert [key for key, weight in initial.items() if not actual.initial_weights[key].equal(weight)] == []
