"""The equations for levels of zeros: what a layer takes at its level, and what it takes more because of the one before.

The unknowns are each layer's seconds in the dense kernel and at some of its levels in the sparse one (each pattern is
a curve of its own), what it takes more because the one before it runs dense (an engine then converts layouts between
kernels), and what everything else takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.costs import NO_PREDECESSOR
from onnx_spdy.pipeline.latency.equations import (
    LEAST_SHARE,
    Equations,
    Fit,
    Row,
    Trial,
    interpolation,
    knots_of,
    noise_of,
    non_increasing,
    resolution,
    smoothness,
)
from onnx_spdy.pipeline.latency.sampling import columns_of
from onnx_spdy.pipeline.level import Level

KERNEL = 3.0  # of a layer's typical time: how far a sparse kernel may be from the dense one
TRANSITION = 2.0  # and what another kind of kernel before it may add


@dataclass(frozen=True)
class LayersRow:
    """One row of a profile, or several.

    Attributes:
        layers: indices of the prunable layers in it.
        rest: names of the other tensors in it.
        seconds: its time.
    """

    layers: tuple[int, ...]
    rest: tuple[str, ...]
    seconds: float


def fit_zeros(
    trials: Sequence[Trial],
    row_of: Mapping[str, int],
    predecessor: np.ndarray,
    rest_predecessors: Mapping[str, int],
    levels: Sequence[Level],
    sparse: np.ndarray,
    dense_seconds: float,
) -> Fit:
    """Solve for all cells at once.

    Args:
        trials: each layer at each level at least now and then, and the dense network too.
        row_of: tensor -> index of the layer that makes it.
        predecessor: (layers,) index of the layer that each one reads from, or NO_PREDECESSOR.
        rest_predecessors: the same for the other tensors.
        levels: dense first, those of each pattern rising.
        sparse: (layers, levels) bool, whether the engine runs a layer at a level in a sparse kernel. Levels that
            run in the dense one take the same time.
        dense_seconds: of the whole dense network: the unit of `Trial.relative`.
    """
    return _System(trials, row_of, predecessor, rest_predecessors, levels, sparse, dense_seconds).fit()


def together(rows: Sequence[Row], row_of: Mapping[str, int]) -> tuple[LayersRow, ...]:
    """Rows with one for each layer: a layer that runs several times has several, which become one."""
    merged: list[LayersRow] = []
    for one in rows:
        layers = tuple(dict.fromkeys(row_of[name] for name in one.outputs if name in row_of))
        row = LayersRow(layers, tuple(name for name in one.outputs if name not in row_of), one.seconds)
        for other in [other for other in merged if set(other.layers) & set(row.layers)]:
            merged.remove(other)
            layers = tuple(dict.fromkeys((*other.layers, *row.layers)))
            row = LayersRow(layers, other.rest + row.rest, other.seconds + row.seconds)
        merged.append(row)
    return tuple(merged)


class _System:
    """The equations. Unknowns: each layer's dense seconds, those at its knots, what it takes more after a dense layer
    when it is dense and when it is not; each other tensor's seconds and what it takes more after a dense layer; and
    the seconds that belong to no tensor.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        row_of: Mapping[str, int],
        predecessor: np.ndarray,
        rest_predecessors: Mapping[str, int],
        levels: Sequence[Level],
        sparse: np.ndarray,
        dense_seconds: float,
    ) -> None:
        self._predecessor = predecessor
        self._sparse = np.asarray(sparse)
        self._patterns = [*columns_of(levels).values()]
        density = np.array([1 - level.sparsity for level in levels])
        self._knots = [density[columns][knots_of(len(columns))] for columns in self._patterns]
        self._curves = _curves(density, self._patterns, self._knots, self._sparse)  # (layers, levels, unknowns)
        self._per_layer = self._curves.shape[2] + 2
        self._rows = [together(trial.rows, row_of) for trial in trials]
        # Tensors that are always in a row with layers belong to these.
        alone = {name for rows in self._rows for row in rows if not row.layers for name in row.rest}
        self._rest = {name: number for number, name in enumerate(sorted(alone))}
        self._rest_predecessors = [rest_predecessors[name] for name in self._rest]
        self._unnamed = len(predecessor) * self._per_layer + 2 * len(self._rest)
        self._resolution = resolution(dense_seconds)
        self._equations = Equations(
            rows=[self._row_equations(trial.choice, rows) for trial, rows in zip(trials, self._rows, strict=True)],
            row_seconds=[
                np.array([*(row.seconds for row in rows), trial.unnamed_seconds])
                for trial, rows in zip(trials, self._rows, strict=True)
            ],
            totals=np.array([self._total(trial.choice) for trial in trials]),
            relative=np.array([trial.relative for trial in trials]),
            noise=noise_of(trials),
            beliefs=self._beliefs(*self._typical_seconds()),
            dense_seconds=dense_seconds,
        )

    @property
    def _size(self) -> int:
        return self._unnamed + 1

    def fit(self) -> Fit:
        """The solution of all equations."""
        layers, levels = self._sparse.shape
        solution, covariance = self._equations.solve()
        seconds, transition, spread = np.zeros((3, layers, levels))
        for layer in range(layers):
            start = layer * self._per_layer
            curve = slice(start, start + self._per_layer - 2)
            seconds[layer] = self._curves[layer] @ solution[curve]
            spread[layer] = np.sqrt(
                np.einsum("li,ij,lj->l", self._curves[layer], covariance[curve, curve], self._curves[layer])
            )
            transition[layer] = solution[start + self._per_layer - 2 + self._sparse[layer]]
        rest = {}
        for number, (name, source) in enumerate(zip(self._rest, self._rest_predecessors, strict=True)):
            place = self._place(number)
            rest[name] = float(max(0.0, solution[place]))
            if source != NO_PREDECESSOR:  # it depends on that layer alone, so it is counted there
                seconds[source, ~self._sparse[source]] += solution[place + 1]
        least = np.maximum(LEAST_SHARE * seconds[:, :1], 1e-3 * self._resolution)
        seconds = monotone(np.maximum(seconds, least), self._sparse, self._patterns)
        transition = np.maximum(transition, -seconds)
        return Fit(
            seconds=seconds,
            transition=transition,
            predecessor=np.asarray(self._predecessor),
            sparse=self._sparse,
            spread=np.divide(spread, seconds, out=np.zeros_like(spread), where=seconds > 0),
            rest=rest,
            rest_seconds=float(max(0.0, solution[self._unnamed])) + sum(rest.values()),
        )

    def _row_equations(self, choice: Sequence[int], rows: Sequence[LayersRow]) -> np.ndarray:
        equations = np.zeros((len(rows) + 1, self._size))
        for equation, row in zip(equations, rows, strict=False):
            for layer in row.layers:
                self._add_layer(equation, layer, choice)
            for name in row.rest:
                if name in self._rest:
                    self._add_rest(equation, self._rest[name], choice)
        equations[-1, self._unnamed] = 1
        return equations

    def _total(self, choice: Sequence[int]) -> np.ndarray:
        equation = np.zeros(self._size)
        for layer in range(len(choice)):
            self._add_layer(equation, layer, choice)
        for number in range(len(self._rest)):
            self._add_rest(equation, number, choice)
        equation[self._unnamed] = 1
        return equation

    def _add_layer(self, equation: np.ndarray, layer: int, choice: Sequence[int]) -> None:
        start = layer * self._per_layer
        equation[start : start + self._per_layer - 2] += self._curves[layer, choice[layer]]
        source = self._predecessor[layer]
        if source != NO_PREDECESSOR and not self._sparse[source, choice[source]]:
            equation[start + self._per_layer - 2 + self._sparse[layer, choice[layer]]] += 1

    def _add_rest(self, equation: np.ndarray, number: int, choice: Sequence[int]) -> None:
        equation[self._place(number)] += 1
        source = self._rest_predecessors[number]
        if source != NO_PREDECESSOR and not self._sparse[source, choice[source]]:
            equation[self._place(number) + 1] += 1

    def _place(self, number: int) -> int:
        return len(self._predecessor) * self._per_layer + 2 * number

    def _typical_seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """(layers,) and (rest,) the median of what the rows of each take, shared by those in a row."""
        found: list[list[float]] = [[] for _ in self._predecessor]
        rest: list[list[float]] = [[] for _ in self._rest]
        for rows in self._rows:
            for row in rows:
                for layer in row.layers:
                    found[layer].append(row.seconds / len(row.layers))
                if not row.layers:
                    for name in row.rest:
                        rest[self._rest[name]].append(row.seconds / len(row.rest))
        typical = [np.array([np.median(values) if values else 0.0 for values in those]) for those in (found, rest)]
        return typical[0], typical[1]

    def _beliefs(self, typical_layers: np.ndarray, typical_rest: np.ndarray) -> np.ndarray:
        """What is believed before any measurement, as equations with a right side of 0."""
        equations = []
        for layer, typical in enumerate(np.maximum(typical_layers, self._resolution)):
            start = layer * self._per_layer

            def believe(
                coefficients: Mapping[int, float], deviation: float, start: int = start, typical: float = typical
            ) -> None:
                equation = np.zeros(self._size)
                for place, value in coefficients.items():
                    equation[start + place] = value / (deviation * typical)
                equations.append(equation)

            first = 1
            for knots in self._knots:
                believe({0: 1, first: -1}, KERNEL)
                for coefficients in smoothness(knots):
                    believe({first + knot: value for knot, value in coefficients.items()}, 1.0)
                first += len(knots)
            believe({first: 1}, TRANSITION)
            believe({first + 1: 1}, TRANSITION)
        for number, typical in enumerate(np.maximum(typical_rest, self._resolution)):
            equation = np.zeros(self._size)
            equation[self._place(number) + 1] = 1 / (TRANSITION * typical)
            equations.append(equation)
        return np.array(equations)


def _curves(
    density: np.ndarray, patterns: Sequence[Sequence[int]], knots: Sequence[np.ndarray], sparse: np.ndarray
) -> np.ndarray:
    """(layers, levels, 1 + knots): what the dense kernel's seconds and those at the knots contribute to each level.

    Args:
        density: (levels,).
        patterns: the levels of each.
        knots: of each pattern (knots,) those of its densities between which seconds are linear in the density.
        sparse: (layers, levels) bool.
    """
    curve = np.zeros((len(density), 1 + sum(map(len, knots))))
    first = 1
    for columns, own in zip(patterns, knots, strict=True):
        curve[columns, first : first + len(own)] = interpolation(density[columns], own)
        first += len(own)
    return np.where(sparse[:, :, None], curve, np.eye(1, first))


def monotone(seconds: np.ndarray, sparse: np.ndarray, patterns: Sequence[Sequence[int]]) -> np.ndarray:
    """Clean a table by what must hold: with the same kind of kernel, more zeros of a pattern are not slower.

    Each run of neighbouring levels that uses sparse kernels is replaced by the nearest non-increasing
    sequence in least squares (pool adjacent violators); a run with dense kernels by its median. So
    a cell that was measured too fast by luck is pulled back by its neighbours instead of being chosen for it.

    Args:
        seconds: (layers, levels) as measured.
        sparse: (layers, levels) bool, whether the kernel was a sparse one.
        patterns: the levels of each, from lowest to highest sparsity.
    Returns:
        (layers, levels).
    """
    cleaned = seconds.copy()
    for row, columns in itertools.product(range(len(seconds)), patterns):
        values, kinds = seconds[row, columns], sparse[row, columns]
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1), len(kinds)]
        for start, stop in itertools.pairwise(edges):
            run = values[start:stop]
            cleaned[row, columns[start:stop]] = non_increasing(run) if kinds[start] else np.median(run)
    return cleaned
