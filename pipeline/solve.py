"""The solver: one level for each layer, least total error within a time budget.

A layer may cost more where the layer that it reads from runs dense: an engine then converts layouts between
the kernels. So the dynamic programme carries, beside the time spent, which of the layers that are still to be read
run dense; in a chain that is one bit, with skip connections a few.

It is exact for times rounded *up* to whole buckets. Rounding takes up to a bucket from each layer, so choices of some
buckets more than the budget has are looked at too, and the best one is taken whose times, not rounded, fit: a choice
never exceeds the budget by the table. `error_bounds` tells how far from the exact optimum that is at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

BUCKETS = 10_000
_FINEST = 100  # how far the buckets are refined when only the rounding makes a target impossible
NONE_BEFORE = -1


class InfeasibleTarget(ValueError):
    """The fastest profile is still too slow."""


@dataclass(frozen=True)
class Costs:
    """Times of layers x levels, and what the kernel of one layer costs the next.

    Attributes:
        seconds: (layers, levels), >= 0; level 0 is dense.
        entry: (layers, levels), seconds more, or less, where the layer before runs dense; never more than
            `seconds` less. Default: none.
        before: (layers,) index of the layer before: an earlier one, or NONE_BEFORE. Default: none.
        dense: (layers, levels) bool, which levels run dense. Default: level 0.

    >>> costs = Costs(np.array([[3.0, 1.0], [3.0, 1.0]]), np.array([[0.0, 0.0], [0.0, 0.5]]), np.array([-1, 0]))
    >>> costs.total([0, 1]), costs.total([1, 1])
    (4.5, 2.0)
    """

    seconds: np.ndarray
    entry: np.ndarray = None  # type: ignore[assignment]  # these three are set below
    before: np.ndarray = None  # type: ignore[assignment]
    dense: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raise ValueError where shapes differ, or a number is NaN, infinite or a negative time."""
        seconds = np.asarray(self.seconds, np.float64)
        if seconds.ndim != 2 or 0 in seconds.shape:
            raise ValueError(f"seconds {seconds.shape} must be (layers, levels), not empty")
        entry = np.zeros_like(seconds) if self.entry is None else np.asarray(self.entry, np.float64)
        before = np.full(len(seconds), NONE_BEFORE) if self.before is None else np.asarray(self.before, np.int64)
        first = np.broadcast_to(np.arange(seconds.shape[1]) == 0, seconds.shape)
        dense = first if self.dense is None else np.asarray(self.dense, bool)
        if not entry.shape == dense.shape == seconds.shape or before.shape != seconds.shape[:1]:
            raise ValueError(
                f"entry {entry.shape}, before {before.shape} and dense {dense.shape} don't fit seconds {seconds.shape}"
            )
        if not (np.isfinite(seconds).all() and np.isfinite(entry).all()):
            raise ValueError("seconds must be finite; measure the table again")
        if (seconds < 0).any() or (seconds + entry < 0).any():
            raise ValueError("seconds must not be negative; measure the table again")
        if ((before < NONE_BEFORE) | (before >= np.arange(len(before)))).any():
            raise ValueError(f"before {before.tolist()} must name an earlier layer, or {NONE_BEFORE}")
        for name, value in (("seconds", seconds), ("entry", entry), ("before", before), ("dense", dense)):
            object.__setattr__(self, name, value)

    def of_layers(self, choice: np.ndarray | Sequence[int]) -> np.ndarray:
        """(layers,) seconds of each layer at these level indices, (layers,)."""
        chosen = np.asarray(choice)
        rows = np.arange(len(self.seconds))
        after_dense = (self.before != NONE_BEFORE) & self.dense[rows, chosen][self.before]
        return self.seconds[rows, chosen] + after_dense * self.entry[rows, chosen]

    def total(self, choice: np.ndarray | Sequence[int]) -> float:
        """Seconds of all layers together at these level indices, (layers,)."""
        return float(self.of_layers(choice).sum())

    def fastest(self, errors: np.ndarray | None = None) -> np.ndarray:
        """(layers,) the levels that take least time together; of equally fast ones those with less of `errors`."""
        errors = np.zeros_like(self.seconds) if errors is None else errors
        best = [np.zeros(1)]  # of each layer: (states,) least seconds until it
        for layer, step in enumerate(self.steps):
            reached = best[-1][:, None] + self.by_state(layer)
            values = np.full(step.states, np.inf)
            np.minimum.at(values, step.following, reached)
            best.append(values)
        choice = np.empty(len(self.seconds), np.int64)
        state = int(best[-1].argmin())
        for layer in reversed(range(len(choice))):
            reached = best[layer][:, None] + self.by_state(layer)
            optimal = (self.steps[layer].following == state) & (reached == best[layer + 1][state])
            found = np.unravel_index(np.where(optimal, errors[layer], np.inf).argmin(), reached.shape)
            state, choice[layer] = map(int, found)
        return choice

    def by_state(self, layer: int) -> np.ndarray:
        """(states before the layer, levels) seconds of a layer."""
        return self.seconds[layer] + self.steps[layer].after_dense[:, None] * self.entry[layer]

    @cached_property
    def steps(self) -> list[_Step]:
        """How the state goes on from layer to layer."""
        steps: list[_Step] = []
        awaited: list[int] = []  # layers whose kind a later layer asks for: bit i of a state is awaited[i]
        for layer, source in enumerate(self.before):
            states = np.arange(2 ** len(awaited))
            bits = {one: states >> number & 1 for number, one in enumerate(awaited)}
            after_dense = bits[source] if source in bits else np.zeros_like(states)
            awaited = [one for one in (*awaited, layer) if one in self.before[layer + 1 :]]
            following = np.zeros((len(states), self.seconds.shape[1]), np.int64)
            for number, one in enumerate(awaited):
                following |= (self.dense[layer][None, :] if one == layer else bits[one][:, None]) << number
            steps.append(_Step(after_dense, following, 2 ** len(awaited)))
        return steps


@dataclass(frozen=True)
class _Step:
    """One layer of the dynamic programme.

    Attributes:
        after_dense: (states before,) 1 where the layer before runs dense, else 0.
        following: (states before, levels) the state after the layer.
        states: how many there are after it.
    """

    after_dense: np.ndarray
    following: np.ndarray
    states: int


def solve(errors: np.ndarray, costs: Costs, budget_seconds: float, buckets: int = BUCKETS) -> np.ndarray:
    """Choose one level for each layer: least total error within the time budget.

    A choice never exceeds the budget by the table. Among choices of equal error the faster level of the later layer
    is taken.

    Args:
        errors: (layers, levels), additive, lower is better.
        costs: times of the same layers and levels.
        budget_seconds: time for all these layers together.
        buckets: resolution of time.
    Returns:
        (layers,) index of the chosen level.
    Raises:
        InfeasibleTarget: the fastest profile is still too slow; the message gives both numbers.
        ValueError: shapes differ, or an error is NaN or infinite.

    >>> solve(np.array([[0.0, 1.0], [0.0, 5.0]]), Costs(np.array([[3.0, 1.0], [3.0, 1.0]])), 4.0)
    array([1, 0])

    Source: Frantar & Alistarh, SPDY (ICML 2022), Algorithm 1; the states are ours.
    """
    errors = np.asarray(errors, np.float64)
    if errors.shape != costs.seconds.shape:
        raise ValueError(f"errors {errors.shape} and seconds {costs.seconds.shape} must both be (layers, levels)")
    if not np.isfinite(errors).all():
        raise ValueError("errors must be finite; build the database again")
    fastest = costs.fastest(errors)
    if not costs.total(fastest) <= budget_seconds:
        raise InfeasibleTarget(
            f"the budget is {budget_seconds:.6g} s, but the fastest profile takes {costs.total(fastest):.6g} s"
        )
    refined = buckets
    while refined <= buckets * _FINEST:
        if (choice := _solve_rounded(errors, costs, budget_seconds, refined)) is not None:
            return choice
        refined *= 10
    return fastest  # within a millionth of it: nothing else fits


def error_bounds(
    errors: np.ndarray, costs: Costs, budget_seconds: float, buckets: int = 100 * BUCKETS
) -> tuple[float, float]:
    """Least total error within the budget, from below and from above; the optimum of `solve` lies between.

    From below: with times rounded down to whole buckets every choice that fits still fits, so the optimum of those is
    no worse than the exact one. From above: what `solve` finds with a tenth of the buckets.

    Args:
        errors, costs, budget_seconds: see `solve`.
        buckets: the more, the closer the bounds are together, and the longer it takes.
    """
    rounded = _rounded(costs, budget_seconds, buckets, np.floor)
    (last,) = deque(_rows(np.asarray(errors, np.float64), costs, rounded, buckets), maxlen=1)
    lower = float(last[0, -1])
    choice = solve(errors, costs, budget_seconds, max(1, buckets // 10))
    return lower, float(errors[np.arange(len(errors)), choice].sum())


def _solve_rounded(errors: np.ndarray, costs: Costs, budget: float, buckets: int) -> np.ndarray | None:
    """The best choice that fits among the optima for times rounded up and capacities of some buckets more.

    None when the rounding leaves no choice at all within the budget itself.
    """
    rounded = _rounded(costs, budget, buckets, np.ceil)
    best = list(_rows(errors, costs, rounded, buckets + len(errors)))
    if np.isinf(best[-1][0, buckets]):
        return None
    values = best[-1][0, buckets:]  # falls with the capacity; each step is another choice
    steps = np.flatnonzero(np.r_[False, values[1:] < values[:-1]])
    choice = _backtrack(best, errors, costs, rounded, buckets)
    least, most = 0, len(steps)
    while least < most:  # the more surplus, the less likely it is that the choice fits
        middle = (least + most) // 2
        wider = _backtrack(best, errors, costs, rounded, buckets + int(steps[middle]))
        if costs.total(wider) <= budget:
            choice, least = wider, middle + 1
        else:
            most = middle
    return choice


def _rounded(
    costs: Costs, budget: float, buckets: int, rounding: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Of each layer (states before it, levels) times in buckets, of which the budget has `buckets`."""
    scale = buckets / budget if budget > 0 else 0.0
    most = 2 * buckets + len(costs.seconds)  # more than any capacity
    return [
        np.minimum(rounding(costs.by_state(layer) * scale), most).astype(np.int64)
        for layer in range(len(costs.seconds))
    ]


def _rows(errors: np.ndarray, costs: Costs, rounded: list[np.ndarray], capacity: int) -> Iterator[np.ndarray]:
    """For l = 0, 1, ... best[s, b]: least error of layers < l that end in state s with total cost <= b <= capacity."""
    # Backtracking recomputes the same sums instead of storing the choices: two vectorised passes for each level
    # are all that the inner loop does.
    useful = _undominated(errors, costs)
    best = np.zeros((1, capacity + 1))
    yield best
    scratch = np.empty(capacity + 1)
    for layer, step in enumerate(costs.steps):
        values = np.full((step.states, capacity + 1), np.inf)
        for state, level in product(range(len(step.following)), np.flatnonzero(useful[layer])):
            reach = capacity + 1 - rounded[layer][state, level]
            if reach > 0:
                candidate = np.add(best[state, :reach], errors[layer, level], out=scratch[:reach])
                row = values[step.following[state, level], capacity + 1 - reach :]
                np.minimum(row, candidate, out=row)
        best = values
        yield best


def _undominated(errors: np.ndarray, costs: Costs) -> np.ndarray:
    """(layers, levels) bool: no other level with the same kind of kernel is as good and as fast in every state."""
    quantities = (errors, costs.seconds, costs.seconds + costs.entry)
    differences = [values[:, :, None] - values[:, None, :] for values in quantities]  # (layers, other, level)
    no_worse = np.logical_and.reduce([one <= 0 for one in differences])
    levels = np.arange(errors.shape[1])
    better = np.logical_or.reduce([one < 0 for one in differences]) | (levels[:, None] < levels)  # of equals the first
    same_kind = costs.dense[:, :, None] == costs.dense[:, None, :]
    return ~(no_worse & better & same_kind).any(axis=1)


def _backtrack(
    best: list[np.ndarray], errors: np.ndarray, costs: Costs, rounded: list[np.ndarray], bucket: int
) -> np.ndarray:
    choice = np.empty(len(errors), np.int64)
    state = 0  # after the last layer nothing is awaited
    for layer in reversed(range(len(errors))):
        left = bucket - rounded[layer]  # (states before, levels)
        states = np.arange(len(left))[:, None]
        reached = np.where(left >= 0, best[layer][states, np.maximum(left, 0)] + errors[layer], np.inf)
        optimal = (costs.steps[layer].following == state) & (reached == best[layer + 1][state, bucket])
        found = np.unravel_index(np.where(optimal, rounded[layer], np.inf).argmin(), left.shape)
        state, choice[layer] = map(int, found)
        bucket = left[state, choice[layer]]
    return choice
