"""The equations for widths: what a row takes depends on how much is kept of each group whose units it reads or makes.

A row of one group is a smooth curve over the fraction of its units that is kept. A layer between two groups multiplies
what is kept of one by what is kept of the other, so its row has that product besides a curve for each. A row of more
groups has the product of each pair between which one of its weights lies. Rows of the same groups are one equation.

What is in a residual branch takes all that only while the branch is there: a group of which nothing is kept is a gate
that closes. Of the addition at a branch's end something may be left even then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_spdy.pipeline.costs import NO_PREDECESSOR
from onnx_spdy.pipeline.latency.equations import (
    LEAST_SHARE,
    Equations,
    Fit,
    Trial,
    interpolation,
    knots_of,
    non_increasing,
    resolution,
    smoothness,
)
from onnx_spdy.pipeline.latency.places import NOWHERE, Key, Places, blocks
from onnx_spdy.pipeline.latency.terms import Terms

PRODUCT = 3.0  # of a row's typical time: how much the product of two widths may be


def fit_widths(
    trials: Sequence[Trial], places: Places, kept: np.ndarray, dense_seconds: float, *, first_is_dense: bool = True
) -> Fit:
    """Solve for all cells and products at once.

    Args:
        trials: each site at several widths, and the dense network too.
        places: of the sites.
        kept: (sites, levels) fraction of its units that each site keeps, falling from 1; 0 only of a branch.
        dense_seconds: of the whole dense network: the unit of `Trial.relative`.
        first_is_dense: whether that is what the first level of all sites makes.
    """
    fit = _System(trials, places, kept, dense_seconds, first_is_dense).fit()
    return fit if first_is_dense else replace(fit, dense_seconds=dense_seconds)


@dataclass(frozen=True)
class _Part:
    """The rows of some groups together, and where their unknowns begin.

    Attributes:
        gates: sites in whose branch they are.
        typical: seconds, the median of the trials that have them.
        constant: place of what they take whatever the widths; None where the curve of the one site has it.
        curves: site -> places of its curve's values at the knots. Where there is a constant the dense one is none.
        factors: pair of sites -> place of its product's seconds.
        left: place of what they take when a branch is gone; None where nothing of them is left.
    """

    gates: tuple[int, ...]
    typical: float
    constant: int | None
    curves: Mapping[int, range]
    factors: Mapping[tuple[int, int], int]
    left: int | None


class _System:
    """The equations. Unknowns: of each part its constant, curves, products and what is left; what no tensor takes."""

    def __init__(
        self, trials: Sequence[Trial], places: Places, kept: np.ndarray, dense_seconds: float, first_is_dense: bool
    ) -> None:
        self._kept, self._there = kept, (kept > 0).astype(float)
        self._least = resolution(dense_seconds)
        widths = [np.unique(row[row > 0])[::-1] for row in kept]
        self._knots = [those[knots_of(len(those))] for those in widths]
        self._curves = [interpolation(row, knots) for row, knots in zip(kept, self._knots, strict=True)]
        gone = [[site for site, level in enumerate(trial.choice) if kept[site, level] == 0] for trial in trials]
        measured = blocks(trials, places, gone)
        self._key_of = {block: places.key(block) for seconds in measured for block in seconds}
        self._rest = {
            block: float(np.median([seconds.get(block, 0.0) for seconds in measured]))
            for block, key in self._key_of.items()
            if key == NOWHERE
        }
        together = [self._summed(seconds) for seconds in measured]
        self._parts, self._size = dict[Key, _Part](), 1  # the first unknown belongs to no tensor
        for key, names in sorted(self._members().items(), key=lambda one: _order(one[0])):
            typical = float(np.median([seconds[key] for seconds in together if key in seconds]))
            self._add_part(key, names, places, max(typical, self._least))
        beliefs = np.array([*self._beliefs()]).reshape(-1, self._size)
        self._equations = Equations.of_parts(
            trials, together, self._equation, self._parts, beliefs, dense_seconds, first_is_dense
        )

    def _summed(self, seconds: Mapping[tuple[str, ...], float]) -> dict[Key, float]:
        summed: dict[Key, float] = {}
        for block, value in seconds.items():
            key = self._key_of[block]
            summed[key] = summed.get(key, 0.0) + value
        return summed

    def _members(self) -> dict[Key, set[str]]:
        """The tensors of the rows that are one equation."""
        found: dict[Key, set[str]] = {}
        for block, key in self._key_of.items():
            found.setdefault(key, set()).update(block)
        return found

    def _add_part(self, key: Key, names: set[str], places: Places, typical: float) -> None:
        sites, gates = (tuple(sorted(some)) for some in key)
        place = self._size
        constant = None if len(sites) == 1 else place
        place += constant is not None
        curves = {}
        for site in sites:
            count = len(self._knots[site]) - (constant is not None)
            curves[site] = range(place, place + count)
            place += count
        pairs = sorted(set().union(*(places.products[name] for name in names)))
        factors = {pair: place + number for number, pair in enumerate(pairs)}
        place += len(pairs)
        left = place if any(not names.isdisjoint(places.branches[gate].left) for gate in gates) else None
        place += left is not None
        self._parts[key] = _Part(gates, typical, constant, curves, factors, left)
        self._size = place

    def _equation(self, choice: Sequence[int], parts: Iterable[Key]) -> np.ndarray:
        equation = np.zeros(self._size)
        for key in parts:
            part = self._parts[key]
            if any(self._kept[gate, choice[gate]] == 0 for gate in part.gates):
                if part.left is not None:
                    equation[part.left] += 1
                continue
            if part.constant is not None:
                equation[part.constant] += 1
            for site, curve in part.curves.items():
                equation[curve.start : curve.stop] += self._curve(part, site)[choice[site]]
            for (one, other), place in part.factors.items():
                equation[place] += self._kept[one, choice[one]] * self._kept[other, choice[other]]
        return equation

    def _curve(self, part: _Part, site: int) -> np.ndarray:
        """(levels, unknowns of the curve)"""
        return self._curves[site][:, len(self._knots[site]) - len(part.curves[site]) :]

    def _beliefs(self) -> Iterable[np.ndarray]:
        """What is believed before any measurement, as equations with a right side of 0."""
        for part in self._parts.values():
            for site, curve in part.curves.items():
                shift = len(curve) - len(self._knots[site])  # the dense value is 0 where it is no unknown
                for coefficients in smoothness(self._knots[site]):
                    equation = np.zeros(self._size)
                    for knot, value in coefficients.items():
                        if knot + shift >= 0:
                            equation[curve.start + knot + shift] = value / part.typical
                    yield equation
            for place in [*part.factors.values(), *([] if part.left is None else [part.left])]:
                equation = np.zeros(self._size)
                equation[place] = 1 / (PRODUCT * part.typical)
                yield equation

    def fit(self) -> Fit:
        """The solution of all equations."""
        # Neither products nor what is left of branches save time.
        places = [place for part in self._parts.values() for place in part.factors.values()]
        places += [part.left for part in self._parts.values() if part.left is not None]
        solution, covariance = self._equations.solve_without_negative(places)
        terms = Terms(self._kept.shape)
        terms.add({}, float(solution[0]))
        for part in self._parts.values():
            gates = {gate: self._there[gate] for gate in part.gates}
            left = 0.0 if part.left is None else max(0.0, float(solution[part.left]))
            always = -left if part.constant is None else float(solution[part.constant]) - left
            for site, curve in part.curves.items():
                values = self._curve(part, site) @ solution[curve.start : curve.stop]
                # What rows of several groups add may be negative.
                least = 0.0 if part.constant is None else float(values[self._kept[site] > 0].min())
                terms.add({**gates, site: self._there[site] * (values - least)})
                always += least
            terms.add(gates, always)
            terms.add({}, left)
            for (one, other), place in part.factors.items():
                both = {one: self._kept[one], other: self._kept[other]}
                terms.add({**gates, **both}, max(0.0, float(solution[place])))
        floor = np.maximum(LEAST_SHARE * self._there * terms.seconds[:, :1], 1e-3 * self._least)
        seconds = self._cleaned(np.maximum(terms.seconds, floor))
        rest_part = self._parts.get(NOWHERE)
        outside = max(0.0, float(solution[rest_part.constant or 0])) if rest_part else 0.0
        shares = max(sum(self._rest.values()), self._least)
        return Fit(
            seconds=seconds,
            transition=np.zeros_like(seconds),
            predecessor=np.full(len(seconds), NO_PREDECESSOR),
            sparse=np.zeros(seconds.shape, bool),
            spread=self._spread(covariance) / seconds,
            rest={block[-1]: outside * value / shares for block, value in self._rest.items()},
            rest_seconds=max(0.0, terms.constant),
            products=tuple(terms.products),
        )

    def _spread(self, covariance: np.ndarray) -> np.ndarray:
        """(sites, levels) standard deviation of what a site takes."""
        spread = np.zeros(self._kept.shape)
        for site in range(len(spread)):
            parts = [part for part in self._parts.values() if site in part.curves]
            places = [place for part in parts for place in part.curves[site]]
            curves = [self._curve(part, site) for part in parts]
            gradient = np.concatenate([np.zeros((len(self._kept[site]), 0)), *curves], axis=1)
            gradient = gradient * self._there[site][:, None]
            variance = ((gradient @ covariance[np.ix_(places, places)]) * gradient).sum(axis=1)
            spread[site] = np.sqrt(np.maximum(variance, 0.0))
        return spread

    def _cleaned(self, seconds: np.ndarray) -> np.ndarray:
        """Fewer units are not slower, and levels that keep equally many take the same."""
        cleaned = np.empty_like(seconds)
        for site, kept in enumerate(self._kept):
            _, first, back = np.unique(-kept, return_index=True, return_inverse=True)
            cleaned[site] = non_increasing(seconds[site, first])[back]
        return cleaned


def _order(key: Key) -> tuple[int, list[int], list[int]]:
    return len(key[0]), sorted(key[0]), sorted(key[1])
