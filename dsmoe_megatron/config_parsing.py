"""From text to a Config: recipe files, dotted command-line overrides, and the saved copy of a run.

jsonargparse merges the sources, writes the help and builds the dataclasses. Keys and types are checked here first: its
messages do not say which value was found or which key was meant, and a scalar in a section's place passes it
unnoticed. Whether the values make sense together is for config_rules.py. Nothing here imports torch.
"""

import difflib
import functools
import os
import re
import types
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_dumper, set_parsing_settings

from dsmoe_megatron.config import Config
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.recipe_text import recipe_text

Options = TypeVar("Options")
FLAGS = ("-h", "--help", "--print_config")


def parse_config(argv: Sequence[str], program: str) -> Config:
    """The recipe that a command line describes: `--config RECIPE`, then `--section.key VALUE` overrides.

    Overrides win over recipe files wherever they stand; a later file wins over an earlier one, key by key. A value is
    YAML (`null`, `3e-4`, `'[{"prefix": "a", "weight": 1}]'`). `--help` and `--print_config` print and end the process.

    Args:
        argv: arguments after the verb.
        program: name in the help, `dsmoe-megatron pretrain`.

    Raises:
        ConfigurationError: unknown key, ill-typed or missing value, unreadable file.
    """
    return _config(_parse(argv, program))


def parse_verb(argv: Sequence[str], program: str, options: type[Options]) -> tuple[Config, Options]:
    """A recipe, as parse_config, and a verb's own arguments, which may stand anywhere among the recipe's: `--gpus 32`.

    Args:
        argv: arguments after the verb.
        program: name in the help.
        options: dataclass of the verb's arguments, each with a default and its help below it; a bool is a flag that
            takes no value.

    Raises:
        ConfigurationError: as parse_config.
    """
    namespace = _parse(argv, program, options)
    return _config(namespace), options(**{name: namespace[name] for name in get_type_hints(options)})


def load_config(path: str | Path) -> Config:
    """The recipe in one file, such as the config.yaml of a run.

    Raises:
        ConfigurationError: as parse_config.
    """
    return parse_config(["--config", str(path)], "dsmoe-megatron")


def save_config(config: Config, path: str | Path) -> None:
    """Write every key of the recipe; the file appears whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(recipe_text(to_dict(config)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_values(values: dict[str, Any], section: type[Any], key: str) -> None:
    """The keys and types of one section's plain values, wherever they come from.

    Raises:
        ConfigurationError: the first unknown key or ill-typed value.
    """
    _check(values, section, key)


def to_dict(config: Config) -> dict[str, Any]:
    """The recipe as plain nested dictionaries, lists and scalars."""
    return asdict(config)


def _parse(argv: Sequence[str], program: str, options: type[Any] | None = None) -> Namespace:
    of_verb = {} if options is None else get_type_hints(options)
    switches = {f"--{name}" for name, kind in of_verb.items() if kind is bool}
    argv = [f"{argument}=true" if argument in switches else argument for argument in argv]
    flags = [argument for argument in argv if argument.split("=")[0] in FLAGS or argument.endswith(".help")]
    pairs = list(_options([argument for argument in argv if argument not in flags]))
    kinds = dict(_dotted_keys(Config)) | of_verb
    for key, text in pairs:
        _check_option(key, text, kinds)
    # joined with "=", so that a value may begin with "-"
    files_first = sorted(pairs, key=lambda pair: pair[0] != "config")
    arguments = [f"--{key}={text}" for key, text in files_first] + flags
    parser = _parser(program, options, explained=bool(flags))  # type: ignore[arg-type]  # a class is hashable
    try:
        namespace = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:  # what the checks above cannot see; said by the library
        raise ConfigurationError("arguments", " ".join(arguments), str(error)) from None
    assert isinstance(namespace, Namespace)
    return namespace


@functools.cache
def _parser(program: str, options: type[Any] | None, explained: bool) -> ArgumentParser:
    """Made once; with the text under each field as its help only where that is asked for, which takes as long again."""
    set_parsing_settings(docstring_parse_attribute_docstrings=explained)
    set_dumper("yaml", recipe_text)  # of --print_config
    parser = ArgumentParser(
        prog=program,
        usage="%(prog)s --config RECIPE [--section.key VALUE ...]",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", metavar="RECIPE", help="Recipe file (YAML).")
    if options is not None:
        parser.add_class_arguments(options, help="Flags (type bool) are given without a value.")
    parser.add_class_arguments(Config, help="Each key below can stand in the recipe or be given here.")
    return parser


def _config(namespace: Namespace) -> Config:
    return Config(**{field.name: namespace[field.name] for field in fields(Config)})


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, text) of each `--key text` or `--key=text`."""
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--"):
            raise ConfigurationError("arguments", argument, "unexpected; an override is --section.key VALUE")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise ConfigurationError(key, None, "needs a value: --section.key VALUE")
        yield key, text


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as in YAML 1.2 and in jsonargparse, and a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: list[Any] = []
        for key, _ in node.value:
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            names.append(key.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _load_yaml(text: str, key: str, value: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigurationError(key, value, f"not valid YAML{where}: {getattr(error, 'problem', error)}") from None


def _read_mapping(path: str, key: str) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(key, path, "no such file") from None
    except OSError as error:
        raise ConfigurationError(key, path, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(key, path, "not a text file in UTF-8") from None
    mapping = _load_yaml(text, key, path)
    if not isinstance(mapping, dict):
        raise ConfigurationError(key, path, "expected a file of sections (model:, train:, ...) with keys and values")
    return mapping


def _check_option(key: str, text: str, kinds: dict[str, Any]) -> None:
    """Check what one `--key text` brings in: a recipe, a section's file, a value, an item for a list (`--key+`)."""
    if key == "config":
        _check(_read_mapping(text, key), Config, "", f" (in {text})")
        return
    kind = kinds.get(key.removesuffix("+"))
    if kind is None:
        raise ConfigurationError(key, text, _unknown_key(key, kinds))
    if str in (kind, *get_args(kind)):
        return  # any text will do
    value = _load_yaml(text, key, text)
    if is_dataclass(kind) and isinstance(value, str):
        _check(_read_mapping(value, key), kind, key, f" (in {value})")
    elif key.endswith("+") and not isinstance(value, list):
        _check([value], kind, key)
    else:
        _check(value, kind, key)


def _check(value: Any, kind: Any, key: str, where: str = "") -> None:
    """Raise ConfigurationError for the first unknown key, missing key or ill-typed value in a tree of YAML values."""
    if is_dataclass(kind):
        _check_section(value, kind, key, where)
    elif get_origin(kind) is list and isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, get_args(kind)[0], f"{key}[{index}]", where)
    elif not _fits(value, kind):
        raise ConfigurationError(key, value, f"expected {_describe(kind)}{where}")


def _check_section(value: Any, kind: Any, key: str, where: str) -> None:
    if not isinstance(value, dict):
        raise ConfigurationError(key, value, f"expected keys and values{where}")
    hints = get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name, item in value.items():
        if name not in hints:
            known = [dotted for dotted, _ in _dotted_keys(Config)] + [prefix + sibling for sibling in hints]
            raise ConfigurationError(f"{prefix}{name}", item, _unknown_key(f"{prefix}{name}", known) + where)
        _check(item, hints[name], prefix + name, where)
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in value:
            raise ConfigurationError(key, value, f"{field.name} is missing{where}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool):  # Python counts it as an int
        return kind is bool
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def _describe(kind: Any) -> str:
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind)) if len(get_args(kind)) > 1 else str(get_args(kind)[0])
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "null",
        list: "a list",
    }
    return words[get_origin(kind) or kind]


def _dotted_keys(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every section and leaf below a dataclass."""
    for name, hint in get_type_hints(kind).items():
        yield prefix + name, hint
        if is_dataclass(hint):
            yield from _dotted_keys(hint, f"{prefix}{name}.")


def _unknown_key(key: str, known: Iterable[str]) -> str:
    """Name the key that was probably meant: the same last word in any section (--lr), else the most similar one."""
    by_last_word = {other.rpartition(".")[2]: other for other in known}
    similar = difflib.get_close_matches(key.rpartition(".")[2], by_last_word, n=1)
    return f"unknown key; did you mean {by_last_word[similar[0]]}?" if similar else "unknown key; --help lists them all"
