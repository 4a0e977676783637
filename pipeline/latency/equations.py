"""From profiles of mixed networks to the seconds of every site at every level: the equations that all kinds of levels
share.

The engine is asked for its own profile of networks whose sites are at random levels, and each row of a profile is one
linear equation; the time of a whole network, measured in turns with the dense one, is another. What the unknowns are
depends on the kind of level: `fit_zeros.py` and `fit_widths.py` say. All equations together are solved by regularised
least squares: what is believed before says that a site's levels lie on a smooth curve, so a cell rests on its
neighbours too, and one that was measured too fast by luck is pulled back. That is what keeps a search from choosing
such cells.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np

from onnx_spdy.pipeline.costs import Costs, Product

Part = TypeVar("Part")  # what the rows of a profile are put together into

ROW_NOISE = 0.1  # relative standard deviation of a row
DENSE_NOISE = 0.002  # of the dense network's time, which is the unit
RESOLUTION_SECONDS = 3e-6  # of an engine's rows: some come in whole microseconds
RESOLUTION = 1e-3  # of the network's time, where that is less
KNOTS = 12  # levels whose seconds are unknowns; between them seconds are linear
BEND = 0.03  # of a site's typical time: how much its curve bends at a knot
STEP = 1.0  # and how much it changes from knot to knot
LEAST_SHARE = 0.01  # of its dense time: no site is free, whatever noise says
ROBUST = 6.0  # standard deviations from which on an equation counts less (Cauchy weights)
RIDGE = 1e-9  # of each unknown's weight in the equations
PASSES = 8


@dataclass(frozen=True)
class Row:
    """One row of a profile.

    Attributes:
        outputs: names of the tensors in it.
        seconds: its time, and that of rows before it that belong to no tensor.
    """

    outputs: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A network whose sites are at these levels, as it was measured.

    Attributes:
        choice: (sites,) level indices.
        rows: of the engine's profile, in the order in which they ran.
        unnamed_seconds: of the rows after the last one of a tensor.
        relative: seconds of the whole network / those of the dense one, measured in turns.
        noise: relative standard deviation of that.
    """

    choice: tuple[int, ...]
    rows: tuple[Row, ...]
    unnamed_seconds: float
    relative: float
    noise: float


@dataclass(frozen=True)
class Fit:
    """The solution.

    Attributes:
        seconds: (sites, levels), never more for a higher level in the same kind of kernel.
        transition: (sites, levels), more where the predecessor runs dense.
        predecessor: (sites,) index of the site that each one reads from, or NO_PREDECESSOR.
        sparse: (sites, levels) bool, whether the engine takes a sparse kernel.
        spread: (sites, levels), relative standard deviation of `seconds`.
        rest: seconds of each tensor that belongs to no site.
        rest_seconds: outside the sites.
        products: what several sites take together.
        dense_seconds: of the dense network, where that is none of these: where all of them are in int8.
    """

    seconds: np.ndarray
    transition: np.ndarray
    predecessor: np.ndarray
    sparse: np.ndarray
    spread: np.ndarray
    rest: Mapping[str, float]
    rest_seconds: float
    products: tuple[Product, ...] = ()
    dense_seconds: float | None = None

    @cached_property
    def costs(self) -> Costs:
        """The times of the sites, for the solver."""
        return Costs(self.seconds, self.transition, self.predecessor, ~self.sparse, self.products)

    def relative(self, choice: np.ndarray) -> float:
        """Seconds of the network with these level indices, (sites,) / those of the dense one."""
        dense = self.dense_seconds
        if dense is None:
            dense = self.rest_seconds + self.costs.total(np.zeros(len(self.seconds), np.int64))
        return (self.rest_seconds + self.costs.total(choice)) / dense


@dataclass(frozen=True)
class Equations:
    """What was measured, in terms of some unknowns.

    Attributes:
        rows: of each trial (rows, unknowns), what of them is in each row of its profile.
        row_seconds: of each trial (rows,).
        totals: (trials, unknowns), what of them is in each network.
        relative: (trials,) seconds of each network / those of the dense one.
        noise: (trials,) relative standard deviation of that.
        beliefs: (beliefs, unknowns), what is believed to be 0, with a standard deviation of 1.
        dense_seconds: of the whole dense network.
    """

    rows: Sequence[np.ndarray]
    row_seconds: Sequence[np.ndarray]
    totals: np.ndarray
    relative: np.ndarray
    noise: np.ndarray
    beliefs: np.ndarray
    dense_seconds: float

    @classmethod
    def of_parts(
        cls,
        trials: Sequence[Trial],
        measured: Sequence[Mapping[Part, float]],
        equation: Callable[[Sequence[int], Iterable[Part]], np.ndarray],
        parts: Collection[Part],
        beliefs: np.ndarray,
        dense_seconds: float,
        first_is_dense: bool = True,
    ) -> Equations:
        """The equations of networks whose rows were put together into parts.

        Args:
            measured: of each trial part -> seconds.
            equation: what of the unknowns is in some parts of a network; the first unknown belongs to no part.
            parts: all there are.
            beliefs, dense_seconds: see `Equations`.
            first_is_dense: see `noise_of`.
        """
        outside = np.eye(1, beliefs.shape[1])
        return cls(
            rows=[
                np.array([*(equation(trial.choice, [part]) for part in seconds), *outside])
                for trial, seconds in zip(trials, measured, strict=True)
            ],
            row_seconds=[
                np.array([*seconds.values(), trial.unnamed_seconds])
                for trial, seconds in zip(trials, measured, strict=True)
            ],
            totals=np.array([equation(trial.choice, parts) for trial in trials]) + outside,
            relative=np.array([trial.relative for trial in trials]),
            noise=noise_of(trials, first_is_dense),
            beliefs=beliefs,
            dense_seconds=dense_seconds,
        )

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """(unknowns,) the solution, and (unknowns, unknowns) its covariance."""
        solution = self._next(None)
        for _ in range(PASSES):
            solution = self._next(solution)
        left, _ = self._weighted(solution)
        scaled, scale = _scaled(left.T @ left)
        return solution, np.linalg.inv(scaled) * scale * scale[:, None]

    def solve_without_negative(self, places: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The same without those of some unknowns that would save time: noise."""
        equations, counts, left = self, np.ones(self.totals.shape[1]), {*places}
        while True:
            solution, covariance = equations.solve()
            if not (negative := [place for place in left if solution[place] < 0]):
                return solution, covariance
            left -= {*negative}
            counts[negative] = 0
            rows = [one * counts for one in self.rows]
            equations = replace(self, rows=rows, totals=self.totals * counts)

    def _next(self, last: np.ndarray | None) -> np.ndarray:
        """(unknowns,) the next solution: weights and the trials' drift are those that the last one implies."""
        left, right = self._weighted(last)
        scaled, scale = _scaled(left.T @ left)
        return np.linalg.solve(scaled, scale * (left.T @ right)) * scale

    def _weighted(self, last: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        least = resolution(self.dense_seconds)
        left, right = [self.beliefs], [np.zeros(len(self.beliefs))]
        for rows, seconds in zip(self.rows, self.row_seconds, strict=True):
            expected, steady = seconds, seconds
            if last is not None:
                expected = np.maximum(rows @ last, least)
                steady = seconds / _weighted_median(seconds / expected, expected)  # as if the machine hadn't drifted
            weight = _weights(steady, expected, np.hypot(ROW_NOISE * expected, least))
            left.append(rows * weight[:, None])
            right.append(steady * weight)
        walls = self.relative * self.dense_seconds
        expected = walls if last is None else self.totals @ last
        weight = _weights(walls, expected, self.noise * walls)
        left.append(self.totals * weight[:, None])
        right.append(walls * weight)
        return np.concatenate(left), np.concatenate(right)


def resolution(dense_seconds: float) -> float:
    """Seconds below which an engine's rows tell nothing."""
    return min(RESOLUTION_SECONDS, RESOLUTION * dense_seconds)


def noise_of(trials: Sequence[Trial], first_is_dense: bool = True) -> np.ndarray:
    """(trials,) relative standard deviation of each network's time.

    Args:
        first_is_dense: whether a network all of whose sites are at the first level is the dense one, the unit.
    """
    dense = [first_is_dense and not any(trial.choice) for trial in trials]
    return np.where(dense, DENSE_NOISE, [trial.noise for trial in trials])


def knots_of(levels: int) -> np.ndarray:
    """(knots,) which of so many levels are knots: the first, the last, and some between, evenly."""
    return np.unique(np.linspace(0, levels - 1, min(KNOTS, levels)).round().astype(int))


def interpolation(places: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """(places, knots) what the values at the knots contribute at each place; both fall."""
    return np.stack([np.interp(-places, -knots, unit) for unit in np.eye(len(knots))], axis=1)


def smoothness(knots: np.ndarray) -> list[dict[int, float]]:
    """What is believed of the values at falling knots, each as knot -> coefficient of what is about 0.

    They differ by no more than STEP from knot to knot, and by no more than BEND from the line between their neighbours.
    """
    beliefs = [{knot: 1 / STEP, knot + 1: -1 / STEP} for knot in range(len(knots) - 1)]
    for knot in range(1, len(knots) - 1):
        share = float((knots[knot] - knots[knot + 1]) / (knots[knot - 1] - knots[knot + 1]))
        beliefs.append({knot - 1: -share / BEND, knot: 1 / BEND, knot + 1: (share - 1) / BEND})
    return beliefs


def non_increasing(values: np.ndarray) -> np.ndarray:
    """The least-squares non-increasing fit (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # (mean, length)
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(length, mean) for mean, length in blocks])


def _scaled(normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of normal equations, (unknowns, unknowns), with its unknowns scaled to equal weight, and the scale.

    RIDGE of that keeps an unknown that no equation has at zero. A least-squares solution by singular values says the
    same, and takes several times as long.
    """
    scale = 1 / np.sqrt(np.maximum(normal.diagonal(), np.finfo(float).tiny ** 0.5))
    scaled = normal * scale * scale[:, None]
    scaled[np.diag_indices_from(scaled)] += RIDGE
    return scaled, scale


def _weights(measured: np.ndarray, expected: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """1 / deviation, less for what is far off: a run that was disturbed tells little."""
    return 1 / (deviation * np.sqrt(1 + np.square((measured - expected) / (ROBUST * deviation))))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulated, cumulated[-1] / 2)])
