"""Recipes as YAML that every reader of recipes reads alike."""

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml


class _RecipeDumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 takes for text and other readers, config_parsing.py among them, for a number: 3e-4, 1.e3."""


_RecipeDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[\d_]*\.?[\d_]*([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def recipe_text(values: Mapping[str, Any], one_line: bool = False) -> str:
    """Plain nested values as YAML, in their order.

    Args:
        values: of a recipe, or of a part of one.
        one_line: `{key: value, ...}` in place of a line per key.
    """
    return yaml.dump(
        values,
        Dumper=_RecipeDumper,
        default_flow_style=one_line,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
    )
