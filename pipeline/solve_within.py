"""The solver for several devices: one level for each layer, least total error within the time budget of each.

Any weighted sum of what the devices may take is a budget that every allowed choice keeps. The best choice for such a
sum is therefore no worse than the best allowed one; where it keeps each device's own budget too, it is the optimum (a
surrogate relaxation: Glover, Operations Research 16, 1968). So weights are sought for which it does: those of devices
that it takes too long on grow. Where there are none, because nothing lies between two choices, the sum is tightened
until the choice fits, and what is left is given back layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.costs import Costs, weighted_sum
from onnx_spdy.pipeline.solve import BUCKETS, InfeasibleTarget, given_back, solve, total_error

_ROUNDS = 12  # of weights
_FIRST_STEP, _SHRINKING = 1.5, 0.75  # of their logarithms
_LEAST_SECONDS = 1e-12  # of a budget: where only what takes no time at all fits
_HALVINGS = 8  # towards the loosest sum whose choice fits


@dataclass(frozen=True)
class Limit:
    """Time that layers may take on one device.

    Attributes:
        costs: times of layers x levels there.
        seconds: for all these layers together.
    """

    costs: Costs
    seconds: float

    def share(self, choice: np.ndarray) -> float:
        """What a choice takes of the budget: 1 for all of it."""
        taken = self.costs.total(choice)
        return taken / self.seconds if self.seconds > 0 else (np.inf if taken > self.seconds else 1.0)


def share(limits: Sequence[Limit], choice: np.ndarray) -> float:
    """What a choice takes of the budget of the device where that is most."""
    return max(one.share(choice) for one in limits)


def solve_within(errors: np.ndarray, limits: Sequence[Limit], buckets: int = BUCKETS) -> np.ndarray:
    """Choose one level for each layer: least total error within every limit.

    For one limit as `solve`. For several the choice keeps them all; it is the optimum wherever some weighted sum of
    them has the same one, and near it elsewhere.

    Args:
        errors: (layers, levels), additive, lower is better.
        limits: at least one; all of the same layers and levels.
        buckets: resolution of time.
    Returns:
        (layers,) index of the chosen level.
    Raises:
        InfeasibleTarget: the fastest profile is still too slow, or none was found that is fast enough on every device.
        InvalidCosts: shapes differ, or an error is NaN or infinite.
    """
    if len(limits) == 1:
        return solve(errors, limits[0].costs, limits[0].seconds, buckets)
    errors, weights = np.asarray(errors, np.float64), np.full(len(limits), 1 / len(limits))
    tightest, nearest = np.inf, weights
    for number in range(_ROUNDS):
        try:
            choice = solve(errors, _joint(limits, weights), 1.0, buckets)
        except InfeasibleTarget:
            break
        shares = np.array([one.share(choice) for one in limits])
        if shares.max() <= 1:
            return choice
        if shares.max() < tightest:
            tightest, nearest = shares.max(), weights
        weights = _moved(weights, shares, number)
    return given_back(errors, _tightened(errors, limits, nearest, buckets), lambda choice: share(limits, choice) <= 1)


def fastest(limits: Sequence[Limit], errors: np.ndarray | None = None) -> np.ndarray:
    """(layers,) levels that take a small share of every limit: of the fastest ones for sums of limits, the one whose
    largest share is least. Where one choice is the fastest everywhere, that one."""
    weights = np.full(len(limits), 1 / len(limits))
    best: np.ndarray | None = None
    for number in range(_ROUNDS if len(limits) > 1 else 1):
        choice = _joint(limits, weights).fastest(errors)
        shares = np.array([one.share(choice) for one in limits])
        if best is None or shares.max() < share(limits, best):
            best = choice
        weights = _moved(weights, shares, number)
    assert best is not None, "there is at least one round"
    return best


def _moved(weights: np.ndarray, shares: np.ndarray, number: int) -> np.ndarray:
    """Weights with more for what took too long, in ever smaller steps."""
    span = np.ptp(shares)
    if span == 0:
        return weights
    logs = np.log(weights) + _FIRST_STEP * _SHRINKING**number * (shares - shares.mean()) / span
    found = np.exp(logs - logs.max())
    return np.asarray(found / found.sum())


def _joint(limits: Sequence[Limit], weights: np.ndarray) -> Costs:
    """The weighted sum of what is taken of each limit."""
    shares = [weight / max(one.seconds, _LEAST_SECONDS) for weight, one in zip(weights, limits, strict=True)]
    return weighted_sum([one.costs for one in limits], shares)


def _tightened(errors: np.ndarray, limits: Sequence[Limit], weights: np.ndarray, buckets: int) -> np.ndarray:
    """The choice for the loosest sum that keeps every limit."""
    joint = _joint(limits, weights)
    found = fastest(limits, errors)
    if share(limits, found) > 1:
        raise InfeasibleTarget(
            f"no profile was found that is fast enough on all {len(limits)} devices: on one the fastest takes "
            f"{share(limits, found):.4g} times as long as it may"
        )
    low, high = joint.total(joint.fastest(errors)), 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        try:
            choice = solve(errors, joint, middle, buckets)
        except InfeasibleTarget:  # by rounding
            low = middle
            continue
        if share(limits, choice) <= 1:
            low = middle
            if total_error(errors, choice) < total_error(errors, found):
                found = choice
        else:
            high = middle
    return found
