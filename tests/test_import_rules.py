"""Imports run one way, light modules stay light, and what travels with an export stands alone.

The rules are read from the source with ast: nothing is imported here.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dsmoe_megatron", "data_tools", "checkpoints_tools")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPT_FOLDERS = ("data_tools", "checkpoints_tools", "launchers", "benchmarks")

# What a module, or everything below a package, may import of ours. The longest matching name decides.
ALLOWED_OF_OURS = {
    "dsmoe_megatron": [],  # the package's own __init__ and whatever has no line here
    "dsmoe_megatron.errors": [],
    "dsmoe_megatron.config": ["dsmoe_megatron.errors"],
    "dsmoe_megatron.recipe_text": [],
    "dsmoe_megatron.config_parsing": ["dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.recipe_text"],
    "dsmoe_megatron.batch_ramp": ["dsmoe_megatron.config"],
    "dsmoe_megatron.deepspeed_settings": ["dsmoe_megatron.errors", "dsmoe_megatron.config"],
    "dsmoe_megatron.config_rules": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.batch_ramp"),
        "dsmoe_megatron.deepspeed_settings",
    ],
    "dsmoe_megatron.run_folder": ["dsmoe_megatron.errors"],
    "dsmoe_megatron.checkpoint_metadata": ["dsmoe_megatron.errors"],
    "dsmoe_megatron.checkpoint_reading": ["dsmoe_megatron.errors", "dsmoe_megatron.checkpoint_metadata"],
    "dsmoe_megatron.durable": [],
    "dsmoe_megatron.json_text": [],
    "dsmoe_megatron.perplexity": [],
    "dsmoe_megatron.checkpoint_manifest": ["dsmoe_megatron.errors", "dsmoe_megatron.durable"],
    "dsmoe_megatron.codegen_tokenizer": ["dsmoe_megatron.errors"],
    "dsmoe_megatron.sentencepiece_conversion": ["dsmoe_megatron.errors"],
    "dsmoe_megatron.tokenizers": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.codegen_tokenizer", "dsmoe_megatron.sentencepiece_conversion"),
    ],
    "dsmoe_megatron.planning": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.config_rules", "dsmoe_megatron.planning"),
    ],
    "dsmoe_megatron.runtime": ["dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.runtime"],
    "dsmoe_megatron.model": ["dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.model"],
    "dsmoe_megatron.inference": ["dsmoe_megatron.errors", "dsmoe_megatron.inference"],
    "dsmoe_megatron.training": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.config_parsing"),
        *("dsmoe_megatron.config_rules", "dsmoe_megatron.run_folder", "dsmoe_megatron.tokenizers"),
        *("dsmoe_megatron.checkpoint_metadata", "dsmoe_megatron.checkpoint_reading"),
        *("dsmoe_megatron.checkpoint_manifest", "dsmoe_megatron.durable", "dsmoe_megatron.json_text"),
        "dsmoe_megatron.perplexity",
        *("dsmoe_megatron.batch_ramp", "dsmoe_megatron.deepspeed_settings"),
        *("dsmoe_megatron.planning", "dsmoe_megatron.runtime", "dsmoe_megatron.model"),
        *("dsmoe_megatron.inference.policy", "dsmoe_megatron.training"),
    ],
    "dsmoe_megatron.output_file": ["dsmoe_megatron.errors"],
    # it sits on top, with the verbs: checkpoints and datasets are read by the tools that know them
    "dsmoe_megatron.evaluation": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.config_parsing"),
        *("dsmoe_megatron.run_folder", "dsmoe_megatron.output_file", "dsmoe_megatron.tokenizers"),
        *("dsmoe_megatron.json_text", "dsmoe_megatron.perplexity"),
        *("dsmoe_megatron.planning", "dsmoe_megatron.inference"),
        "dsmoe_megatron.evaluation",
        *("checkpoints_tools.distributed_checkpoint", "checkpoints_tools.hf_architecture"),
        *("checkpoints_tools.safetensors_folder", "data_tools"),
    ],
    "dsmoe_megatron.reporting": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.config_parsing"),
        *("dsmoe_megatron.output_file", "dsmoe_megatron.planning", "dsmoe_megatron.reporting"),
    ],
    "dsmoe_megatron.doctor": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.config_parsing"),
        *("dsmoe_megatron.deepspeed_settings", "dsmoe_megatron.planning", "dsmoe_megatron.doctor"),
    ],
    "dsmoe_megatron.__main__": ["dsmoe_megatron"],
    "data_tools": ["dsmoe_megatron.errors", "dsmoe_megatron.recipe_text", "dsmoe_megatron.tokenizers", "data_tools"],
    # it makes what training will look for, which only training's own code can promise
    "data_tools.prepare_cache": [
        *("dsmoe_megatron.errors", "dsmoe_megatron.config", "dsmoe_megatron.config_parsing"),
        *("dsmoe_megatron.planning", "dsmoe_megatron.runtime", "dsmoe_megatron.training"),
    ],
    "checkpoints_tools": ["dsmoe_megatron", "checkpoints_tools"],
}
# What these may import of others' packages, wherever the import stands.
ALLOWED_OF_OTHERS = {
    "dsmoe_megatron.errors": [],
    "dsmoe_megatron.config": [],
    "dsmoe_megatron.recipe_text": ["yaml"],
    "dsmoe_megatron.config_parsing": ["yaml", "jsonargparse"],
    "dsmoe_megatron.batch_ramp": [],
    "dsmoe_megatron.deepspeed_settings": [],
    "dsmoe_megatron.config_rules": [],
    "dsmoe_megatron.run_folder": [],
    "dsmoe_megatron.durable": [],
    "dsmoe_megatron.json_text": [],
    "dsmoe_megatron.perplexity": [],
    "dsmoe_megatron.checkpoint_manifest": ["xxhash"],
    "dsmoe_megatron.output_file": [],
    "dsmoe_megatron.runtime.processes": [],
    "dsmoe_megatron.planning": [],
    "dsmoe_megatron.planning.hardware": ["yaml"],
    "dsmoe_megatron.planning.presentation": ["matplotlib"],
    # pictures of a run can be drawn where nothing can be trained
    "dsmoe_megatron.reporting": ["matplotlib", "numpy"],
    "dsmoe_megatron.inference.policy": ["torch"],
    "dsmoe_megatron.inference.configuration_dsmoe": ["torch", "transformers"],
    "dsmoe_megatron.inference.expert_products": ["torch", "transformers"],
    "dsmoe_megatron.inference.modeling_dsmoe": ["torch", "transformers"],
    "dsmoe_megatron.inference.routed_layers": ["torch", "transformers"],
    # vLLM's environment has no megatron-core
    "dsmoe_megatron.inference.active_experts": ["torch"],
    "dsmoe_megatron.inference.vllm_plugin": ["transformers", "vllm"],
    "dsmoe_megatron.inference.vllm_layers": ["torch", "vllm"],
    "dsmoe_megatron.inference.vllm_model": ["torch", "vllm"],
}
# Files that an export carries: they import each other relatively and nothing else of ours.
TRAVELLING = (
    "dsmoe_megatron.inference.policy",
    "dsmoe_megatron.inference.configuration_dsmoe",
    "dsmoe_megatron.inference.expert_products",
    "dsmoe_megatron.inference.modeling_dsmoe",
    "dsmoe_megatron.inference.routed_layers",
)
# A verb imports what it needs when it runs, so that a wrong recipe is refused at once.
COMMAND_LINE = ("dsmoe_megatron", "dsmoe_megatron.__main__")
LIGHT = [name for name, others in ALLOWED_OF_OTHERS.items() if "torch" not in others]


@dataclass(frozen=True)
class Import:
    module: str
    """Absolute name of what is imported."""
    relative: bool
    at_the_top: bool
    """Runs when the importing module is imported."""
    line: int


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[Import]:
    return list(read_imports(path.read_text(encoding="utf-8"), package=".".join(path.relative_to(ROOT).parent.parts)))


def read_imports(source: str, package: str) -> Iterator[Import]:
    """Every import in the source of a module that lies in `package`."""
    tree = ast.parse(source)
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_the_top = id(node) not in inside_functions
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, False, at_the_top, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (parent, node.module) if part)
            for alias in node.names:  # `from package import module` imports the module
                name = f"{base}.{alias.name}" if is_ours(f"{base}.{alias.name}") else base
                yield Import(name, node.level > 0, at_the_top, node.lineno)


def is_ours(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.split(".")[0] in PACKAGES and (path.is_dir() or path.with_suffix(".py").is_file())


def below(name: str, ancestors: list[str]) -> bool:
    return any(name == ancestor or name.startswith(f"{ancestor}.") for ancestor in ancestors)


def longest_match(name: str, table: dict[str, list[str]]) -> list[str] | None:
    matching = [key for key in table if below(name, [key])]
    return table[max(matching, key=len)] if matching else None


def own_imports(path: Path) -> list[Import]:
    """Imports of our modules; the bare package, which every import below it runs, does not count."""
    return [
        found for found in imports_of(path) if found.module.split(".")[0] in PACKAGES and found.module != PACKAGES[0]
    ]


def foreign_imports(path: Path) -> list[Import]:
    known = {*PACKAGES, *sys.stdlib_module_names}
    return [found for found in imports_of(path) if found.module.split(".")[0] not in known]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_of_ours_run_one_way(path: Path) -> None:
    allowed = longest_match(module_name(path), ALLOWED_OF_OURS)
    assert allowed is not None

    assert [found for found in own_imports(path) if not below(found.module, allowed)] == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if longest_match(module_name(path), ALLOWED_OF_OTHERS) is not None], ids=module_name
)
def test_light_and_travelling_modules_import_no_more_than_declared(path: Path) -> None:
    allowed = longest_match(module_name(path), ALLOWED_OF_OTHERS)
    assert allowed is not None

    assert [found for found in foreign_imports(path) if not below(found.module, allowed)] == []


@pytest.mark.parametrize("path", [path for path in FILES if module_name(path) in COMMAND_LINE], ids=module_name)
def test_the_command_line_imports_nothing_heavy_at_the_top(path: Path) -> None:
    at_the_top = [found for found in (*own_imports(path), *foreign_imports(path)) if found.at_the_top]

    assert [found for found in at_the_top if not below(found.module, LIGHT)] == []


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_with_an_export_imports_ours_relatively(name: str) -> None:
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")

    assert [found for found in own_imports(path) if not (found.relative and found.module in TRAVELLING)] == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_module_search_path_is_left_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))

    edits = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]

    assert edits == []


def test_no_script_has_the_name_of_a_standard_module() -> None:
    # the folder of a script is searched first: a tokenize.py there breaks `import torch`
    scripts = [path for folder in SCRIPT_FOLDERS for path in (ROOT / folder).glob("*.py")]

    assert [str(path) for path in scripts if path.stem in sys.stdlib_module_names - {"__init__"}] == []


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import torch.nn as nn\n"
        "from . import policy\n"
        "from ..errors import DSMoEError\n"
        "from dsmoe_megatron import config\n"
        "def late():\n    from megatron.core import tensor_parallel\n"
    )

    found = read_imports(source, package="dsmoe_megatron.inference")

    assert [(each.module, each.relative, each.at_the_top) for each in found] == [
        ("torch.nn", False, True),
        ("dsmoe_megatron.inference.policy", True, True),
        ("dsmoe_megatron.errors", True, True),
        ("dsmoe_megatron.config", False, True),
        ("megatron.core", False, False),
    ]
