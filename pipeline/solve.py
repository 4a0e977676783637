"""The solver: one level for each layer, least total error within a time budget.

The dynamic programme is exact for times rounded *up* to whole buckets, so a choice never exceeds the
budget by the table; with 10,000 buckets the rounding costs at most layers/10,000 of the budget.
"""

from __future__ import annotations

import numpy as np

BUCKETS = 10_000
_FINEST = 100  # how far the buckets are refined when only the rounding makes a target impossible


class InfeasibleTarget(ValueError):
    """The fastest level of every layer together is still too slow."""


def solve(errors: np.ndarray, seconds: np.ndarray, budget_seconds: float, buckets: int = BUCKETS) -> np.ndarray:
    """Choose one level for each layer: least total error within the time budget.

    Times are rounded up to whole buckets, so a choice never exceeds the budget by the table. Among choices of
    equal error the faster level of the later layer is taken.

    Args:
        errors: (layers, levels), additive, lower is better.
        seconds: (layers, levels), time of each layer at each level, >= 0.
        budget_seconds: time for all these layers together.
        buckets: resolution of time.
    Returns:
        (layers,) index of the chosen level.
    Raises:
        InfeasibleTarget: the fastest level of every layer together is still too slow; the message gives both numbers.
        ValueError: shapes differ, or a number is NaN, infinite or a negative time.

    >>> solve(np.array([[0.0, 1.0], [0.0, 5.0]]), np.array([[3.0, 1.0], [3.0, 1.0]]), 4.0)
    array([1, 0])

    Source: Frantar & Alistarh, SPDY (ICML 2022), Algorithm 1.
    """
    errors, seconds = _checked(errors, seconds)
    fastest = seconds.min(axis=1).sum()
    if not fastest <= budget_seconds:
        raise InfeasibleTarget(
            f"the budget is {budget_seconds:.6g} s, but the fastest level of every layer together takes {fastest:.6g} s"
        )
    refined = buckets
    while refined <= buckets * _FINEST:
        if (choice := _solve_rounded(errors, seconds, budget_seconds, refined)) is not None:
            return choice
        refined *= 10
    return _fastest(errors, seconds)  # within a millionth of the fastest: nothing else fits


def _checked(errors: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    errors, seconds = np.asarray(errors, np.float64), np.asarray(seconds, np.float64)
    if errors.ndim != 2 or errors.shape != seconds.shape or 0 in errors.shape:
        raise ValueError(f"errors {errors.shape} and seconds {seconds.shape} must both be (layers, levels), not empty")
    if not (np.isfinite(errors).all() and np.isfinite(seconds).all() and (seconds >= 0).all()):
        raise ValueError("errors and seconds must be finite, and seconds not negative; measure the table again")
    return errors, seconds


def _fastest(errors: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The fastest level of each layer; of equally fast ones the one with least error."""
    tied = seconds == seconds.min(axis=1, keepdims=True)
    return np.where(tied, errors, np.inf).argmin(axis=1)


def _solve_rounded(errors: np.ndarray, seconds: np.ndarray, budget: float, buckets: int) -> np.ndarray | None:
    """The exact optimum for times rounded up to budget / buckets; None when the rounding leaves no choice."""
    cost = np.ceil(seconds * (buckets / budget)) if budget > 0 else np.zeros_like(seconds)
    if cost.min(axis=1).sum() > buckets:
        return None
    cost = np.minimum(cost, buckets + 1).astype(np.int64)
    layers = len(errors)
    # best[l, b]: least error of layers < l with total cost <= b. Backtracking recomputes the same sums instead
    # of storing the choices: two vectorised passes for each level are all that the inner loop does.
    best = np.full((layers + 1, buckets + 1), np.inf)
    best[0] = 0.0
    scratch = np.empty(buckets + 1)
    for layer in range(layers):
        for level in range(errors.shape[1]):
            reach = buckets + 1 - cost[layer, level]
            if reach > 0:
                candidate = np.add(best[layer, :reach], errors[layer, level], out=scratch[:reach])
                row = best[layer + 1, buckets + 1 - reach :]
                np.minimum(row, candidate, out=row)
    return _backtrack(best, errors, cost)


def _backtrack(best: np.ndarray, errors: np.ndarray, cost: np.ndarray) -> np.ndarray:
    choice = np.empty(len(errors), np.int64)
    bucket = best.shape[1] - 1
    for layer in reversed(range(len(errors))):
        before = bucket - cost[layer]  # (levels,)
        reached = np.where(before >= 0, best[layer, np.maximum(before, 0)] + errors[layer], np.inf)
        optimal = np.flatnonzero(reached == best[layer + 1, bucket])
        choice[layer] = optimal[cost[layer, optimal].argmin()]
        bucket = before[choice[layer]]
    return choice
