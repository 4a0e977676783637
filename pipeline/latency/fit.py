"""From profiles of mixed networks to the seconds of every layer at every level.

The engine is asked for its own profile of networks whose layers are at random levels, and each row of a profile is
one linear equation: what the layers in it take at their levels, and what a layer takes more because the one before
it runs dense (an engine then converts layouts between kernels). All equations together are solved by
regularised least squares: a layer's sparse levels lie on a smooth curve, so a cell rests on its neighbours too, and
one that was measured too fast by luck is pulled back. That is what keeps a search from choosing such cells.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.costs import NO_PREDECESSOR

ROW_NOISE = 0.1  # relative standard deviation of a row
DENSE_NOISE = 0.002  # of the dense network's time, which is the unit
RESOLUTION_SECONDS = 3e-6  # of an engine's rows: some come in whole microseconds
RESOLUTION = 1e-3  # of the network's time, where that is less
KNOTS = 12  # levels whose seconds are unknowns; between them seconds are linear in the density
BEND = 0.03  # of a layer's typical time: how much its curve bends at a knot
STEP = 1.0  # and how much it changes from knot to knot
KERNEL = 3.0  # and how far a sparse kernel may be from the dense one
TRANSITION = 2.0  # and what another kind of kernel before it may add
LEAST_SHARE = 0.01  # of its dense time: no layer is free, whatever noise says
ROBUST = 6.0  # standard deviations from which on an equation counts less (Cauchy weights)
RIDGE = 1e-9  # of each unknown's weight in the equations
PASSES = 8


@dataclass(frozen=True)
class Row:
    """One row of a profile.

    Attributes:
        layers: indices of the prunable layers in it.
        rest: names of the other tensors in it.
        seconds: its time, and that of rows before it that belong to no tensor.
    """

    layers: tuple[int, ...]
    rest: tuple[str, ...]
    seconds: float


def together(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows with one for each layer: a layer that runs several times has several, which become one."""
    merged: list[Row] = []
    for row in rows:
        for other in [one for one in merged if set(one.layers) & set(row.layers)]:
            merged.remove(other)
            layers = tuple(dict.fromkeys((*other.layers, *row.layers)))
            row = Row(layers, other.rest + row.rest, other.seconds + row.seconds)
        merged.append(row)
    return tuple(merged)


@dataclass(frozen=True)
class Trial:
    """A network whose layers are at these levels, as it was measured.

    Attributes:
        choice: (layers,) level indices.
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
        seconds: (layers, levels), never more for more zeros in the same kind of kernel.
        transition: (layers, levels), more where the predecessor runs dense.
        spread: (layers, levels), relative standard deviation of `seconds`.
        rest: seconds of each other tensor that has rows of its own.
        rest_seconds: outside the layers.
    """

    seconds: np.ndarray
    transition: np.ndarray
    spread: np.ndarray
    rest: dict[str, float]
    rest_seconds: float


def fit_latency(
    trials: Sequence[Trial],
    predecessor: np.ndarray,
    rest_predecessors: Mapping[str, int],
    sparsities: Sequence[float],
    sparse: np.ndarray,
    dense_seconds: float,
) -> Fit:
    """Solve for all cells at once.

    Args:
        trials: each layer at each level at least now and then, and the dense network too.
        predecessor: (layers,) index of the layer that each one reads from, or NO_PREDECESSOR.
        rest_predecessors: the same for the other tensors.
        sparsities: (levels,) dense first, rising.
        sparse: (layers, levels) bool, whether the engine runs a layer at a level in a sparse kernel. Levels that
            run in the dense one take the same time.
        dense_seconds: of the whole dense network: the unit of `Trial.relative`.
    """
    system = _System(trials, predecessor, rest_predecessors, sparsities, sparse, dense_seconds)
    solution = system.solve(None)
    for _ in range(PASSES):
        solution = system.solve(solution)
    return system.result(solution)


class _System:
    """The equations. Unknowns: each layer's dense seconds, those at its knots, what it takes more after a dense layer
    when it is dense and when it is not; each other tensor's seconds and what it takes more after a dense layer; and
    the seconds that belong to no tensor.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        predecessor: np.ndarray,
        rest_predecessors: Mapping[str, int],
        sparsities: Sequence[float],
        sparse: np.ndarray,
        dense_seconds: float,
    ) -> None:
        self._predecessor = predecessor
        self._sparse = np.asarray(sparse)
        density = 1 - np.asarray(sparsities)[1:]
        knots = np.unique(np.linspace(0, len(density) - 1, min(KNOTS, len(density))).round().astype(int))
        self._curves = _curves(density, density[knots], self._sparse)  # (layers, levels, unknowns of a curve)
        left, middle, right = density[knots][:-2], density[knots][1:-1], density[knots][2:]
        self._shares = (middle - right) / (left - right)
        self._per_layer = self._curves.shape[2] + 2
        # Tensors that are always in a row with layers belong to these.
        alone = {name for trial in trials for row in trial.rows if not row.layers for name in row.rest}
        self._rest = {name: number for number, name in enumerate(sorted(alone))}
        self._rest_predecessors = [rest_predecessors[name] for name in self._rest]
        self._unnamed = len(predecessor) * self._per_layer + 2 * len(self._rest)
        self._dense_seconds = dense_seconds
        self._resolution = min(RESOLUTION_SECONDS, RESOLUTION * dense_seconds)
        self._rows_of = [self._row_equations(trial) for trial in trials]
        self._row_seconds = [
            np.array([*(row.seconds for row in trial.rows), trial.unnamed_seconds]) for trial in trials
        ]  # fmt: skip
        self._totals = np.array([self._total(trial.choice) for trial in trials])  # (trials, unknowns)
        self._relative = np.array([trial.relative for trial in trials])
        is_dense = np.array([not any(trial.choice) for trial in trials])
        self._noise = np.where(is_dense, DENSE_NOISE, [trial.noise for trial in trials])
        self._prior = self._beliefs(*self._typical_seconds(trials))

    @property
    def _size(self) -> int:
        return self._unnamed + 1

    def solve(self, last: np.ndarray | None) -> np.ndarray:
        """(unknowns,) the next solution: weights and the trials' drift are those that the last one implies."""
        left, right = self._equations(last)
        return _inverse(left.T @ left) @ (left.T @ right)

    def _equations(self, last: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        left, right = [self._prior], [np.zeros(len(self._prior))]
        for rows, seconds in zip(self._rows_of, self._row_seconds, strict=True):
            expected, steady = seconds, seconds
            if last is not None:
                expected = np.maximum(rows @ last, self._resolution)
                steady = seconds / _weighted_median(seconds / expected, expected)  # as if the machine hadn't drifted
            weight = _weights(steady, expected, np.hypot(ROW_NOISE * expected, self._resolution))
            left.append(rows * weight[:, None])
            right.append(steady * weight)
        walls = self._relative * self._dense_seconds
        expected = walls if last is None else self._totals @ last
        weight = _weights(walls, expected, self._noise * walls)
        left.append(self._totals * weight[:, None])
        right.append(walls * weight)
        return np.concatenate(left), np.concatenate(right)

    def result(self, solution: np.ndarray) -> Fit:
        layers, levels = self._sparse.shape
        left, _ = self._equations(solution)
        covariance = _inverse(left.T @ left)
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
        seconds = monotone(np.maximum(seconds, least), self._sparse)
        transition = np.maximum(transition, -seconds)
        return Fit(
            seconds=seconds,
            transition=transition,
            spread=np.divide(spread, seconds, out=np.zeros_like(spread), where=seconds > 0),
            rest=rest,
            rest_seconds=float(max(0.0, solution[self._unnamed])) + sum(rest.values()),
        )

    def _row_equations(self, trial: Trial) -> np.ndarray:
        equations = np.zeros((len(trial.rows) + 1, self._size))
        for equation, row in zip(equations, trial.rows, strict=False):
            for layer in row.layers:
                self._add_layer(equation, layer, trial.choice)
            for name in row.rest:
                if name in self._rest:
                    self._add_rest(equation, self._rest[name], trial.choice)
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

    def _typical_seconds(self, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
        """(layers,) and (rest,) the median of what the rows of each take, shared by those in a row."""
        found: list[list[float]] = [[] for _ in self._predecessor]
        rest: list[list[float]] = [[] for _ in self._rest]
        for trial in trials:
            for row in trial.rows:
                for layer in row.layers:
                    found[layer].append(row.seconds / len(row.layers))
                if not row.layers:
                    for name in row.rest:
                        rest[self._rest[name]].append(row.seconds / len(row.rest))
        typical = [np.array([np.median(values) if values else 0.0 for values in those]) for those in (found, rest)]
        return typical[0], typical[1]

    def _beliefs(self, typical_layers: np.ndarray, typical_rest: np.ndarray) -> np.ndarray:
        """What is believed before any measurement, as equations with a right side of 0."""
        points = self._per_layer - 3  # knots
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

            believe({0: 1, 1: -1}, KERNEL)
            for knot in range(1, points):
                believe({knot: 1, knot + 1: -1}, STEP)
            for knot, share in enumerate(self._shares, 1):  # of the left one in the line between the neighbours
                believe({knot: share, knot + 1: -1, knot + 2: 1 - share}, BEND)
            believe({points + 1: 1}, TRANSITION)
            believe({points + 2: 1}, TRANSITION)
        for number, typical in enumerate(np.maximum(typical_rest, self._resolution)):
            equation = np.zeros(self._size)
            equation[self._place(number) + 1] = 1 / (TRANSITION * typical)
            equations.append(equation)
        return np.array(equations)


def _inverse(normal: np.ndarray) -> np.ndarray:
    """The inverse of a matrix of normal equations, (unknowns, unknowns).

    Unknowns are scaled to equal weight first; RIDGE of that keeps one that no equation has at zero. A least-squares
    solution by singular values says the same, and takes about three times as long.
    """
    scale = 1 / np.sqrt(np.maximum(normal.diagonal(), np.finfo(float).tiny ** 0.5))
    scaled = normal * scale * scale[:, None]
    scaled[np.diag_indices_from(scaled)] += RIDGE
    return np.linalg.inv(scaled) * scale * scale[:, None]


def _curves(density: np.ndarray, knots: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """(layers, levels, 1 + knots): what the dense kernel's seconds and those at the knots contribute to each level.

    Args:
        density: (levels - 1,) of all levels but the dense one, falling.
        knots: (knots,) those of them between which seconds are linear in the density.
        sparse: (layers, levels) bool.
    """
    curve = np.zeros((1 + len(density), 1 + len(knots)))
    curve[1:, 1:] = np.stack([np.interp(-density, -knots, unit) for unit in np.eye(len(knots))], axis=1)
    return np.where(sparse[:, :, None], curve, np.eye(1, 1 + len(knots)))


def _weights(measured: np.ndarray, expected: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """1 / deviation, less for what is far off: a run that was disturbed tells little."""
    return 1 / (deviation * np.sqrt(1 + np.square((measured - expected) / (ROBUST * deviation))))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulated, cumulated[-1] / 2)])


def monotone(seconds: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Clean a table by what must hold: with the same kind of kernel, more zeros are not slower.

    Each run of neighbouring levels that uses sparse kernels is replaced by the nearest non-increasing
    sequence in least squares (pool adjacent violators); a run with dense kernels by its median. So
    a cell that was measured too fast by luck is pulled back by its neighbours instead of being chosen for it.

    Args:
        seconds: (layers, levels) as measured, from lowest to highest sparsity.
        sparse: (layers, levels) bool, whether the kernel was a sparse one.
    Returns:
        (layers, levels).
    """
    cleaned = seconds.copy()
    for row, kinds in zip(cleaned, sparse, strict=True):
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1), len(kinds)]
        for start, stop in itertools.pairwise(edges):
            row[start:stop] = _non_increasing(row[start:stop]) if kinds[start] else np.median(row[start:stop])
    return cleaned


def _non_increasing(values: np.ndarray) -> np.ndarray:
    """The least-squares non-increasing fit (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # (mean, length)
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(length, mean) for mean, length in blocks])
