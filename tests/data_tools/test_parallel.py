"""The ordered map over processes."""

import os
import time
from collections.abc import Iterator

import pytest

from data_tools.parallel import BUFFERED_PER_WORKER, WorkerError, ordered_map
from dsmoe_megatron.errors import DataError


def slow_at_first(item: int) -> int:
    time.sleep(0.2 if item == 0 else 0)
    return item * item


def fail_at_three(item: int) -> int:
    if item == 3:
        raise ZeroDivisionError("three")
    return item


def die_at_three(item: int) -> int:
    if item == 3:
        os._exit(9)
    return item


@pytest.mark.parametrize(("workers", "items"), [(1, 40), (3, 40), (2, 1), (2, 0)])
def test_order_is_kept(workers: int, items: int) -> None:
    assert list(ordered_map(slow_at_first, range(items), workers)) == [i * i for i in range(items)]


def test_items_that_come_slower_than_the_work_are_all_done() -> None:
    def items() -> Iterator[int]:
        for item in range(5):
            time.sleep(0.05)
            yield item
        time.sleep(0.5)  # every worker is idle when the end comes

    assert list(ordered_map(slow_at_first, items(), workers=2)) == [i * i for i in range(5)]


def test_only_a_few_items_are_held() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for item in range(1000):
            taken += 1
            yield item

    results = ordered_map(slow_at_first, items(), workers=2)
    for yielded in range(1, 100):
        next(results)
        assert taken <= yielded + 2 * BUFFERED_PER_WORKER
    results.close()  # type: ignore[attr-defined]


def test_an_error_in_a_worker_arrives_with_its_traceback() -> None:
    with pytest.raises(WorkerError, match=r"fail_at_three[\s\S]*ZeroDivisionError: three"):
        list(ordered_map(fail_at_three, range(9), workers=2))


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match="killed"):
        list(ordered_map(die_at_three, range(9), workers=2))
