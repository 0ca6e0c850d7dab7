"""The layouts that must train to the numbers of the single process, and what "the numbers" are."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dsmoe_megatron.config import Config
from tests.training_jobs import Trace, run_layout, tiny_config
from tests.worker_pool import WorkerPool

STEPS = 10
TOLERANCE = 1e-5  # relative, float32

MODELS: dict[str, dict[str, Any]] = {
    "DS-MoE": {},
    "SwiGLU, mlp router, tied": {
        "hidden_act": "silu",
        "gated_mlp": True,
        "router_type": "mlp",
        "tie_word_embeddings": True,
        "vocab_size": 250,
    },
    "GQA, LayerNorm": {"attention_type": "gqa", "norm_type": "layernorm"},
    "dense baseline": {"attention_type": "gqa", "num_experts": 1, "moe_intermediate_size": 96},
    "sparse baseline": {
        "attention_type": "gqa",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_training": "sparse",
    },
    "sparse baseline, MoA": {"num_experts": 4, "num_experts_per_tok": 2, "expert_training": "sparse"},
}


@dataclass(frozen=True)
class Case:
    """One layout of one model.

    Attributes:
        name: the layout.
        processes: of the layout.
        parallel: parallel section.
        model: key of MODELS.
        recompute: is part of the layout.
        layers, separate_documents, precision: of the single process too.
    """

    name: str
    processes: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: str = "DS-MoE"
    recompute: str = "none"
    layers: int = 2
    separate_documents: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.model}: {self.name}"

    def config(self) -> Config:
        """The recipe of the layout."""
        model = {**MODELS[self.model], "num_hidden_layers": self.layers}
        data = {"separate_documents": self.separate_documents}
        train = {"precision": self.precision, "recompute": self.recompute}
        return tiny_config(model, self.parallel, data, **train)

    def single_process(self, precision: str | None = None) -> "Case":
        """What it is compared with."""
        return replace(
            self,
            name="one process",
            processes=1,
            parallel={},
            recompute="none",
            precision=precision or self.precision,
        )


TENSOR = {"tensor": 2}
SEQUENCE = {"tensor": 2, "sequence": True}
PIPELINE = {"pipeline": 2}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
UNEVEN = {"pipeline": 2, "first_stage_layers": 1}
EXPERT = {"expert": 2}
WHOLE_EXPERTS = {**SEQUENCE, "expert_tensor": 1}
CONTEXT = {"context": 2}
OVERLAP = {"overlap": True}

Layout = tuple[str, int, dict[str, Any]]
SINGLE: list[Layout] = [
    ("TP2", 2, TENSOR),
    ("TP4 (above the key/value heads; 6 experts)", 4, {"tensor": 4}),
    ("TP2+SP", 2, SEQUENCE),
    ("PP2", 2, PIPELINE),
    ("PP4", 4, {"pipeline": 4}),
    ("PP2, interleaved", 2, INTERLEAVED),
    ("PP2, 1+3 layers", 2, UNEVEN),
    ("DP2", 2, {}),
    ("DP4", 4, {}),
    ("DP2, overlap", 2, OVERLAP),
    ("EP2", 2, EXPERT),
    ("EP4 (6 experts)", 4, {"expert": 4}),
    ("TP2+SP, ETP1", 2, WHOLE_EXPERTS),
    ("CP2", 2, CONTEXT),
    ("CP4", 4, {"context": 4}),
]
CROSSED: list[Layout] = [
    ("TP2 x PP2", 4, {**TENSOR, **PIPELINE}),
    ("TP2 x DP2, overlap", 4, {**TENSOR, **OVERLAP}),
    ("TP2+SP x PP2, interleaved", 4, {**SEQUENCE, **INTERLEAVED}),
    ("TP2+SP x PP2, 1+3 layers", 4, {**SEQUENCE, **UNEVEN}),
    ("TP2+SP x DP2", 4, SEQUENCE),
    ("TP2+SP x EP2", 4, {**SEQUENCE, **EXPERT}),
    ("TP2+SP, ETP1 x EP2", 2, {**WHOLE_EXPERTS, **EXPERT}),
    ("TP2+SP x CP2", 4, {**SEQUENCE, **CONTEXT}),
    ("TP2 x CP2", 4, {**TENSOR, **CONTEXT}),
    ("PP2, interleaved x DP2, overlap", 4, {**INTERLEAVED, **OVERLAP}),
    ("PP2 x EP2", 4, {**PIPELINE, **EXPERT}),
    ("PP2 x CP2", 4, {**PIPELINE, **CONTEXT}),
    ("EP2 x DP2", 4, EXPERT),
    ("EP2 over CP2", 2, {**EXPERT, **CONTEXT}),
    ("CP2 x DP2", 4, CONTEXT),
]
EIGHT: list[Layout] = [
    ("TP2+SP x PP2 x DP2", 8, {**SEQUENCE, **PIPELINE}),
    ("TP2+SP x EP2 x PP2", 8, {**SEQUENCE, **EXPERT, **PIPELINE}),
    ("TP2+SP x CP2 x DP2", 8, {**SEQUENCE, **CONTEXT}),
]


def cases() -> list[Case]:
    """Every dimension and pair of dimensions for DS-MoE; what may behave otherwise for the other models."""
    recompute = [
        Case("recompute selective", 1, recompute="selective"),
        Case("recompute full", 1, recompute="full"),
        Case("TP2+SP x EP2, recompute full", 4, {**SEQUENCE, **EXPERT}, recompute="full"),
        Case("PP2 x CP2, recompute selective", 4, {**PIPELINE, **CONTEXT}, recompute="selective"),
    ]
    swiglu = [
        Case(name, processes, parallel, "SwiGLU, mlp router, tied")
        for name, processes, parallel in (
            ("TP2", 2, TENSOR),
            ("PP2", 2, PIPELINE),
            ("PP2, 1+3 layers", 2, UNEVEN),
            ("DP2, overlap", 2, OVERLAP),
            ("TP2+SP x EP2", 4, {**SEQUENCE, **EXPERT}),
            ("TP2+SP x PP2, interleaved", 4, {**SEQUENCE, **INTERLEAVED}),
            ("CP2", 2, CONTEXT),
        )
    ]
    others = [
        Case("TP2+SP", 2, SEQUENCE, "GQA, LayerNorm"),
        Case("TP2 x PP2", 4, {**TENSOR, **PIPELINE}, "GQA, LayerNorm"),
        Case("TP2+SP x CP2", 4, {**SEQUENCE, **CONTEXT}, "GQA, LayerNorm"),
        Case("TP2+SP", 2, SEQUENCE, "dense baseline"),
        Case("PP2", 2, PIPELINE, "dense baseline"),
        Case("CP2", 2, CONTEXT, "dense baseline"),
        Case("EP2", 2, EXPERT, "sparse baseline"),
        Case("PP2", 2, PIPELINE, "sparse baseline"),
        Case("TP2+SP x EP2", 4, {**SEQUENCE, **EXPERT}, "sparse baseline, MoA"),
        Case("PP2 x DP2", 4, PIPELINE, "sparse baseline, MoA"),
    ]
    documents = [
        Case(f"{name}, separate documents", processes, parallel, separate_documents=True)
        for name, processes, parallel in (
            ("TP2+SP", 2, SEQUENCE),
            ("CP2", 2, CONTEXT),
            ("PP2 x DP2", 4, PIPELINE),
        )
    ]
    bf16 = [
        Case(f"{name}, bf16", processes, parallel, precision="bf16")
        for name, processes, parallel in (
            ("TP2+SP", 2, SEQUENCE),
            ("PP2", 2, PIPELINE),
            ("DP2, overlap", 2, OVERLAP),
            ("EP2", 2, EXPERT),
            ("CP2", 2, CONTEXT),
        )
    ]
    ours = [Case(name, processes, parallel) for name, processes, parallel in (*SINGLE, *CROSSED, *EIGHT)]
    everything = [*ours, *recompute, *swiglu, *others, *documents, *bf16]
    # stages of one or two layers where there are stages; elsewhere fewer layers say the same in half the time
    return [replace(case, layers=4) if "pipeline" in case.parallel or case in bf16 else case for case in everything]


@dataclass(frozen=True)
class Differences:
    """Largest relative differences of a run from another one.

    Attributes:
        loss: of the language-model losses of all steps.
        mi_loss: of the mutual-information losses of all steps and routers; below 0.1 nats relative to that, since
            float32 log-probabilities are known to 1e-7 and the loss is a mean of their differences.
        grad_norm: of the gradient norms of all steps.
        gradient: over the parameters, of the first step's gradient; relative to its largest element.
        worst_parameter: that gradient's.
    """

    loss: float
    mi_loss: float
    grad_norm: float
    gradient: float
    worst_parameter: str

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """(name, value) of what is limited."""
        return iter([(name, value) for name, value in vars(self).items() if name != "worst_parameter"])


def differences(actual: Trace, expected: Trace) -> Differences:
    """What sets two runs apart; NaN counts as infinitely far."""
    gradients = {key: _gradient_difference(actual, expected, key) for key in expected.gradients}
    worst = max(gradients, key=lambda key: gradients[key])
    assert actual.gradients.keys() == expected.gradients.keys()
    mi_losses = [
        _relative(actual_step[router], value, at_least=0.1)
        for actual_step, expected_step in zip(actual.mi_losses, expected.mi_losses, strict=True)
        for router, value in expected_step.items()
    ]
    return Differences(
        loss=max(map(_relative, actual.lm_losses, expected.lm_losses)),
        mi_loss=max(mi_losses, default=0.0),
        grad_norm=max(map(_relative, actual.grad_norms, expected.grad_norms)),
        gradient=gradients[worst],
        worst_parameter=worst,
    )


def _relative(actual: float, expected: float, at_least: float = 0.0) -> float:
    difference = abs(actual - expected) / max(abs(expected), at_least)
    return difference if difference == difference else float("inf")


def _gradient_difference(actual: Trace, expected: Trace, key: str) -> float:
    difference = (actual.gradients[key] - expected.gradients[key]).abs().max() / expected.gradients[key].abs().max()
    return float(difference.nan_to_num(nan=float("inf")))


class Runs:
    """Runs every case at most once.

    Args:
        pool: where they run.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self.pool = pool
        self.traces: dict[str, Trace] = {}

    def trace(self, case: Case) -> Trace:
        """What the case's run leaves behind."""
        key = repr(case)
        if key not in self.traces:
            self.traces[key] = run_layout(self.pool, case.config(), case.processes, STEPS)
        return self.traces[key]

    def differences(self, case: Case) -> Differences:
        """From the single process."""
        return differences(self.trace(case), self.trace(case.single_process()))

    def limits(self, case: Case) -> dict[str, float]:
        """What the differences may be: rounding in float32; in bf16 twice what sets one process apart from float32.

        Twice, as both runs are rounded, each on its way from the same float32 numbers: which of them the roundings
        take further depends on the processor's matrix products.
        """
        if case.precision == "fp32":
            return dict.fromkeys(("loss", "mi_loss", "grad_norm", "gradient"), TOLERANCE)
        return {name: 2 * value for name, value in self.rounding(case)}

    def rounding(self, case: Case) -> Differences:
        """What sets the single process apart from itself in float32."""
        return differences(self.trace(case.single_process()), self.trace(case.single_process("fp32")))
