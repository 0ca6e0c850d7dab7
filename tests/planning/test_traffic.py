"""Planned traffic against the collectives that training really starts, on gloo."""

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dsmoe_megatron.planning.traffic import step_traffic
from tests.training_jobs import micro_batches, tiny_config
from tests.worker_pool import WorkerPool

SEQUENCE = {"tensor": 2, "sequence": True}
WHOLE_EXPERTS = {**SEQUENCE, "expert_tensor": 1}
SPARSE = {"attention_type": "gqa", "num_experts": 4, "num_experts_per_tok": 4, "expert_training": "sparse"}
ONE = {"global_batch_size": 2}
SPARSE_MOA = {**SPARSE, "attention_type": "moa"}
SWIGLU_TIED = {"gated_mlp": True, "hidden_act": "silu", "router_type": "mlp", "tie_word_embeddings": True}
DENSE = {"attention_type": "gqa", "num_experts": 1, "moe_intermediate_size": 96}

CASES: list[tuple[str, dict[str, Any], int, dict[str, Any], dict[str, Any]]] = [
    ("TP2", {}, 2, {"tensor": 2}, {}),
    ("TP2, full recompute", {}, 2, {"tensor": 2}, {"recompute": "full"}),
    ("TP4 above the key/value heads", {}, 4, {"tensor": 4}, {"recompute": "full"}),
    ("TP2+SP, bf16", {}, 2, SEQUENCE, {"precision": "bf16"}),
    ("TP2+SP, full recompute", {}, 2, SEQUENCE, {"recompute": "full"}),
    ("TP2+SP with whole experts", {}, 2, WHOLE_EXPERTS, {}),
    ("TP2+SP+EP2", {}, 4, {**SEQUENCE, "expert": 2}, {}),
    ("EP2", {}, 2, {"expert": 2}, {}),
    ("CP2", {}, 2, {"context": 2}, {}),
    ("CP2 x EP2, selective recompute", {}, 2, {"context": 2, "expert": 2}, {"recompute": "selective"}),
    ("CP2 x TP2+SP", {}, 4, {"context": 2, **SEQUENCE}, {}),
    ("PP2", {}, 2, {"pipeline": 2}, {}),
    ("VPP2 x DP2 with overlap", {}, 4, {"pipeline": 2, "virtual_pipeline": 2, "overlap": True}, {}),
    ("SwiGLU, tied, TP2 x PP2", SWIGLU_TIED, 4, {"tensor": 2, "pipeline": 2}, {}),
    ("DP2, loss over all ranks", {"mi_scope": "data_parallel"}, 2, {}, {}),
    ("dense baseline, DP2 x PP2", DENSE, 4, {"pipeline": 2}, {}),
    ("sparse baseline, EP2", SPARSE, 2, {"expert": 2}, {}),
    # one micro-batch, as routing tables grow with their number
    ("sparse baseline, MoA, TP2+SP, EP2 of whole experts", SPARSE_MOA, 2, {**WHOLE_EXPERTS, "expert": 2}, ONE),
]
TOLERANCE = dict.fromkeys(("tensor", "expert", "context", "pipeline"), 1e-9)
TOLERANCE["data"] = 0.01
"""Relative; megatron-core pads its buffers of gradients and parameters."""
TRIFLES = 300
"""Bytes per step of what is not planned: loss, gradient norm, token counts, the sparse baseline's routing tables."""


def observed_traffic(config: Any) -> dict[str, float]:
    """Bytes that this rank sends in one step, by the group that it sends over."""
    from megatron.core import parallel_state
    from torch.utils._python_dispatch import TorchDispatchMode

    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    sent: defaultdict[str, float] = defaultdict(float)

    class Observer(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                names_of_arguments = [argument.name for argument in func._schema.arguments]
                group = dist.ProcessGroup.unbox(args[names_of_arguments.index("process_group")])
                record(func.__name__.split(".")[0], group, max(tensor_bytes(each) for each in args))
            return func(*args, **(kwargs or {}))

    def record(operation: str, group: Any, size: int) -> None:
        """`size`: the larger of input and output, the whole tensor."""
        if operation == "send":
            sent["pipeline"] += size
        elif not operation.startswith("recv"):
            rings = 2 if operation.startswith("allreduce") else 1
            sent[names.get(group.group_name, "other")] += rings * size * (group.size() - 1) / group.size()

    with model_parallel_groups(config.parallel, config.train.seed):
        names = {
            group.group_name: name
            for name, group in (
                ("tensor", parallel_state.get_tensor_model_parallel_group()),
                ("expert", parallel_state.get_expert_tensor_and_model_parallel_group()),
                ("expert", parallel_state.get_expert_model_parallel_group()),
                ("context", parallel_state.get_context_parallel_group()),
                ("pipeline", parallel_state.get_embedding_group()),
                ("data", parallel_state.get_data_parallel_group()),
                ("data", parallel_state.get_data_parallel_group(with_context_parallel=True)),
                ("data", parallel_state.get_expert_data_parallel_group()),
            )
        }
        engine = MegatronEngine(config, torch.device("cpu"))
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        batches = micro_batches(config, 0, rank, ranks)
        engine.train_step(batches)  # the first step gathers weights that were never trained
        with Observer():
            engine.train_step(batches)
    return dict(sent)


def tensor_bytes(argument: Any) -> int:
    """Of a tensor, or of all tensors in a list."""
    if isinstance(argument, torch.Tensor):
        return argument.numel() * argument.element_size()
    return sum(tensor_bytes(each) for each in argument) if isinstance(argument, list | tuple) else 0


@pytest.mark.parametrize(
    ("model", "world_size", "parallel", "train"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_step_sends_what_is_planned(
    worker_pool: WorkerPool, model: dict[str, Any], world_size: int, parallel: dict[str, Any], train: dict[str, Any]
) -> None:
    config = tiny_config(model, parallel, **train)
    stages = config.parallel.pipeline

    by_rank = worker_pool.run(world_size, observed_traffic, config)

    for rank, observed in enumerate(by_rank):
        planned: defaultdict[str, float] = defaultdict(float)
        for transfer in step_traffic(config, world_size, pipeline_rank=rank * stages // world_size):
            over = "tensor" if transfer.parallelism == "sequence" else transfer.parallelism
            planned[over] += transfer.sent
        assert {kind: observed.get(kind, 0) for kind in TOLERANCE} == {
            kind: pytest.approx(planned[kind], rel=tolerance, abs=TRIFLES) for kind, tolerance in TOLERANCE.items()
        }
        assert observed.get("other", 0) < TRIFLES


def test_sequence_parallelism_sends_what_tensor_parallelism_does_and_recompute_adds() -> None:
    """An all-reduce is a reduce-scatter and an all-gather; splitting the tokens only gathers inputs once more."""

    def of_layers(parallel: dict[str, Any], **train: Any) -> float:
        config = tiny_config({}, parallel, **train)
        return sum(
            transfer.sent
            for transfer in step_traffic(config, 2, 0)
            if transfer.parallelism in ("tensor", "sequence") and transfer.payload >= 16384
        )

    tensor, sequence = of_layers({"tensor": 2}), of_layers(SEQUENCE)

    assert sequence / tensor == pytest.approx((108 + 72) / (2 * 72))  # calls, all of one size
    assert of_layers({"tensor": 2}, recompute="full") / tensor == pytest.approx(104 / 72)
