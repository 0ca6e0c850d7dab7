"""Layouts of any size in one process: a rank's model is built on the meta device, in a process group that is feigned.

torch's fake process group knows ranks and groups and sends nothing. What is built is what training builds: the chunks
of one rank with their parameters' shapes, and the groups that they communicate in.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any
from unittest import mock

from dsmoe_megatron.config import Config
from dsmoe_megatron.planning.ranks import (
    layer_weights,
    mlp_ranks,
    rank_parameters,
    weights_outside_layers,
)
from tests.worker_pool import WorkerPool


@dataclass(frozen=True)
class Layout:
    """A recipe on a number of processes; what config_rules accepts."""

    name: str
    config: Config
    processes: int


@dataclass(frozen=True)
class BuiltRank:
    """What a rank of a layout turned out to be, beside what planning/ says of it.

    Attributes:
        rank: of the world.
        stage: its pipeline rank.
        parameters: elements of its parameters, by kind.
        predicted: likewise, by rank_parameters.
        group_sizes: of the groups in which it communicates, by what for.
        wrong_shapes: parameters that are there more (or, below zero, less) often with that shape than predicted.
        wrong_groups: groups whose members are others than predicted: (members, predicted).
    """

    rank: int
    stage: int
    parameters: dict[str, int]
    predicted: dict[str, int]
    group_sizes: dict[str, int]
    wrong_shapes: dict[str, int]
    wrong_groups: dict[str, tuple[list[int], list[int]]]

    @property
    def is_as_predicted(self) -> bool:
        return self.parameters == self.predicted and not self.wrong_shapes and not self.wrong_groups


def build_layouts(
    pool: WorkerPool, layouts: Sequence[Layout], ranks: Sequence[Sequence[int]] | None = None
) -> list[list[BuiltRank]]:
    """Build ranks of each layout, one after the other.

    Args:
        pool: runs it in a process of its own, since megatron-core's state is global.
        layouts: what is built.
        ranks: which ranks of each; None builds all.
    """
    chosen = ranks or [range(layout.processes) for layout in layouts]
    results: list[list[list[BuiltRank]]] = pool.run(1, build, layouts, chosen)
    return results[0]


def ends_and_middle(layout: Layout) -> list[int]:
    """A rank of the first, of a middle and of the last pipeline stage, each at another place within its stage."""
    stages = layout.config.parallel.pipeline
    of_stage = layout.processes // stages
    return [0, stages // 2 * of_stage + of_stage // 2 - 1, layout.processes - 1]


def build(layouts: Sequence[Layout], ranks: Sequence[Sequence[int]]) -> list[list[BuiltRank]]:
    """The job: see build_layouts."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dsmoe_megatron.runtime.distributed import model_parallel_groups

    dist.destroy_process_group()  # the pool's, of one
    # megatron-core makes gloo groups beside the others, which cannot be feigned
    initialize = partial(parallel_state.initialize_model_parallel, create_gloo_process_groups=False)
    meta = torch.device("meta")
    built: list[list[BuiltRank]] = []
    with (
        mock.patch.object(parallel_state, "initialize_model_parallel", initialize),
        mock.patch.object(torch.cuda, "current_device", return_value=meta),
    ):
        for layout, chosen in zip(layouts, ranks, strict=True):
            built.append([])
            for rank in chosen:
                dist.init_process_group("fake", rank=rank, world_size=layout.processes, store=FakeStore())
                with model_parallel_groups(layout.config.parallel, seed=1):
                    built[-1].append(_build_rank(layout, rank))
                dist.destroy_process_group()
    return built


def _build_rank(layout: Layout, rank: int) -> BuiltRank:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from dsmoe_megatron.model.gpt import build_chunks
    from dsmoe_megatron.model.transformer_config import transformer_config
    from dsmoe_megatron.runtime.backends import layer_backend

    config, cpu = layout.config, torch.device("cpu")
    with torch.device("meta"):  # where megatron-core does not ask for the current device
        chunks = build_chunks(config, transformer_config(config, cpu), layer_backend(cpu))
    shapes, counts = Counter[str](), Counter[str]()
    for name, parameter in (named for chunk in chunks for named in chunk.named_parameters()):
        assert parameter.is_meta, f"{name} was given memory"
        shapes[_described(name, tuple(parameter.shape))] += 1
        counts[_kind(name, parameter)] += parameter.numel()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    expected = _expected_shapes(config, stage)
    predicted = asdict(rank_parameters(config, stage))
    predicted_groups = communication_groups(config, layout.processes, rank)
    groups = {name: dist.get_process_group_ranks(group) for name, group in _groups(chunks[0]).items()}
    return BuiltRank(
        rank=rank,
        stage=stage,
        parameters=dict(counts),
        predicted={kind: count for kind, count in predicted.items() if count},
        group_sizes={name: len(members) for name, members in groups.items()},
        wrong_shapes={
            each: shapes[each] - expected[each] for each in shapes | expected if shapes[each] != expected[each]
        },
        wrong_groups={
            name: (members, predicted_groups[name])
            for name, members in groups.items()
            if members != predicted_groups[name]
        },
    )


def _expected_shapes(config: Config, stage: int) -> Counter[str]:
    """How often each name and shape occurs on a rank, over its chunks."""
    chunks = config.parallel.virtual_pipeline
    layers = config.parallel.layers_per_stage(config.model.num_hidden_layers)[stage] // chunks
    shapes = Counter(_described(weight.name, weight.shape) for weight in weights_outside_layers(config, stage))
    for layer in range(layers):
        for weight in layer_weights(config):
            shapes[_described(f"decoder.layers.{layer}.{weight.name}", weight.shape)] += chunks
    return shapes


def _described(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} {list(shape)}"


def _kind(name: str, parameter: Any) -> str:
    for part, kind in (
        ("norm", "norms"),
        ("embedding", "embeddings"),
        ("output_layer", "embeddings"),
        (".router.", "routers"),
        (".self_attention.", "attention"),
    ):
        if part in name:
            return kind
    # where megatron-core's DDP looks for the ranks to reduce over
    return "mlp" if getattr(parameter, "allreduce", True) else "experts"


def _groups(chunk: Any) -> dict[str, Any]:
    """Groups in which gradients and activations are exchanged; of the densely trained layers, those they really use."""
    from megatron.core import parallel_state

    from dsmoe_megatron.model.dense_moe_mlp import DenseMoEMLP

    attention, mlp = chunk.decoder.layers[0].self_attention, chunk.decoder.layers[0].mlp
    groups = {
        "tensor": attention.linear_qkv.tp_group,
        "context": attention.core_attention.context_group,
        "data": parallel_state.get_data_parallel_group(),
        "gradients": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "units": parallel_state.get_expert_tensor_and_model_parallel_group(),
        "expert gradients": parallel_state.get_expert_data_parallel_group(),
    }
    if isinstance(mlp, DenseMoEMLP):
        groups |= {"units": mlp.linear_fc1.tp_group, "data": mlp.router.groups.data}
    return groups


def communication_groups(config: Config, world_size: int, rank: int) -> dict[str, list[int]]:
    """The ranks, itself included, with which a rank communicates, by what for.

    megatron-core's order, from the fastest-varying: tensor, context, data, pipeline; for the experts' weights
    expert-tensor, expert, expert-data, pipeline.

    Args:
        config: recipe that config_rules accepted.
        world_size: processes.
        rank: from 0.

    Returns:
        `tensor`, `context`, `data` (without context), `gradients` (of the dense parameters: data x context),
        `pipeline`, `units` (over which an MLP's hidden units are split) and `expert gradients`.
    """
    parallel = config.parallel
    stage_size = world_size // parallel.pipeline
    stage, place = divmod(rank, stage_size)
    sizes = {"tensor": parallel.tensor, "context": parallel.context}
    sizes["data"] = stage_size // (parallel.tensor * parallel.context)
    units = mlp_ranks(config)
    first, first_units = stage * stage_size, rank - place % units

    def along(axis: str) -> list[int]:
        stride = prod(size for name, size in list(sizes.items())[: list(sizes).index(axis)])
        own = place // stride % sizes[axis]
        return [rank + (other - own) * stride for other in range(sizes[axis])]

    return {
        "tensor": along("tensor"),
        "context": along("context"),
        "data": along("data"),
        "gradients": list(range(first + place % parallel.tensor, first + stage_size, parallel.tensor)),
        "pipeline": list(range(place, world_size, stage_size)),
        "units": list(range(first_units, first_units + units)),
        "expert gradients": list(range(first + place % units, first + stage_size, units)),
    }
