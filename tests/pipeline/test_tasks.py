"""Tasks in this process, and results put in order."""

import itertools
import random

import pytest

from onnx_spdy.pipeline.tasks import IN_PROCESS, in_order


def test_tasks_here_are_done_in_order_and_only_when_their_result_is_asked_for() -> None:
    done: list[int] = []

    def double(shared: list[int], item: int) -> int:
        shared.append(item)
        return 2 * item

    results = IN_PROCESS.map(double, done, itertools.count())
    assert done == []
    assert [next(results) for _ in range(3)] == [(0, 0), (1, 2), (2, 4)]
    assert done == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_results_come_in_order_whoever_is_done_first(seed: int) -> None:
    results = list(enumerate("abcdefgh"))
    random.Random(seed).shuffle(results)
    assert "".join(in_order(results)) == "abcdefgh"
    assert list(in_order([])) == []


def test_what_is_first_is_not_held_back_by_what_comes_late() -> None:
    def results():
        yield 0, "a"
        raise ValueError

    ordered = in_order(results())
    assert next(ordered) == "a"
    with pytest.raises(ValueError):
        next(ordered)
