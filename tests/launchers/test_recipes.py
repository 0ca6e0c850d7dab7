"""Every recipe runs in its layout and is the model and training set-up of the paper's tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import load_config, parse_config
from dsmoe_megatron.config_rules import check_config, data_parallel_size
from dsmoe_megatron.planning.parameters import active_parameters, count_parameters

RECIPES = Path(__file__).resolve().parents[2] / "launchers" / "recipes"
# name: processes, Table 1's parameters without embeddings [millions], tolerance
PAPER = {
    "dsmoe_1b": (8, 1067, 0.005),
    "dsmoe_3b": (32, 2846, 0.018),  # the paper's Table 5 says 2793M
    "dsmoe_6b": (32, 6343, 0.005),
    "dense_1b": (8, 1017, 0.005),
    "dense_3b": (32, 2705, 0.005),
    "dense_6b": (32, 6186, 0.005),
    "smoe_1b": (8, 1042, 0.005),
    "smoe_1_5b": (8, 1445, 0.005),
    "smoe_5b": (32, 4911, 0.010),
}
PROCESSES = {name: processes for name, (processes, _, _) in PAPER.items()} | {"quickstart": 2}


def recipe(name: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml")


def test_every_recipe_is_tested_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize(("name", "processes"), PROCESSES.items())
def test_a_recipe_runs_on_its_number_of_processes(name: str, processes: int) -> None:
    check_config(recipe(name), processes)


@pytest.mark.parametrize("name", PAPER)
def test_a_run_cut_short_follows_the_same_schedule(name: str) -> None:
    config = parse_config(["--config", str(RECIPES / f"{name}.yaml"), "--train.steps", "2"], "test")

    check_config(config, PROCESSES[name])

    assert config.optimizer == recipe(name).optimizer


@pytest.mark.parametrize(("name", "millions", "tolerance"), [(name, *row[1:]) for name, row in PAPER.items()])
def test_parameters_are_those_of_table_1(name: str, millions: int, tolerance: float) -> None:
    # the paper's totals fit this router in all of its models; megatron-core's own, of the smoe recipes, is linear
    model = replace(recipe(name).model, router_type="mlp", router_hidden_size=512)

    assert count_parameters(model).total_without_embeddings == pytest.approx(millions * 1e6, rel=tolerance)


def test_active_parameters_are_those_of_the_paper() -> None:
    model = recipe("smoe_1_5b").model

    assert active_parameters(model, model.num_experts_per_tok, 1) == pytest.approx(419e6, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_training_is_the_papers(name: str) -> None:
    config = recipe(name)
    small = name in ("dsmoe_1b", "dense_1b", "smoe_1b", "smoe_1_5b")
    batch_tokens = config.train.global_batch_size * config.train.sequence_length

    assert config.train.sequence_length == 2048
    assert batch_tokens == (2**19 if small else 2**21)
    assert config.train.steps * batch_tokens == pytest.approx(30e9 if small else 100e9, abs=batch_tokens)
    assert config.optimizer.warmup_steps * batch_tokens == pytest.approx(1e9 if small else 2e9, abs=batch_tokens)
    assert config.optimizer.decay_steps == config.train.steps
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.clip_grad) == (3e-4, 0.01, 1.0)
    assert config.model.vocab_size == 50295


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [("dsmoe_1b", 3.5e-4, 6.3e-4), ("dsmoe_3b", 2e-4, 4e-4), ("dsmoe_6b", 2e-4, 2e-4)],
)
def test_weights_of_the_mutual_information_loss_are_those_of_table_2(name: str, attention: float, mlp: float) -> None:
    model = recipe(name).model

    assert (model.mi_alpha_attention, model.mi_alpha_mlp) == (attention, mlp)


def test_the_quickstart_uses_both_of_its_processes_on_different_samples() -> None:
    assert data_parallel_size(recipe("quickstart"), world_size=2) == 2
