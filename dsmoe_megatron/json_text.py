"""JSON as every reader takes it: figures that are no finite numbers, which JSON has not, are null."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """A value of mappings, lists, text and numbers as JSON, NaN and infinities as null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {key: _finite(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return value
