"""The layers that a GPU would have, as far as a CPU can say: what they are built with, and that recipes are accepted.

Transformer Engine and apex cannot be installed without CUDA. Classes of the same signatures stand for them, which take
megatron-core's from its source.
"""

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron.core
import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.model.gpt import build_chunks
from dsmoe_megatron.model.transformer_config import transformer_config
from dsmoe_megatron.runtime.backends import ApexNorm, ApexSpecProvider, TorchSpecProvider, layer_backend
from dsmoe_megatron.runtime.distributed import group_of_one, model_parallel_groups
from tests.training_jobs import tiny_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "launchers/recipes").glob("*.yaml"))
EXTENSION = Path(megatron.core.__file__).parent / "extensions/transformer_engine.py"
CPU = torch.device("cpu")


def check_call(class_name: str, method: str, *positional: Any, **by_name: Any) -> None:
    """Whether that class of megatron-core's, which cannot be made without Transformer Engine, takes these arguments.

    Raises:
        TypeError: it does not.
    """
    for node in ast.walk(ast.parse(EXTENSION.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            (function,) = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == method)
            for argument in (*function.args.args, *function.args.kwonlyargs):
                argument.annotation = None
            takes_the_same = eval(f"lambda {ast.unparse(function.args)}: None")
            takes_the_same(None, *positional, **by_name)
            return
    raise AssertionError(f"{class_name} is not in {EXTENSION}")


class EngineColumnParallelLinear(ColumnParallelLinear):
    def __init__(self, *positional: Any, **by_name: Any) -> None:
        check_call("TEColumnParallelLinear", "__init__", *positional, **by_name)
        assert not by_name["gather_output"]  # which Transformer Engine's does not do
        super().__init__(*positional, **by_name)


class EngineRowParallelLinear(RowParallelLinear):
    def __init__(self, *positional: Any, **by_name: Any) -> None:
        check_call("TERowParallelLinear", "__init__", *positional, **by_name)
        assert by_name["input_is_parallel"]
        super().__init__(*positional, **by_name)


class EngineNorm:
    def __new__(cls, *positional: Any, **by_name: Any) -> nn.Module:  # type: ignore[misc]
        check_call("TENorm", "__new__", *positional, **by_name)
        norm: nn.Module = TorchSpecProvider().layer_norm()(*positional, **by_name)
        return norm


class EngineSpecProvider(LocalSpecProvider):
    """As megatron-core's TESpecProvider; its linear layers could contain the norm, which must not be used."""

    def column_parallel_linear(self) -> type:
        return EngineColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return EngineRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        raise AssertionError("the routers would see the input before it is normalised")

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:  # noqa: ARG002
        return EngineNorm


def logits(provider: Any, model: dict[str, Any]) -> Tensor:
    config = tiny_config(model)
    with group_of_one(), model_parallel_groups(config.parallel, config.train.seed), torch.no_grad():
        (chunk,) = build_chunks(config, transformer_config(config, CPU), provider)
        ids = torch.arange(24).view(2, 12)
        result: Tensor = chunk.eval()(ids, torch.arange(12).expand(2, -1), None)
    return result


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's norms by name and arguments (apex/normalization/fused_layer_norm.py), computed by torch's."""

    class FusedRMSNorm(nn.RMSNorm):
        def __init__(self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
            super().__init__(normalized_shape, eps, elementwise_affine)

    class FusedLayerNorm(nn.LayerNorm):
        def __init__(self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
            super().__init__(normalized_shape, eps, elementwise_affine)

    module = ModuleType("apex.normalization")
    module.FusedRMSNorm, module.FusedLayerNorm = FusedRMSNorm, FusedLayerNorm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.normalization", module)
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention_type": "gqa", "hidden_act": "silu", "gated_mlp": True, "norm_type": "layernorm", "router_type": "mlp"},
]


@pytest.mark.parametrize("model", VARIANTS, ids=["moa", "gqa"])
def test_transformer_engine_would_take_the_arguments(model: dict[str, Any]) -> None:
    assert torch.equal(logits(EngineSpecProvider(), model), logits(TorchSpecProvider(), model))


@pytest.mark.usefixtures("apex")
@pytest.mark.parametrize("model", VARIANTS, ids=["moa", "gqa"])
def test_norms_of_apex_take_the_place_of_torchs(model: dict[str, Any]) -> None:
    assert torch.equal(logits(ApexSpecProvider(), model), logits(TorchSpecProvider(), model))


@pytest.mark.usefixtures("apex")
@pytest.mark.parametrize(("norm_type", "name"), [("rmsnorm", "FusedRMSNorm"), ("layernorm", "FusedLayerNorm")])
def test_a_norm_of_apex_is_fit_for_the_run(norm_type: str, name: str) -> None:
    config = tiny_config({"norm_type": norm_type}, {"tensor": 2, "sequence": True})
    config.train.precision = "bf16"

    norm = ApexNorm(transformer_config(config, CPU), hidden_size=64, eps=1e-6)

    assert type(norm).__name__ == name
    assert norm.eps == 1e-6
    for parameter in norm.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.sequence_parallel  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"transformer_engine", "fused_layer_norm_cuda"}, "TESpecProvider"),
        ({"fused_layer_norm_cuda"}, "ApexSpecProvider"),
        ({"apex"}, "TorchSpecProvider"),
    ],
)
def test_the_best_that_is_installed_is_taken_on_cuda(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], expected: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)

    assert type(layer_backend(torch.device("cuda"))).__name__ == expected
    assert type(layer_backend(CPU)).__name__ == "TorchSpecProvider"


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_megatron_core_accepts_what_a_recipe_sets_on_a_gpu(recipe: Path) -> None:
    config = load_config(recipe)

    transformer = transformer_config(config, torch.device("cuda"))

    assert transformer.deallocate_pipeline_outputs
    assert transformer.bf16 == (config.train.precision == "bf16")
