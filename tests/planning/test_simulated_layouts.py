"""Ranks of layouts of 64 to 1024 processes, built without memory or network, are what planning/ says they are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import ParallelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.config_rules import check_config
from tests.simulated_layouts import Layout, build_layouts, ends_and_middle
from tests.worker_pool import WorkerPool

RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"
# the 19B of the paper's speed test (Table 6); its heads are not stated: 8 experts x 4, together as wide as the model
SHAPES: dict[str, dict[str, Any]] = {
    "6B": {},
    "19B": {"hidden_size": 7168, "moe_intermediate_size": 896, "head_dim": 224},
}
SEQUENCE_4 = {"tensor": 4, "sequence": True}
SEQUENCE_8 = {"tensor": 8, "sequence": True}


def layout(model: str, name: str, processes: int, parallel: dict[str, Any]) -> Layout:
    config = load_config(RECIPES / "dsmoe_6b.yaml")
    # 768 samples can be dealt evenly in every layout here
    train = replace(config.train, micro_batch_size=1, global_batch_size=768)
    section = replace(config.model, **SHAPES[model])
    return Layout(
        f"{model}, {name}", replace(config, model=section, train=train, parallel=ParallelConfig(**parallel)), processes
    )


LAYOUTS = [
    layout("6B", "TP4+SP x PP4 x EP4", 64, {**SEQUENCE_4, "pipeline": 4, "expert": 4}),
    layout("6B", "TP2 x PP12 x CP2", 96, {"tensor": 2, "pipeline": 12, "context": 2}),
    layout(
        "6B",
        "TP2+SP x PP4, VPP3 x CP2 x EP8",
        256,
        {"tensor": 2, "sequence": True, "pipeline": 4, "virtual_pipeline": 3, "context": 2, "expert": 8},
    ),
    layout("6B", "TP8+SP x PP4, VPP9 x EP4", 1024, {**SEQUENCE_8, "pipeline": 4, "virtual_pipeline": 9, "expert": 4}),
    layout("19B", "TP8+SP x PP4, ETP1 x EP16", 128, {**SEQUENCE_8, "pipeline": 4, "expert": 16, "expert_tensor": 1}),
    layout(
        "19B",
        "TP4+SP x PP2, 19+17 layers x CP4 x EP2",
        512,
        {**SEQUENCE_4, "pipeline": 2, "last_stage_layers": 17, "context": 4, "expert": 2},
    ),
    layout(
        "19B", "TP8+SP x PP12, VPP3 x CP2", 768, {**SEQUENCE_8, "pipeline": 12, "virtual_pipeline": 3, "context": 2}
    ),
    layout("19B", "TP4+SP x PP4 x EP4 x DP64", 1024, {**SEQUENCE_4, "pipeline": 4, "expert": 4}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}: {layout.processes} processes")
def test_ranks_are_as_planned(worker_pool: WorkerPool, layout: Layout) -> None:
    check_config(layout.config, layout.processes)

    (ranks,) = build_layouts(worker_pool, [layout], [ends_and_middle(layout)])

    assert [rank for rank in ranks if not rank.is_as_predicted] == []
    stages = layout.config.parallel.pipeline
    assert [rank.stage for rank in ranks] == [0, stages // 2, stages - 1]
