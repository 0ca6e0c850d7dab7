"""Parameters of every rank, and the ranks that share them, are the built model's in every layout that is trained."""

from dataclasses import asdict
from pathlib import Path

import pytest

from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.planning.parameters import count_parameters
from dsmoe_megatron.planning.ranks import mlp_ranks, optimizer_shards, rank_parameters
from tests.layout_cases import MODELS, cases
from tests.simulated_layouts import Layout, build_layouts
from tests.training_jobs import tiny_config
from tests.worker_pool import WorkerPool

RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"
PROCESSES = {"1b": 8, "1_5b": 8, "3b": 32, "5b": 32, "6b": 32}
PAPER = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "quickstart")
UNEVEN = [
    {"pipeline": 2, "last_stage_layers": 1},
    {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2},
    {"pipeline": 3, "first_stage_layers": 2},
]


def layouts(model: str) -> list[Layout]:
    """Every layout in which the model is trained by the tests, once, and pipelines of unlike stages."""
    trained = {repr((case.parallel, case.processes)): case for case in cases() if case.model == model}
    return [
        *(Layout(case.name, case.config(), case.processes) for case in trained.values()),
        *(Layout(str(parallel), tiny_config(MODELS[model], parallel), parallel["pipeline"]) for parallel in UNEVEN),
    ]


@pytest.mark.parametrize("model", MODELS)
def test_every_rank_is_the_built_one(worker_pool: WorkerPool, model: str) -> None:
    expected = layouts(model)

    built = build_layouts(worker_pool, expected)

    for layout, ranks in zip(expected, built, strict=True):
        assert [rank.rank for rank in ranks] == list(range(layout.processes))
        assert [rank for rank in ranks if not rank.is_as_predicted] == [], layout.name
        dense_shards, expert_shards = optimizer_shards(layout.config, layout.processes)
        assert {rank.group_sizes["gradients"] for rank in ranks} == {dense_shards}, layout.name
        assert {rank.group_sizes["expert gradients"] for rank in ranks} == {expert_shards}, layout.name


@pytest.mark.parametrize("name", PAPER)
def test_all_ranks_together_hold_a_model_of_the_paper_once(name: str) -> None:
    config, processes = load_config(RECIPES / f"{name}.yaml"), PROCESSES[name.partition("_")[2]]
    parallel = config.parallel
    stages = [rank_parameters(config, stage) for stage in range(parallel.pipeline)]
    split = dict.fromkeys(("attention", "embeddings"), parallel.tensor)
    split |= dict.fromkeys(("mlp", "experts"), mlp_ranks(config))

    whole = sum(count * split.get(kind, 1) for stage in stages for kind, count in asdict(stage).items())

    assert whole == count_parameters(config.model).total
    dense_shards, expert_shards = optimizer_shards(config, processes)
    assert dense_shards * parallel.tensor == expert_shards * mlp_ranks(config) == processes // parallel.pipeline


def test_a_tied_embedding_is_held_by_both_ends_of_a_pipeline() -> None:
    model = MODELS["SwiGLU, mlp router, tied"]
    alone = rank_parameters(tiny_config(model), 0)
    first, last = (rank_parameters(tiny_config(model, {"pipeline": 2}), stage) for stage in (0, 1))

    assert alone.embeddings == first.embeddings == last.embeddings == 256 * 64  # 250 tokens, padded
