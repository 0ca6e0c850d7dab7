"""Ranges of an array as boxes: exactly the range, in its order, in few boxes."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_megatron.training.optimizer_shards import boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_boxes_are_the_range(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    begin, end = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))
    array = np.arange(size).reshape(shape)

    found = list(boxes(shape, begin, end))

    places = [tuple(slice(at, at + width) for at, width in zip(*box, strict=True)) for box in found]
    values = [value for place in places for value in array[place].reshape(-1).tolist()]
    assert values == list(range(begin, end))
    assert len(found) <= 2 * len(shape) - 1
