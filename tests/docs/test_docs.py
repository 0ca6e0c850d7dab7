"""The documentation against the code: links, paths, recipe keys, program options, and the generated page."""

import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from checkpoints_tools import export_hf, generate, import_hf, upcycle
from checkpoints_tools import verify as verify_export
from data_tools import blend, collect_local_corpus, inspect_dataset, preprocess, train_tokenizer, verify
from docs.examples import clean_corpus
from dsmoe_megatron.config_parsing import parse_config
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.evaluation.command import build_parser as build_evaluate_parser
from dsmoe_megatron.reporting.command import build_parser as build_report_parser
from tests.deepspeed_cases import CASES
from tests.layout_cases import cases

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGE_IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]
FOLDERS = ("launchers", "data_tools", "checkpoints_tools", "dsmoe_megatron", "tests", "docs", "benchmarks")
PROGRAMS = {
    "data_tools/collect_local_corpus.py": collect_local_corpus.build_parser(),
    "data_tools/train_tokenizer.py": train_tokenizer.build_parser(),
    "data_tools/preprocess.py": preprocess.build_parser(),
    "data_tools/verify.py": verify.build_parser(),
    "data_tools/inspect_dataset.py": inspect_dataset.build_parser(),
    "data_tools/blend.py": blend.build_parser(),
    "checkpoints_tools/export_hf.py": export_hf.build_parser(),
    "checkpoints_tools/generate.py": generate.build_parser(),
    "checkpoints_tools/verify.py": verify_export.build_parser(),
    "docs/examples/clean_corpus.py": clean_corpus.build_parser(),
    "-m dsmoe_megatron evaluate": build_evaluate_parser(),
    "-m dsmoe_megatron report": build_report_parser(),
    "checkpoints_tools/import_hf.py": import_hf.build_parser(),
    "checkpoints_tools/upcycle.py": upcycle.build_parser(),
}


def headings(page: Path) -> set[str]:
    """Anchors that a Markdown page offers."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text: str) -> list[str]:
    """Shell commands of the fenced blocks, continued lines joined, recipes in here-documents left out."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    blocks = re.sub(r"<<'YAML'\n.*?\nYAML\n", "\n", blocks, flags=re.DOTALL)
    return blocks.replace("\\\n", " ").splitlines()


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/configuration.md"} <= set(PAGE_IDS)


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_relative_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in headings(target), f"{link} names no heading of {target.name}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(
        rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:py|sh|yaml|md|svg)", page.read_text("utf-8")
    )
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing


def test_the_recipes_of_the_readme_are_those_of_the_folder() -> None:
    table = re.search(r"## Recipes\n(.*?)\n## ", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert table is not None
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", table[1], re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == {path.stem for path in (ROOT / "launchers" / "recipes").glob("*.yaml")}


def test_the_configuration_page_is_current() -> None:
    script = ROOT / "docs" / "generate_configuration.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == printed, (
        "run docs/generate_configuration.py again"
    )


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_recipe_keys_are_real(page: Path) -> None:
    """Both `--section.key` and `section.key` in code; a wrong type is fine here, an unknown key is not."""
    text = page.read_text("utf-8")
    sections = "model|parallel|data|optimizer|train|checkpoint|logging|evaluation|engine"
    options = re.findall(rf"--((?:{sections})\.[\w.]+)", text)
    in_code = re.findall(rf"`((?:{sections})\.\w[\w.]*\w)(?:: [\w.-]+)?`", text)
    keys = {*options, *(key for key in in_code if not key.endswith(".weight"))}  # those are exported tensors
    assert {key: refusal for key in keys if "unknown key" in (refusal := refusal_of(key))} == {}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_program_options_are_real(page: Path) -> None:
    for command in commands(page.read_text("utf-8")):
        for program, parser in PROGRAMS.items():
            if f"python {program} " in command:
                known = option_names(parser)
                assert set(re.findall(r"(?<= )--[\w-]+", command)) <= known, command


def refusal_of(key: str) -> str:
    """What the command line says of a value that few keys accept."""
    try:
        parse_config([f"--{key}=?"], "docs")
    except ConfigurationError as error:
        return error.rule
    return ""


def option_names(parser: ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def test_the_table_of_layouts_has_every_case() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])

    for case in cases():
        section = "bf16" if case.precision == "bf16" else case.model
        assert f"\n| {case.name} | {case.processes} |" in sections[section], f"{case}: make docs/layouts.md again"


def test_the_table_of_deepspeed_has_every_case() -> None:
    page = (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")

    for case in CASES:
        assert f"\n| {case} | {case.processes} |" in page, f"{case}: run python -m docs.generate_deepspeed"
