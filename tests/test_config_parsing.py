"""Recipes from files and command lines, and what is said of wrong ones."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe_megatron.config import Config, DatasetSource
from dsmoe_megatron.config_parsing import load_config, parse_config, save_config
from dsmoe_megatron.errors import ConfigurationError, exit_with


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {head_dim: 64, mi_alpha_mlp: 2e-4}\n"
        "optimizer: {lr: 3e-4, eps: 1E-8}\n"
        "data:\n  train:\n    - {prefix: prose, weight: 3}\n    - {prefix: code}\n"
    )
    return str(path)


def parse(*argv: str) -> Config:
    return parse_config(argv, "dsmoe-megatron pretrain")


def test_values_of_a_recipe_are_read_and_the_rest_is_default(recipe: str) -> None:
    config = parse("--config", recipe)

    assert config.model.head_dim == 64
    assert (config.model.mi_alpha_mlp, config.optimizer.lr, config.optimizer.eps) == (0.0002, 0.0003, 0.00000001)
    assert config.data.train == [DatasetSource("prose", 3.0), DatasetSource("code", 1.0)]
    assert config.train == Config().train


@pytest.mark.parametrize("override_first", [True, False])
def test_overrides_win_wherever_they_stand(recipe: str, override_first: bool) -> None:
    overrides = [
        "--optimizer.lr",
        "1e-3",
        "--train.steps=2",
        "--optimizer.min_lr",
        "null",
        "--parallel.sequence",
        "true",
    ]
    recipe_option = ["--config", recipe]

    config = parse(*(overrides + recipe_option if override_first else recipe_option + overrides))

    assert (config.optimizer.lr, config.train.steps, config.optimizer.min_lr) == (0.001, 2, None)
    assert config.parallel.sequence is True
    assert config.model.head_dim == 64


def test_a_list_is_replaced_or_added_to(recipe: str) -> None:
    replaced = parse("--config", recipe, "--data.train", '[{"prefix": "law", "weight": 2}]')
    added = parse("--config", recipe, "--data.train+", '{"prefix": "law", "weight": 2}')

    assert replaced.data.train == [DatasetSource("law", 2.0)]
    assert [source.prefix for source in added.data.train] == ["prose", "code", "law"]


def test_text_that_looks_like_yaml_stays_text() -> None:
    config = parse("--train.run_dir", "2024", "--data.tokenizer", "a: b", "--checkpoint.load=-odd-name")

    assert (config.train.run_dir, config.data.tokenizer, config.checkpoint.load) == ("2024", "a: b", "-odd-name")


def test_a_later_recipe_wins_key_by_key(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("model: {head_dim: 128}\n")

    config = parse("--config", recipe, "--config", str(tmp_path / "more.yaml"))

    assert (config.model.head_dim, config.model.mi_alpha_mlp) == (128, 0.0002)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {bogus: 3}", "model.bogus = 3: unknown key; --help lists them all (in FILE)"),
        ("model: {hiden_size: 3}", "model.hiden_size = 3: unknown key; did you mean model.hidden_size? (in FILE)"),
        ("modle: {head_dim: 3}", "modle = {'head_dim': 3}: unknown key; did you mean model? (in FILE)"),
        ("lr: 3", "lr = 3: unknown key; did you mean optimizer.lr? (in FILE)"),
        ("model: {hidden_size: wide}", "model.hidden_size = 'wide': expected a whole number (in FILE)"),
        ("model: {hidden_size: true}", "model.hidden_size = True: expected a whole number (in FILE)"),
        ("model: {hidden_size: 2.5}", "model.hidden_size = 2.5: expected a whole number (in FILE)"),
        ("model: {hidden_act: relu}", "model.hidden_act = 'relu': expected one of gelu, silu (in FILE)"),
        ("model: {vocab_size: all}", "model.vocab_size = 'all': expected a whole number or null (in FILE)"),
        ("optimizer: {lr: fast}", "optimizer.lr = 'fast': expected a number (in FILE)"),
        ("parallel: {sequence: 1}", "parallel.sequence = 1: expected true or false (in FILE)"),
        ("train: {run_dir: 7}", "train.run_dir = 7: expected text (in FILE)"),
        ("model: 3", "model = 3: expected keys and values (in FILE)"),
        ("model:", "model = None: expected keys and values (in FILE)"),
        ("data: {train: prose}", "data.train = 'prose': expected a list (in FILE)"),
        ("data: {train: [{prefix: a}, {weight: 2}]}", "data.train[1] = {'weight': 2}: prefix is missing (in FILE)"),
        (
            "data: {train: [{prefix: a, wieght: 2}]}",
            "data.train[0].wieght = 2: unknown key; did you mean data.train[0].weight? (in FILE)",
        ),
        (
            "model: {head_dim: 3, head_dim: 4}",
            "config = 'FILE': not valid YAML at line 1, column 22: head_dim stands twice",
        ),
        ("", "config = 'FILE': expected a file of sections (model:, train:, ...) with keys and values"),
        ("- 3", "config = 'FILE': expected a file of sections (model:, train:, ...) with keys and values"),
    ],
)
def test_a_wrong_recipe_is_said_with_key_value_rule_and_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)

    with pytest.raises(ConfigurationError) as raised:
        load_config(path)

    assert str(raised.value) == message.replace("FILE", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.stepz", "3"], "train.stepz = '3': unknown key; did you mean train.steps?"),
        (["--train.step", "3"], "train.step = '3': unknown key; did you mean train.steps?"),  # not an abbreviation
        (["--lr=3"], "lr = '3': unknown key; did you mean optimizer.lr?"),
        (["--train.steps", "many"], "train.steps = 'many': expected a whole number"),
        (["--train.steps"], "train.steps = None: needs a value: --section.key VALUE"),
        (["--train.steps", "--train.seed", "1"], "train.steps = None: needs a value: --section.key VALUE"),
        (["--train.precision", "fp8"], "train.precision = 'fp8': expected one of fp32, bf16"),
        (["--data.train", '[{"prefix": "a", "wt": 1}]'], "data.train[0].wt = 1: unknown key; --help lists them all"),
        (
            ["--data.train", '[{"class_path": "os.abort"}]'],
            "data.train[0].class_path = 'os.abort': unknown key; --help",
        ),
        (["--data.train", "[{"], "data.train = '[{': not valid YAML at line 1, column 3: expected the node content"),
        (["recipe.yaml"], "arguments = 'recipe.yaml': unexpected; an override is --section.key VALUE"),
        (["--config", "nowhere.yaml"], "config = 'nowhere.yaml': no such file"),
        (["--config", "/"], "config = '/': cannot be read: Is a directory"),
        (["--print_config=everything"], "arguments = '--print_config=everything': Invalid option"),
    ],
)
def test_a_wrong_command_line_is_said_with_key_value_and_rule(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse(*argv)

    assert str(raised.value).startswith(message)


def test_users_see_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse("--data.train", "[{\n'")

    with pytest.raises(SystemExit) as exited:
        exit_with(raised.value, "dsmoe-megatron pretrain")

    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsmoe-megatron pretrain: error: data.train = ")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigurationError, match="not a text file in UTF-8"):
        load_config(path)


def test_a_saved_recipe_is_the_same_recipe(recipe: str, tmp_path: Path) -> None:
    config = parse("--config", recipe, "--model.rms_norm_eps", "1e-6", "--train.run_dir", "läufe/1")
    saved = tmp_path / "config.yaml"
    saved.write_text("an older one")

    save_config(config, saved)

    assert load_config(saved) == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "recipe.yaml"]


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=st.text() | st.text("0123456789eE+-._:"))
def test_a_saved_text_is_the_same_text_whatever_it_looks_like(name: str, tmp_path: Path) -> None:
    config = Config()
    config.train.run_dir, config.data.train = name, [DatasetSource(name)]

    save_config(config, tmp_path / "config.yaml")

    assert load_config(tmp_path / "config.yaml") == config


def test_print_config_prints_the_resolved_recipe(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", recipe, "--train.steps", "7", "--logging.wandb.name", "3e-4"]
    with pytest.raises(SystemExit) as exited:
        parse("--print_config", *options)

    assert exited.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == parse(*options)


def test_help_says_what_each_key_means_and_its_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")

    text = " ".join(capsys.readouterr().out.split())
    assert "--train.timeout_minutes" in text
    assert "stack to run_dir/stacks and the run ends [minutes]. (type: float, default: 10.0)" in text


def test_nothing_deprecated_is_used(recipe: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse("--config", recipe, "--train.steps", "2")


def test_reading_and_checking_a_recipe_does_not_import_torch() -> None:
    program = (
        "import sys; from dsmoe_megatron import config_parsing, config_rules; "
        "config_rules.check_config(config_parsing.parse_config([], 'test'), world_size=1); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
