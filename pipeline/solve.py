"""The solver: one level for each layer, least total error within a time budget.

A layer may cost more where the layer that it reads from runs dense: an engine then converts layouts between
the kernels. So the dynamic programme carries, beside the time spent, which of the layers that are still to be read
run dense; in a chain that is one bit, with skip connections a few.

It is exact for times rounded *up* to whole buckets. Rounding takes up to a bucket from each layer, so choices of some
buckets more than the budget has are looked at too, and the best one is taken whose times, not rounded, fit: a choice
never exceeds the budget by the table. `error_bounds` tells how far from the exact optimum that is at most.

Where widths multiply, the same programme is solved for sums that stand for the products, in a few steps. The budget
still holds. The choice is the optimum most of the time, but nothing says so: tests compare it with all choices of small
problems (exact: a chain carries the width of the layer before as its state, and takes as many times longer as there are
widths).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from onnx_spdy.pipeline.costs import Costs, InvalidCosts
from onnx_spdy.runtimes.errors import OnnxSpdyError

BUCKETS = 10_000
_LINEAR_STEPS, _MOST_STEPS = 3, 12  # towards the solution where widths multiply
_FINEST = 100  # how far the buckets are refined when only the rounding makes a target impossible


class InfeasibleTarget(OnnxSpdyError, ValueError):
    """The fastest profile is still too slow."""


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
        InvalidCosts: shapes differ, or an error is NaN or infinite.

    >>> solve(np.array([[0.0, 1.0], [0.0, 5.0]]), Costs(np.array([[3.0, 1.0], [3.0, 1.0]])), 4.0)
    array([1, 0])

    Source: Frantar & Alistarh, SPDY (ICML 2022), Algorithm 1; the states are ours.
    """
    errors = np.asarray(errors, np.float64)
    if errors.shape != costs.seconds.shape:
        raise InvalidCosts(f"errors {errors.shape} and seconds {costs.seconds.shape} must both be (layers, levels)")
    if not np.isfinite(errors).all():
        raise InvalidCosts("errors must be finite; build the database again")
    fastest = costs.fastest(errors)
    if not costs.total(fastest) <= budget_seconds:
        raise InfeasibleTarget(
            f"the budget is {budget_seconds:.6g} s, but the fastest profile takes {costs.total(fastest):.6g} s"
        )
    if not costs.products:
        return _solve_apart(errors, costs, budget_seconds, buckets, fastest)
    return _solve_products(errors, costs, budget_seconds, buckets, fastest)


def _solve_products(errors: np.ndarray, costs: Costs, budget: float, buckets: int, fastest: np.ndarray) -> np.ndarray:
    """Step by step: first with linear products, which may break the budget, then with sums that bound them from above.

    The bound is exact where the step before ended, so that choice is among the candidates and no step does worse. It
    only needs a good place to begin. Coarse buckets do until the last step. At the end what is left of the budget is
    given back layer by layer.
    """
    coarse = max(1, buckets // 10)
    choice = np.zeros_like(fastest)
    for _ in range(_LINEAR_STEPS):
        linear, constant = costs.linear_at(choice)
        least = linear.fastest(errors)
        if linear.total(least) > budget - constant:
            break
        choice = _solve_apart(errors, linear, budget - constant, coarse, least)
    best, steps = fastest, [buckets, *[coarse] * _MOST_STEPS]
    while steps:
        found = _bounded(errors, costs, budget, steps.pop(), choice)
        if found is not None and total_error(errors, found) < total_error(errors, best):
            best = choice = found
        elif len(steps) > 1:  # nothing more is to be gained with coarse ones
            choice, steps = best, steps[:1]
    return given_back(errors, best, lambda choice: costs.total(choice) <= budget)


def _bounded(errors: np.ndarray, costs: Costs, budget: float, buckets: int, around: np.ndarray) -> np.ndarray | None:
    """The optimum for the sums that bound the products, closely around a choice; None where nothing fits so."""
    bound = costs.apart_at(around)
    fastest = bound.fastest(errors)
    return _solve_apart(errors, bound, budget, buckets, fastest) if bound.total(fastest) <= budget else None


def total_error(errors: np.ndarray, choice: np.ndarray) -> float:
    """The sum of the layers' errors at these level indices."""
    return float(errors[np.arange(len(errors)), choice].sum())


def given_back(errors: np.ndarray, choice: np.ndarray, fits: Callable[[np.ndarray], bool]) -> np.ndarray:
    """A choice that fits, improved one layer at a time as long as that is possible."""
    choice = choice.copy()
    while True:
        gains = errors[np.arange(len(errors)), choice][:, None] - errors  # (layers, levels)
        for flat in np.argsort(-gains, axis=None):
            layer, level = divmod(int(flat), errors.shape[1])
            if gains[layer, level] <= 0:
                return choice
            before, choice[layer] = choice[layer], level
            if fits(choice):
                break
            choice[layer] = before


def _solve_apart(errors: np.ndarray, costs: Costs, budget: float, buckets: int, fastest: np.ndarray) -> np.ndarray:
    """The solution where nothing multiplies; `fastest` fits."""
    refined = buckets
    while refined <= buckets * _FINEST:
        if (choice := _solve_rounded(errors, costs, budget, refined)) is not None:
            return choice
        refined *= 10
    return fastest  # within a millionth of it: nothing else fits


def error_bounds(
    errors: np.ndarray, costs: Costs, budget_seconds: float, buckets: int = 100 * BUCKETS
) -> tuple[float, float]:
    """Least total error within the budget, from below and from above; the optimum of `solve` lies between.

    From below: with times rounded down to whole buckets every choice that fits still fits, so the optimum of those is
    no worse than the exact one. From above: what `solve` finds with a tenth of the buckets. Where widths multiply the
    lower bound is a loose one.

    Args:
        errors, costs, budget_seconds: see `solve`.
        buckets: the more, the closer the bounds are together, and the longer it takes.
    """
    lower = -np.inf
    for linear, constant in costs.linear_below():
        rounded = _rounded(linear, budget_seconds - constant, buckets, np.floor)
        (last,) = deque(_rows(np.asarray(errors, np.float64), linear, rounded, buckets), maxlen=1)
        lower = max(lower, float(last[0, -1]))
    choice = solve(errors, costs, budget_seconds, max(1, buckets // 10))
    return lower, total_error(errors, choice)


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
    quantities = (errors, costs.seconds, costs.seconds + costs.transition)
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
