"""The doctor's report against what this environment builds, and against environments that are made up."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_megatron.__main__ import main
from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.doctor.choices import choices, reasons_against
from dsmoe_megatron.doctor.command import as_text
from dsmoe_megatron.doctor.environment import Environment, inspect_environment

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "launchers/recipes"

# eight GPUs of 80 GB with Transformer Engine and without; no such machine is at hand, so these are made up
WITHOUT_ENGINE = Environment(
    python="3.12.0",
    torch="2.9.0",
    cuda="12.8",
    devices=("NVIDIA H100 80GB HBM3",) * 8,
    device_memory=80_000_000_000,
    cores=64,
    memory=1_000_000_000_000,
    backends=("gloo", "nccl"),
    libraries={"megatron-core": "0.16.1"},
)
WITH_ENGINE = dataclasses.replace(WITHOUT_ENGINE, libraries={**WITHOUT_ENGINE.libraries, "transformer-engine": "2.9.0"})


def implementation(environment: Environment, part: str) -> str:
    return next(choice.implementation for choice in choices(environment, Config()) if choice.part == part)


def test_this_environment_is_what_its_packages_say() -> None:
    environment = inspect_environment()

    assert environment.torch == torch.__version__
    assert environment.libraries["megatron-core"] == importlib.metadata.version("megatron-core")
    assert environment.libraries["transformers"] == importlib.metadata.version("transformers")
    assert environment.on_cuda == torch.cuda.is_available()
    assert "gloo" in environment.backends
    usage = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True)
    assert environment.torchrun_waits == all(
        option in usage.stdout for option in ("--shutdown-timeout", "--signals-to-handle")
    )


def test_a_torchrun_that_kills_ranks_early_is_warned_of() -> None:
    environment = inspect_environment()

    assert "after 30 s" in as_text(dataclasses.replace(environment, torchrun_waits=False), [])
    assert "after 30 s" not in as_text(dataclasses.replace(environment, torchrun_waits=True), [])


# megatron-core decides at its import: each environment needs a process of its own
BUILT = """
import json
from dsmoe_megatron.runtime.distributed import prepare_device
device = prepare_device()
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads
from dsmoe_megatron.runtime.backends import layer_backend
print(json.dumps([
    optimizer.Adam.__module__.split('.')[0],
    clip_grads.l2_norm_impl.__module__.split('.')[0],
    layer_backend(device).column_parallel_linear().__module__,
]))
"""
APEX = {
    "apex/__init__.py": "",
    "apex/optimizers.py": "class FusedAdam: pass\nclass FusedSGD: pass\n",
    "apex/multi_tensor_apply.py": "def multi_tensor_applier(*arguments): pass\n",
    "amp_C.py": "def multi_tensor_l2norm(*arguments): pass\ndef multi_tensor_scale(*arguments): pass\n",
}


def in_a_process(program: str, *arguments: str, extra: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(extra)] if extra else []), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program] if program else [sys.executable, "-m", "dsmoe_megatron", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize(
    ("files", "adam", "norm"),
    [({}, "torch AdamW", "megatron-core's own loop"), (APEX, "apex FusedAdam", "apex multi_tensor_l2norm")],
    ids=["no apex", "an apex of NVIDIA's names"],
)
def test_what_is_named_is_what_megatron_core_takes(tmp_path: Path, files: dict[str, str], adam: str, norm: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    report = json.loads(in_a_process("", "doctor", "--json", extra=tmp_path).stdout)
    built = json.loads(in_a_process(BUILT, extra=tmp_path).stdout.splitlines()[-1])

    uses = {choice["part"]: choice["implementation"] for choice in report["recipes"][0]["uses"]}
    assert uses["Adam"] == adam
    assert uses["Adam"].split()[0] == built[0]
    assert uses["gradient norm"].startswith(norm)
    assert uses["gradient norm"].startswith({"amp_C": "apex", "megatron": "megatron-core"}[built[1]])
    assert built[2].startswith("megatron.core.tensor_parallel")
    assert uses["linear"].startswith("torch")


def test_the_other_package_called_apex_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "apex/lib").mkdir(parents=True)
    (tmp_path / "apex/__init__.py").write_text("")

    done = in_a_process("", "doctor", extra=tmp_path)

    assert "not NVIDIA's but an unrelated one of PyPI; pip uninstall apex" in done.stdout
    assert "torch AdamW" in done.stdout


def test_with_transformer_engine_nothing_is_missing() -> None:
    for part in ("linear", "norm", "Adam", "gradient norm"):
        assert implementation(WITH_ENGINE, part).startswith("Transformer Engine")
    assert not any(choice.better for choice in choices(WITH_ENGINE, Config()))


def test_without_it_the_command_that_brings_it_is_named() -> None:
    missing = {choice.part: choice for choice in choices(WITHOUT_ENGINE, Config()) if choice.better}

    assert set(missing) == {"linear", "norm", "Adam", "gradient norm"}
    assert "transformer_engine[pytorch]" in str(missing["linear"].install)
    assert "github.com/NVIDIA/apex" in str(missing["gradient norm"].install)


def test_under_deepspeed_its_engine_decides() -> None:
    config = Config()
    config.engine.name, config.engine.zero_stage = "deepspeed", 2
    uses = {choice.part: choice.implementation for choice in choices(WITH_ENGINE, config)}
    config.engine.offload_optimizer = True
    offloaded = {choice.part: choice.implementation for choice in choices(WITH_ENGINE, config)}

    assert (uses["Adam"], offloaded["Adam"]) == ("torch AdamW, fused", "DeepSpeedCPUAdam")
    assert uses["gradient norm"] == "DeepSpeed ZeRO-2, on torch"
    assert uses["linear"].startswith("Transformer Engine")
    assert "which is not installed: pip install" in "; ".join(reasons_against(WITH_ENGINE, config))


def reasons(environment: Environment, recipe: str) -> str:
    return "; ".join(reasons_against(environment, load_config(RECIPES / f"{recipe}.yaml")))


def test_a_recipe_that_fits_has_nothing_against_it() -> None:
    assert reasons(WITH_ENGINE, "dsmoe_6b") == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"devices": WITH_ENGINE.devices[:1]}, "its layout needs 2 GPUs or more, and 1 are here"),
        ({"device_memory": 16_000_000_000}, "but those here have 16 GB"),
        ({"libraries": {}}, "megatron-core is not installed"),
        ({"libraries": {"megatron-core": "0.12.0"}}, "megatron-core 0.12.0 is installed"),
        ({"backends": ("gloo",)}, "torch was built without nccl"),
        ({"devices": (), "device_memory": None, "memory": 16_000_000_000}, "16 GB of memory and no GPU"),
    ],
)
def test_what_is_lacking_is_the_reason(change: dict[str, Any], reason: str) -> None:
    assert reason in reasons(dataclasses.replace(WITH_ENGINE, **change), "dsmoe_6b")


def test_memory_is_judged_only_where_it_is_known() -> None:
    small = dataclasses.replace(
        WITH_ENGINE, device_memory=16_000_000_000, libraries={**WITH_ENGINE.libraries, "deepspeed": "0.19.2"}
    )
    config = load_config(RECIPES / "dsmoe_6b.yaml")
    config.parallel.overlap = False
    config.engine.name = "deepspeed"

    assert "16 GB" in "; ".join(reasons_against(small, config))
    config.engine.zero_stage = 3
    assert reasons_against(small, config) == []


def test_the_exit_code_says_whether_all_recipes_can_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--config", str(RECIPES / "quickstart.yaml")]) == 0
    huge = tmp_path / "huge.yaml"
    huge.write_text("model: {hidden_size: 65536, vocab_size: 1000000}\n")
    assert main(["doctor", "--config", str(RECIPES / "quickstart.yaml"), str(huge)]) == 1

    said = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("can run here") for line in said) == 2
    assert any(line.startswith(f"{huge}: cannot run here: ") for line in said)


def test_a_recipe_that_breaks_a_rule_cannot_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("train: {global_batch_size: 3, micro_batch_size: 2}\n")

    assert main(["doctor", "--config", str(wrong)]) == 1
    assert "cannot run here: train.global_batch_size = 3" in capsys.readouterr().out
