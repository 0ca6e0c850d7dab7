"""Perplexity of a loss, whatever the loss is, and what is shown of figures that may not be finite."""

import math
import sys

LARGEST_EXPONENT = math.log(sys.float_info.max)


def perplexity_of(loss: float) -> float:
    """exp(loss [nats per token]); infinite where that is too large for a float."""
    return math.inf if loss >= LARGEST_EXPONENT else math.exp(loss)


def shown(value: float | None, form: str) -> str:
    """A figure of metrics.jsonl in a format; None is one that was no finite number."""
    return "not finite" if value is None else format(value, form)
