"""Print docs/configuration.md from the recipe's dataclasses and rules.

python docs/generate_configuration.py > docs/configuration.md
"""

import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_rules import ABOVE_ZERO, AT_LEAST_ONE, BELOW_ONE, LARGEST_SEED, NOT_NEGATIVE

INTRODUCTION = """\
# Configuration

<!-- Written by docs/generate_configuration.py. Change the dataclasses in dsmoe_megatron/config.py, then run
python docs/generate_configuration.py > docs/configuration.md -->

A run is described by one recipe: a YAML file of the sections below. A key that a recipe leaves out has its default.

```bash
python -m dsmoe_megatron pretrain --config RECIPE [--config RECIPE] [--section.key VALUE ...]
```

- `--config` may be given more than once. A later file wins over an earlier one, key by key; lists are replaced whole.
- `--section.key VALUE` wins over every file, wherever it stands. The value is YAML: `null`, `true`, `3e-4`,
  `'[{"prefix": "data/text", "weight": 0.7}]'`.
- `--data.train+ '{"prefix": "data/more"}'` adds one entry to a list instead of replacing it.
- `--optimizer FILE` reads a whole section from a file.
- `--print_config` prints the resolved recipe and stops. `--help` lists every key.
- `config.yaml` in a run folder is the resolved recipe of that run, with every key. It is itself a recipe.

An unknown key, a value of the wrong type or out of range, or a combination that cannot run is one line on standard
error that names key, value and rule. The process ends with code 2 before any process group starts. The rules for
combinations are in [config_rules.py](../dsmoe_megatron/config_rules.py).
"""
RANGES = (
    ("at least 1", AT_LEAST_ONE),
    ("above 0", ABOVE_ZERO),
    ("0 or above", NOT_NEGATIVE),
    ("0 to below 1", BELOW_ONE),
)
OTHER_LIMITS = {
    "train.seed": [f"0 to {LARGEST_SEED}"],
    "train.spike_window": ["at least 4"],
    "engine.zero_stage": ["1 to 3"],
    "weight": ["above 0"],
}
TYPE_NAMES = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", types.NoneType: "`null`"}


def page() -> str:
    """The whole page."""
    sections = [_section(name, kind) for name, kind in get_type_hints(Config).items()]
    return "\n".join([INTRODUCTION, *sections])


def _section(name: str, kind: Any) -> str:
    return f"## {name}\n\n{_summary(kind)}\n\n{_table(kind, f'{name}.')}{''.join(_entry_tables(name, kind))}"


def _summary(kind: Any) -> str:
    return " ".join((docstring_parser.parse(kind.__doc__).short_description or "").split())


def _table(kind: Any, prefix: str) -> str:
    rows = ["| Key | Value | Default | Meaning |", "|---|---|---|---|", *_rows(kind, prefix)]
    return "\n".join(rows) + "\n"


def _rows(kind: Any, prefix: str) -> Iterator[str]:
    """One row per key; the keys of a nested section follow as keys of their own."""
    hints = get_type_hints(kind)
    meanings = {entry.arg_name: entry.description or "" for entry in docstring_parser.parse_from_object(kind).params}
    for field in fields(kind):
        key, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            yield from _rows(hint, f"{key}.")
            continue
        cells = (f"`{key}`", _value(hint, key), _default(field), " ".join(meanings[field.name].split()))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _entry_tables(name: str, kind: Any) -> Iterator[str]:
    """A table for each kind of entry that the section's lists hold."""
    lists: dict[Any, list[str]] = {}
    for field_name, hint in get_type_hints(kind).items():
        if get_origin(hint) is list:
            lists.setdefault(get_args(hint)[0], []).append(f"`{name}.{field_name}`")
    for entry, keys in lists.items():
        yield f"\nAn entry of {' and of '.join(keys)}: {_summary(entry)[0].lower()}{_summary(entry)[1:]}\n\n"
        yield _table(entry, "")


def _value(hint: Any, key: str) -> str:
    """What may stand there, in words."""
    limits = [words for words, keys in RANGES if key in keys]
    limits += OTHER_LIMITS.get(key, [])
    return ", ".join([_type_name(hint), *limits])


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(hint))
    if get_origin(hint) is list:
        return "list of entries, see below"
    return TYPE_NAMES[hint]


def _default(field: "Field[Any]") -> str:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is MISSING:
        return "required"
    if isinstance(default, list):
        return ", ".join(f"`{_entry(item)}`" for item in default) or "`[]`"
    words = {None: "null", True: "true", False: "false"}
    text = words[default] if default is None or isinstance(default, bool) else str(default)
    return f"`{text}`"


def _entry(item: Any) -> str:
    """An entry of a list with the values that are set."""
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None) + "}"


if __name__ == "__main__":
    print(page(), end="")
