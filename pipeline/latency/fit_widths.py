"""The equations for widths: what a row takes depends on how much is kept of each group whose units it reads or makes.

A row of one group is a smooth curve over the fraction of its units that is kept. A layer between two groups multiplies
what is kept of one by what is kept of the other, so its row has that product besides a curve for each. A row of more
groups has the product of each pair between which one of its weights lies. Rows of the same groups are one equation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnx_spdy.pipeline.costs import NO_PREDECESSOR
from onnx_spdy.pipeline.latency.equations import (
    LEAST_SHARE,
    Equations,
    Fit,
    Trial,
    interpolation,
    knots_of,
    noise_of,
    non_increasing,
    resolution,
    smoothness,
)
from onnx_spdy.pipeline.site import Site

PRODUCT = 3.0  # of a row's typical time: how much the product of two widths may be

Sites = frozenset[int]


@dataclass(frozen=True)
class Places:
    """Where in a network the units of sites are.

    Attributes:
        names: of the tensors that nodes make, in graph order.
        readers: tensor -> those that the nodes make which read it.
        sites: tensor -> indices of the sites whose units the node that makes it reads or makes.
        products: tensor -> pairs of them between which a weight of that node lies, lower index first.
    """

    names: tuple[str, ...]
    readers: Mapping[str, tuple[str, ...]]
    sites: Mapping[str, Sites]
    products: Mapping[str, frozenset[tuple[int, int]]]

    @classmethod
    def of(cls, graph: onnx.GraphProto, sites: Sequence[Site]) -> Places:
        """Those of the groups of these sites."""
        touched: dict[str, set[int]] = {}  # value or stored tensor -> sites
        roles: dict[tuple[str, str], set[int]] = {}  # (stored tensor, role) -> sites
        for number, site in enumerate(sites):
            assert site.group is not None
            for value in site.group.values:
                touched.setdefault(value, set()).add(number)
            for axis in site.group.axes:
                touched.setdefault(axis.initializer, set()).add(number)
                roles.setdefault((axis.initializer, axis.role), set()).add(number)
        names, readers, found, products = [], dict[str, list[str]](), {}, {}
        for node in graph.node:
            outputs = [name for name in node.output if name]
            own = frozenset(one for name in (*node.input, *outputs) for one in touched.get(name, ()))
            pairs = frozenset(
                (min(one, other), max(one, other))
                for name in node.input
                for one in roles.get((name, "in"), ())
                for other in roles.get((name, "out"), ())
                if one != other
            )
            names += outputs
            for name in node.input:
                readers.setdefault(name, []).extend(outputs)
            for name in outputs:
                found[name], products[name] = own, pairs
        return cls(tuple(names), {name: tuple(those) for name, those in readers.items()}, found, products)


def fit_widths(
    trials: Sequence[Trial], places: Places, kept: np.ndarray, dense_seconds: float, *, first_is_dense: bool = True
) -> Fit:
    """Solve for all cells and products at once.

    Args:
        trials: each site at several widths, and the dense network too.
        places: of the sites.
        kept: (sites, levels) fraction of its units that each site keeps, falling from 1.
        dense_seconds: of the whole dense network: the unit of `Trial.relative`.
        first_is_dense: whether that is what the first level of all sites makes.
    """
    fit = _System(trials, places, kept, dense_seconds, first_is_dense).fit()
    return fit if first_is_dense else replace(fit, dense_seconds=dense_seconds)


def blocks(trials: Sequence[Trial], places: Places) -> list[dict[tuple[str, ...], float]]:
    """For each trial the tensors that run together -> seconds.

    What an engine joins in one row depends on the widths. So what is in one row in any trial counts as joined in all of
    them. A tensor that no row names runs in the row of what reads it.
    """
    root = {name: name for name in places.names}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for trial in trials:
        row_of = {name: row.outputs[0] for row in trial.rows for name in row.outputs}
        for name in reversed(places.names):
            if name not in row_of and (rows := [row_of[one] for one in places.readers.get(name, ()) if one in row_of]):
                row_of[name] = rows[0]
        for name, other in row_of.items():
            root[find(name)] = find(other)
    members: dict[str, list[str]] = {}
    for name in places.names:
        members.setdefault(find(name), []).append(name)
    found = []
    for trial in trials:
        seconds: dict[tuple[str, ...], float] = {}
        for row in trial.rows:
            block = tuple(members[find(row.outputs[0])])
            seconds[block] = seconds.get(block, 0.0) + row.seconds
        found.append(seconds)
    return found


@dataclass(frozen=True)
class _Part:
    """The rows of some groups together, and where their unknowns begin.

    Attributes:
        sites: of the groups.
        products: pairs of them.
        typical: seconds, the median of all trials.
        constant: place of what they take whatever the widths; None where the curve of the one site has it.
        curves: site -> places of its curve's values at the knots. Where there is a constant the dense one is none.
        factors: pair -> place of its product's seconds.
    """

    sites: tuple[int, ...]
    products: tuple[tuple[int, int], ...]
    typical: float
    constant: int | None
    curves: Mapping[int, range]
    factors: Mapping[tuple[int, int], int]


class _System:
    """The equations. Unknowns: of each part its constant, curves and products; and the seconds of no tensor."""

    def __init__(
        self, trials: Sequence[Trial], places: Places, kept: np.ndarray, dense_seconds: float, first_is_dense: bool
    ) -> None:
        self._kept = kept
        self._least = resolution(dense_seconds)
        widths = [np.unique(row)[::-1] for row in kept]
        self._knots = [those[knots_of(len(those))] for those in widths]
        self._curves = [interpolation(row, knots) for row, knots in zip(kept, self._knots, strict=True)]
        measured = blocks(trials, places)
        self._of_block = {
            block: tuple(sorted(set().union(*(places.sites[name] for name in block))))
            for seconds in measured
            for block in seconds
        }
        self._rest = {
            block: float(np.median([seconds.get(block, 0.0) for seconds in measured]))
            for block, sites in self._of_block.items()
            if not sites
        }
        together = [self._summed(seconds) for seconds in measured]
        products = self._products(places)
        self._parts, self._size = dict[tuple[int, ...], _Part](), 1  # the first unknown belongs to no tensor
        for sites in sorted(products, key=lambda one: (len(one), one)):
            typical = float(np.median([seconds.get(sites, 0.0) for seconds in together]))
            self._add_part(sites, products[sites], max(typical, self._least))
        self._equations = Equations(
            rows=[
                np.array([*(self._equation(trial.choice, [sites]) for sites in seconds), np.eye(1, self._size)[0]])
                for trial, seconds in zip(trials, together, strict=True)
            ],
            row_seconds=[
                np.array([*seconds.values(), trial.unnamed_seconds])
                for trial, seconds in zip(trials, together, strict=True)
            ],
            totals=np.array([self._total(trial.choice) for trial in trials]),
            relative=np.array([trial.relative for trial in trials]),
            noise=noise_of(trials, first_is_dense),
            beliefs=np.array([*self._beliefs()]).reshape(-1, self._size),
            dense_seconds=dense_seconds,
        )

    def _summed(self, seconds: Mapping[tuple[str, ...], float]) -> dict[tuple[int, ...], float]:
        summed: dict[tuple[int, ...], float] = {}
        for block, value in seconds.items():
            sites = self._of_block[block]
            summed[sites] = summed.get(sites, 0.0) + value
        return summed

    def _products(self, places: Places) -> dict[tuple[int, ...], tuple[tuple[int, int], ...]]:
        found: dict[tuple[int, ...], set[tuple[int, int]]] = {}
        for block, sites in self._of_block.items():
            found.setdefault(sites, set()).update(*(places.products[name] for name in block))
        return {sites: tuple(sorted(pairs)) for sites, pairs in found.items()}

    def _add_part(self, sites: tuple[int, ...], products: tuple[tuple[int, int], ...], typical: float) -> None:
        place = self._size
        constant = None if len(sites) == 1 else place
        place += constant is not None
        curves = {}
        for site in sites:
            count = len(self._knots[site]) - (constant is not None)
            curves[site] = range(place, place + count)
            place += count
        factors = {pair: place + number for number, pair in enumerate(products)}
        self._parts[sites] = _Part(sites, products, typical, constant, curves, factors)
        self._size = place + len(products)

    def _equation(self, choice: Sequence[int], parts: Iterable[tuple[int, ...]]) -> np.ndarray:
        equation = np.zeros(self._size)
        for sites in parts:
            part = self._parts[sites]
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

    def _total(self, choice: Sequence[int]) -> np.ndarray:
        equation = self._equation(choice, self._parts)
        equation[0] = 1
        return equation

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
            for place in part.factors.values():
                equation = np.zeros(self._size)
                equation[place] = 1 / (PRODUCT * part.typical)
                yield equation

    def fit(self) -> Fit:
        """The solution of all equations."""
        solution, covariance = self._without_negative_products()
        sites, levels = self._kept.shape
        seconds, spread = np.zeros((2, sites, levels))
        constant = float(solution[0])
        for site in range(sites):
            gradients, places = [], list[int]()
            beside = np.zeros(levels)  # what rows of several groups add, which may be negative
            for part in self._parts.values():
                if site in part.curves:
                    curve = part.curves[site]
                    gradients.append(self._curve(part, site))
                    places += curve
                    if part.constant is not None:
                        beside += self._curve(part, site) @ solution[curve.start : curve.stop]
            gradient = np.concatenate(gradients, axis=1) if gradients else np.zeros((levels, 0))
            seconds[site] = gradient @ solution[places] - beside.min()
            constant += float(beside.min())
            variance = ((gradient @ covariance[np.ix_(places, places)]) * gradient).sum(axis=1)
            spread[site] = np.sqrt(np.maximum(variance, 0.0))
        constant += sum(float(solution[part.constant]) for part in self._parts.values() if part.constant is not None)
        factors: dict[tuple[int, int], float] = {}
        for part in self._parts.values():
            for pair, place in part.factors.items():
                factors[pair] = factors.get(pair, 0.0) + max(0.0, float(solution[place]))
        pairs = sorted(pair for pair, value in factors.items() if value > 0)
        seconds = self._cleaned(np.maximum(seconds, np.maximum(LEAST_SHARE * seconds[:, :1], 1e-3 * self._least)))
        rest_part = self._parts.get(())
        outside = max(0.0, float(solution[rest_part.constant or 0])) if rest_part else 0.0
        shares = max(sum(self._rest.values()), self._least)
        return Fit(
            seconds=seconds,
            transition=np.zeros_like(seconds),
            predecessor=np.full(sites, NO_PREDECESSOR),
            sparse=np.zeros((sites, levels), bool),
            spread=spread / seconds,
            rest={block[-1]: outside * value / shares for block, value in self._rest.items()},
            rest_seconds=max(0.0, constant),
            kept=self._kept,
            pairs=np.array(pairs, np.int64).reshape(-1, 2),
            pair_seconds=np.array([factors[pair] for pair in pairs], np.float64),
        )

    def _without_negative_products(self) -> tuple[np.ndarray, np.ndarray]:
        """The solution when products that would save time are left out: that is noise, or a curve's part."""
        equations = self._equations
        places = [place for part in self._parts.values() for place in part.factors.values()]
        while True:
            solution, covariance = equations.solve()
            if not (negative := [place for place in places if solution[place] < 0]):
                return solution, covariance
            places = [place for place in places if place not in negative]
            counts = np.ones(self._size)
            counts[negative] = 0
            equations = replace(
                equations, rows=[rows * counts for rows in equations.rows], totals=equations.totals * counts
            )

    def _cleaned(self, seconds: np.ndarray) -> np.ndarray:
        """Fewer units are not slower, and levels that keep equally many take the same."""
        cleaned = np.empty_like(seconds)
        for site, kept in enumerate(self._kept):
            _, first, back = np.unique(-kept, return_index=True, return_inverse=True)
            cleaned[site] = non_increasing(seconds[site, first])[back]
        return cleaned
