"""Perplexity of a loss, whatever the loss is."""

import math
import sys

LARGEST_EXPONENT = math.log(sys.float_info.max)


def perplexity_of(loss: float) -> float:
    """exp(loss [nats per token]); infinite where that is too large for a float."""
    return math.inf if loss >= LARGEST_EXPONENT else math.exp(loss)
