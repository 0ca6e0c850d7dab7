"""The recipes that DeepSpeed must train to the numbers of megatron-core's engine."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsmoe_megatron.config import Config
from tests.layout_cases import MODELS, STEPS, TOLERANCE, differences
from tests.training_jobs import Trace, run_layout, tiny_config
from tests.worker_pool import WorkerPool

SEQUENCE = {"tensor": 2, "sequence": True}
TIED = "SwiGLU, mlp router, tied"
# only norms stay whole and every structure is cut up, as in a large model
SMALL_PIECES = {"stage3_param_persistence_threshold": 100, "sub_group_size": 20_000, "reduce_bucket_size": 30_000}


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
        words = [f"ZeRO-{self.stage}", "offload" * self.offload, self._layout(), self.precision, self.model]
        words += [f"recompute {self.recompute}" * (self.recompute != "none"), "cut small" * self.pieces]
        words += [f"scope {self.scope}" * (self.scope != "micro_batch")]
        return ", ".join(word for word in words if word not in ("", "DS-MoE"))

    def _layout(self) -> str:
        tensor, context = self.parallel.get("tensor", 1), self.parallel.get("context", 1)
        names = ["TP2" * (tensor > 1) + "+SP" * self.parallel.get("sequence", False), "CP2" * (context > 1)]
        data = self.processes // (tensor * context)
        return " x ".join(name for name in (*names, f"DP{data}" * (data > 1)) if name)

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
        """The recipe under megatron-core's engine, and its processes: one, where that is the same mathematics."""
        return self._config({}, "none", self.precision), self.processes if self.scope == "data_parallel" else 1

    def _config(self, parallel: dict[str, Any], recompute: str, precision: str) -> Config:
        model = {**MODELS[self.model], "num_hidden_layers": 2, "mi_scope": self.scope}
        return tiny_config(model, parallel, precision=precision, recompute=recompute)


CASES = [
    Case(1),
    Case(1, processes=4, parallel={"tensor": 2}, recompute="full"),
    Case(1, parallel=SEQUENCE, model="sparse baseline"),
    Case(2, scope="data_parallel"),
    Case(2, processes=4, parallel=SEQUENCE),
    Case(2, parallel={"context": 2}),
    Case(2, model=TIED, recompute="full", pieces=True),
    Case(3, offload=True),
    Case(3, processes=4, parallel=SEQUENCE, pieces=True),
    Case(3, model=TIED, recompute="selective", pieces=True),
    Case(1, precision="bf16"),
    Case(1, processes=4, parallel=SEQUENCE, precision="bf16"),
    Case(2, precision="bf16", offload=True),
    Case(2, processes=4, parallel={"tensor": 2}, precision="bf16"),
    Case(3, precision="bf16", pieces=True),
]


class BothEngines:
    """Trains the recipes; megatron-core's engine does each once.

    Args:
        pool: where they run.
        folder: for DeepSpeed configurations.
    """

    def __init__(self, pool: WorkerPool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.traces: dict[str, Trace] = {}

    def zero(self, case: Case) -> Trace:
        return run_layout(self.pool, case.zero(self.folder), case.processes, STEPS)

    def megatron(self, case: Case) -> Trace:
        config, processes = case.megatron()
        key = f"{config} on {processes}"
        if key not in self.traces:
            self.traces[key] = run_layout(self.pool, config, processes, STEPS)
        return self.traces[key]

    def limits(self, case: Case) -> dict[str, float]:
        """What may lie between the engines: rounding in float32; in bf16 twice what lies between bf16 and float32.

        Layouts differ in bf16 by more than engines do: under TP2 megatron-core's own gradients go beyond it once.
        """
        if case.precision == "fp32":
            return dict.fromkeys(("loss", "mi_loss", "grad_norm", "gradient"), TOLERANCE)
        distance = differences(self.megatron(case), self.megatron(replace(case, precision="fp32")))
        return {name: 2 * value for name, value in distance}
