"""Training on a GPU gives the CPU's numbers, repeats bit for bit where that is asked for, and can be resumed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_megatron.config import Config, ProfileConfig
from tests.gpu.commands import command, pretrain, trained
from tests.layout_cases import MODELS
from tests.pretrain_job import SmallData, run_config, training_lines

FIGURES = ("lm_loss", "mi_loss_attention", "mi_loss_mlp", "grad_norm")
FLOAT32 = 1e-4  # relative; cuBLAS and the CPU sum in other orders, and six steps of Adam make more of it
BF16 = 2e-2


def small_run(small_data: SmallData, run_dir: Path, kind: str = "DS-MoE", /, **sections: dict[str, Any]) -> Config:
    """Six steps of a tiny model, whose vocabulary is the data's."""
    values = {key: value for key, value in MODELS[kind].items() if key != "vocab_size"}
    sections["model"] = {**values, "num_hidden_layers": 2, **sections.get("model", {})}
    sections["optimizer"] = {"decay_steps": 6, **sections.get("optimizer", {})}
    return run_config(small_data, run_dir, **sections)


def assert_close(found: dict[int, dict[str, Any]], expected: dict[int, dict[str, Any]], tolerance: float) -> None:
    assert list(found) == list(expected)
    for step, line in expected.items():
        figures = [figure for figure in FIGURES if line.get(figure) is not None]
        assert figures == [figure for figure in FIGURES if found[step].get(figure) is not None]
        for figure in figures:
            assert found[step][figure] == pytest.approx(line[figure], rel=tolerance, abs=1e-6), (step, figure)


@pytest.mark.parametrize("model", MODELS)
def test_float32_gives_the_numbers_of_a_cpu(small_data: SmallData, tmp_path: Path, model: str) -> None:
    on_gpu, on_cpu = (trained(device, small_run(small_data, tmp_path / device, model)) for device in ("gpu", "cpu"))

    assert_close(on_gpu, on_cpu, FLOAT32)


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"separate_documents": True}},
        {"parallel": {"overlap": True}},
        {"train": {"recompute": "selective"}},
        {"train": {"recompute": "full"}},
    ],
    ids=["separate documents", "overlap", "selective recomputation", "full recomputation"],
)
def test_so_it_does_with_other_settings(
    small_data: SmallData, tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    on_gpu, on_cpu = (
        trained(device, small_run(small_data, tmp_path / device, **sections)) for device in ("gpu", "cpu")
    )

    assert_close(on_gpu, on_cpu, FLOAT32)


@pytest.mark.parametrize("model", ["DS-MoE", "SwiGLU, mlp router, tied", "sparse baseline, MoA"])
def test_bf16_is_within_its_rounding(small_data: SmallData, tmp_path: Path, model: str) -> None:
    on_gpu = trained("gpu", small_run(small_data, tmp_path / "gpu", model, train={"precision": "bf16"}))
    exact = trained("cpu", small_run(small_data, tmp_path / "cpu", model))

    assert_close(on_gpu, exact, BF16)


def test_a_deterministic_run_repeats_and_goes_on_bit_for_bit(small_data: SmallData, tmp_path: Path) -> None:
    """With dropout, bf16 and checkpoints that are written beside the training."""

    def config(name: str, steps: int) -> Config:
        return small_run(
            small_data,
            tmp_path / name,
            model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
            train={"deterministic": True, "precision": "bf16", "steps": steps},
        )

    whole, again = trained("gpu", config("whole", 6)), trained("gpu", config("again", 6))
    begun = trained("gpu", config("in_two", 3))
    in_two = trained("gpu", config("in_two", 6))

    assert again == whole
    assert in_two == whole
    assert begun == {step: whole[step] for step in (1, 2, 3)}


@pytest.mark.parametrize(("first", "then"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_checkpoint_goes_on_elsewhere(small_data: SmallData, tmp_path: Path, first: Any, then: Any) -> None:
    whole = trained("cpu", small_run(small_data, tmp_path / "whole"))

    trained(first, small_run(small_data, tmp_path / "moved", train={"steps": 3}))
    moved = trained(then, small_run(small_data, tmp_path / "moved"))

    assert_close(moved, whole, FLOAT32)


def test_a_profile_has_kernels_and_the_allocators_history(small_data: SmallData, tmp_path: Path) -> None:
    profile = ProfileConfig(first_step=2, last_step=3, memory=True)

    pretrain("gpu", small_run(small_data, tmp_path / "run", logging={"profile": profile, "tensorboard": False}))

    files = sorted((tmp_path / "run" / "profile").iterdir())
    (trace,) = (path for path in files if path.name.endswith(".json.gz"))
    with gzip.open(trace, "rt") as file:
        categories = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert "kernel" in categories
    assert len(files) == 2
    assert list(training_lines(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_a_check_says_what_the_gpu_holds(small_data: SmallData, tmp_path: Path) -> None:
    printed = pretrain("gpu", small_run(small_data, tmp_path / "run", train={"deterministic": True}), "--check")

    rows = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    assert "allocated on the GPU" in rows["memory"]
    assert "saved in" in rows["checkpoint"]


def test_the_doctor_names_the_gpu() -> None:
    assert torch.cuda.get_device_name() in command("gpu", "-m", "dsmoe_megatron", "doctor")
