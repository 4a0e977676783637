"""The equations for precisions: what a row takes depends on which layers around it are in int8.

A layer takes one time in floating point and another in int8. What stands between layers, such as an addition, is in
int8 where all layers that read it are. A tensor that is made in the one and read in the other is converted, where it is
made, and that costs time there. What runs together in any network is one equation. `switches.py` has the conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.latency.equations import LEAST_SHARE, Equations, Fit, Trial, resolution
from onnx_spdy.pipeline.latency.places import Places, blocks
from onnx_spdy.pipeline.latency.switches import Cases, all_in_int8, both, holds, negated
from onnx_spdy.pipeline.latency.terms import Terms

CHANGE = 3.0  # of a row's typical time: how far it may be in int8 from what it is in floating point
CONVERSION = 1.0  # and what a conversion may add


@dataclass(frozen=True)
class Tensor:
    """On which layers it depends whether a tensor is in int8. Layers are indices.

    Attributes:
        layer: that makes it, or what is fused into it; None for what stands between layers.
        made: whether it is made in int8.
        read: whether somebody reads it in int8.
        alone: whether all do.
        converts: whether a conversion of it would be here.
        moved: whether values are only moved or picked to make it, in int8 wherever all that read it do.
    """

    layer: int | None
    made: Cases
    read: Cases
    alone: Cases
    converts: bool
    moved: bool

    @property
    def changes(self) -> tuple[Cases, ...]:
        """When making it takes another time than in floating point; of what stands between layers."""
        if self.moved:  # engines may have no good kernel for what a layer in floating point made
            return both(self.made, self.alone), both(negated(self.made), self.alone)
        return (self.made,)

    @property
    def conversions(self) -> tuple[Cases, Cases]:
        """When it becomes int8 here, and when it is turned back."""
        if not self.converts:
            return (), ()
        return both(negated(self.made), self.read), both(self.made, negated(self.alone))


@dataclass(frozen=True)
class Wiring:
    """What of a network its time depends on, whatever was measured.

    Attributes:
        places: of the tensors of the dense network.
        tensors: those that depend on layers.
        predecessor: (layers,) index of the layer that each one reads from, or NO_PREDECESSOR.
    """

    places: Places
    tensors: Mapping[str, Tensor]
    predecessor: np.ndarray


def fit_precisions(trials: Sequence[Trial], wiring: Wiring, dense_seconds: float) -> Fit:
    """Solve for all of it at once.

    Args:
        trials: each layer in int8 and not, and the dense network too.
        wiring: of the network.
        dense_seconds: of the whole dense network: the unit of `Trial.relative`.
    """
    return _System(trials, wiring, dense_seconds).fit()


@dataclass(frozen=True)
class _Block:
    """Tensors that run together, and where their unknowns begin.

    Attributes:
        typical: seconds, the median of the trials.
        layers: that are in it.
        place: of what it takes with everything in floating point.
        changes: when it takes something else -> place of how much more or less.
        conversions: when it takes more -> place of how much.
    """

    typical: float
    layers: tuple[int, ...]
    place: int
    changes: Mapping[Cases, int]
    conversions: Mapping[Cases, int]


class _System:
    """The equations. Unknowns: what no tensor takes; of each block its seconds in floating point, how much more or less
    it takes when something of it is in int8, and what conversions take."""

    def __init__(self, trials: Sequence[Trial], wiring: Wiring, dense_seconds: float) -> None:
        self._wiring, self._least = wiring, resolution(dense_seconds)
        measured = blocks(trials, wiring.places)
        self._size = 1  # the first unknown belongs to no tensor
        self._blocks: dict[tuple[str, ...], _Block] = {}
        for names in dict.fromkeys(names for seconds in measured for names in seconds):
            typical = float(np.median([seconds.get(names, 0.0) for seconds in measured]))
            self._add_block(names, max(typical, self._least))
        self._equations = Equations.of_parts(
            trials,
            measured,
            self._equation,
            self._blocks,
            np.array([*self._beliefs()]).reshape(-1, self._size),
            dense_seconds,
        )

    def _add_block(self, names: tuple[str, ...], typical: float) -> None:
        own = [self._wiring.tensors[name] for name in names if name in self._wiring.tensors]
        layers = tuple(sorted({one.layer for one in own if one.layer is not None}))
        changes = [all_in_int8([layer]) for layer in layers]
        changes += [cases for one in own if one.layer is None for cases in one.changes if cases]
        conversions = [cases for one in own for cases in one.conversions if cases]
        place = self._size + 1
        several = dict.fromkeys(changes), dict.fromkeys(cases for cases in conversions if cases not in changes)
        numbered = []
        for some in several:
            numbered.append({cases: place + number for number, cases in enumerate(some)})
            place += len(some)
        self._blocks[names] = _Block(typical, layers, self._size, *numbered)
        self._size = place

    def _equation(self, choice: Sequence[int], several: Iterable[tuple[str, ...]]) -> np.ndarray:
        equation, in_int8 = np.zeros(self._size), [bool(level) for level in choice]
        for block in map(self._blocks.__getitem__, several):
            equation[block.place] += 1
            for cases, place in (*block.changes.items(), *block.conversions.items()):
                equation[place] += holds(cases, in_int8)
        return equation

    def _beliefs(self) -> Iterable[np.ndarray]:
        """What is believed before any measurement, as equations with a right side of 0."""
        for block in self._blocks.values():
            for places, deviation in ((block.changes, CHANGE), (block.conversions, CONVERSION)):
                for place in places.values():
                    yield np.eye(1, self._size, place)[0] / (deviation * block.typical)

    def fit(self) -> Fit:
        """The solution of all equations."""
        conversions = [place for block in self._blocks.values() for place in block.conversions.values()]
        solution, covariance = self._equations.solve_without_negative(conversions)
        terms = _PairedTerms(self._wiring.predecessor)
        variance = np.zeros_like(terms.seconds)
        rest: dict[str, float] = {}
        for names, block in self._blocks.items():
            always = float(solution[block.place])
            for cases, place in (*block.changes.items(), *block.conversions.items()):
                seconds = float(solution[place])
                if seconds < 0:  # so that there is nothing to subtract: less in one case is more in all others
                    always += seconds
                    cases, seconds = negated(cases), -seconds
                terms.add_cases(cases, seconds)
            for layer in block.layers:
                terms.seconds[layer] += max(0.0, always) / len(block.layers)
                places = [block.place, block.changes[all_in_int8([layer])]]
                variance[layer] += np.cumsum(np.diag(covariance[np.ix_(places, places)]))
            if not block.layers:
                rest[names[-1]] = max(0.0, always)
        floor = np.maximum(LEAST_SHARE * terms.seconds[:, :1], 1e-3 * self._least)
        table = np.maximum(terms.seconds, floor)
        return Fit(
            seconds=table,
            transition=np.maximum(terms.transition, -table),
            predecessor=self._wiring.predecessor,
            sparse=np.tile([False, True], (len(table), 1)),
            spread=np.sqrt(variance) / table,
            rest=rest,
            rest_seconds=max(0.0, float(solution[0]) + terms.constant) + sum(rest.values()),
            products=tuple(terms.products),
        )


class _PairedTerms(Terms):
    """Terms of which those of a layer and the one before it are kept apart: the solver takes them exactly.

    Attributes:
        transition: (layers, 2) more where the predecessor is in floating point.
    """

    def __init__(self, predecessor: np.ndarray) -> None:
        super().__init__((len(predecessor), 2))
        self._predecessor, self.transition = predecessor, np.zeros((len(predecessor), 2))

    def add_cases(self, cases: Cases, seconds: float) -> None:
        """So many seconds where one of the cases is true."""
        for case in map(sorted, cases):
            if len(case) == 2 and self._predecessor[case[1][0]] == case[0][0]:
                (_, state), (layer, own) = case
                self.seconds[layer, int(own)] += seconds * state
                self.transition[layer, int(own)] += -seconds if state else seconds
            else:
                self.add({layer: np.array([1.0 - state, state]) for layer, state in case}, seconds)
