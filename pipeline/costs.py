"""What the solver is given of time: seconds of layers x levels, and what one layer's level costs another.

A kind of level that gives zeros makes one layer cost the next something where kernels change; one that gives widths
makes two multiply: a convolution between two groups of units takes time for each pair of what they keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnx_spdy.runtimes.errors import OnnxSpdyError

NO_PREDECESSOR = -1


class InvalidCosts(OnnxSpdyError, ValueError):
    """Times or errors that nothing can be solved with."""


@dataclass(frozen=True)
class Costs:
    """Times of layers x levels, and what one layer's level costs another. (A group of units counts as a layer here.)

    Attributes:
        seconds: (layers, levels), >= 0; level 0 is dense.
        transition: (layers, levels), seconds more, or less, where the predecessor runs dense; never more than
            `seconds` less. Default: none.
        predecessor: (layers,) index of the layer that each one reads from, an earlier one, or NO_PREDECESSOR.
            Default: none.
        dense: (layers, levels) bool, which levels run dense. Default: level 0.
        kept: (layers, levels), > 0, what a level keeps of a layer's width. Default: all of it.
        pairs: (pairs, 2) different layers, whose widths multiply. Default: none.
        pair_seconds: (pairs,), >= 0, seconds of the product, where both are whole.

    >>> costs = Costs(np.array([[3.0, 1.0], [3.0, 1.0]]), np.array([[0.0, 0.0], [0.0, 0.5]]), np.array([-1, 0]))
    >>> costs.total([0, 1]), costs.total([1, 1])
    (4.5, 2.0)
    """

    seconds: np.ndarray
    transition: np.ndarray = None  # type: ignore[assignment]  # these are set below
    predecessor: np.ndarray = None  # type: ignore[assignment]
    dense: np.ndarray = None  # type: ignore[assignment]
    kept: np.ndarray = None  # type: ignore[assignment]
    pairs: np.ndarray = None  # type: ignore[assignment]
    pair_seconds: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Raise InvalidCosts where shapes differ, or a number is NaN, infinite or a negative time."""
        seconds = np.asarray(self.seconds, np.float64)
        if seconds.ndim != 2 or 0 in seconds.shape:
            raise InvalidCosts(f"seconds {seconds.shape} must be (layers, levels), not empty")
        transition = np.zeros_like(seconds) if self.transition is None else np.asarray(self.transition, np.float64)
        none = np.full(len(seconds), NO_PREDECESSOR)
        predecessor = none if self.predecessor is None else np.asarray(self.predecessor, np.int64)
        first = np.broadcast_to(np.arange(seconds.shape[1]) == 0, seconds.shape)
        dense = first if self.dense is None else np.asarray(self.dense, bool)
        if not transition.shape == dense.shape == seconds.shape or predecessor.shape != seconds.shape[:1]:
            raise InvalidCosts(
                f"transition {transition.shape}, predecessor {predecessor.shape} and dense {dense.shape} don't fit "
                f"seconds {seconds.shape}"
            )
        if not (np.isfinite(seconds).all() and np.isfinite(transition).all()):
            raise InvalidCosts("seconds must be finite; measure the table again")
        if (seconds < 0).any() or (seconds + transition < 0).any():
            raise InvalidCosts("seconds must not be negative; measure the table again")
        if ((predecessor < NO_PREDECESSOR) | (predecessor >= np.arange(len(predecessor)))).any():
            raise InvalidCosts(f"predecessor {predecessor.tolist()} must name an earlier layer, or {NO_PREDECESSOR}")
        checked = {"seconds": seconds, "transition": transition, "predecessor": predecessor, "dense": dense}
        for name, value in (checked | self._products(seconds.shape)).items():
            object.__setattr__(self, name, value)

    def _products(self, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """What is given of products, checked."""
        kept = np.ones(shape) if self.kept is None else np.asarray(self.kept, np.float64)
        pairs = np.asarray([] if self.pairs is None else self.pairs, np.int64).reshape(-1, 2)
        pair_seconds = np.asarray([] if self.pair_seconds is None else self.pair_seconds, np.float64)
        if kept.shape != shape or pair_seconds.shape != pairs.shape[:1]:
            raise InvalidCosts(
                f"kept {kept.shape} must fit seconds {shape}, and each of {len(pairs)} pairs has seconds"
            )
        if not (np.isfinite(kept).all() and (kept > 0).all()):
            raise InvalidCosts("what is kept must be finite and more than nothing; measure the table again")
        if not (np.isfinite(pair_seconds).all() and (pair_seconds >= 0).all()):
            raise InvalidCosts("seconds of pairs must be finite and not negative; measure the table again")
        if (pairs < 0).any() or (pairs >= shape[0]).any() or (pairs[:, 0] == pairs[:, 1]).any():
            raise InvalidCosts(f"pairs {pairs.tolist()} must name two different ones of {shape[0]} layers")
        return {"kept": kept, "pairs": pairs, "pair_seconds": pair_seconds}

    def of_layers(self, choice: np.ndarray | Sequence[int]) -> np.ndarray:
        """(layers,) seconds of each layer at these level indices, (layers,); a product's are half those of each."""
        chosen = np.asarray(choice)
        rows = np.arange(len(self.seconds))
        after_dense = (self.predecessor != NO_PREDECESSOR) & self.dense[rows, chosen][self.predecessor]
        found = self.seconds[rows, chosen] + after_dense * self.transition[rows, chosen]
        products = self.pair_seconds * self.kept[rows, chosen][self.pairs].prod(axis=1)
        np.add.at(found, self.pairs, products[:, None] / 2)
        return found

    def total(self, choice: np.ndarray | Sequence[int]) -> float:
        """Seconds of all layers together at these level indices, (layers,)."""
        return float(self.of_layers(choice).sum())

    def fastest(self, errors: np.ndarray | None = None) -> np.ndarray:
        """(layers,) the levels that take least time together; of equally fast ones those with less of `errors`.

        With products it is found step by step, each no slower than the one before: exactly, where the fastest level of
        a layer is its narrowest one too.
        """
        errors = np.zeros_like(self.seconds) if errors is None else errors
        choice = self.kept.argmin(axis=1)
        found = self.apart_at(choice)._fastest(errors)
        while len(self.pairs) and self.total(found) < self.total(choice):
            choice, found = found, self.apart_at(found)._fastest(errors)
        return found

    def apart_at(self, choice: np.ndarray | Sequence[int]) -> Costs:
        """Costs without products that never take less time than these, and equally much at these level indices.

        Of two widths x and y, and x0 and y0 at the choice: x y <= (x^2 y0 / x0 + y^2 x0 / y0) / 2, for the mean of two
        numbers is no less than their geometric mean.
        """
        if not len(self.pairs):
            return self
        at_choice = self.kept[np.arange(len(self.kept)), np.asarray(choice)][self.pairs]  # (pairs, 2)
        ratios = at_choice[:, ::-1] / at_choice
        seconds = self.seconds.copy()
        np.add.at(
            seconds, self.pairs, (self.pair_seconds[:, None] * ratios / 2)[:, :, None] * self.kept[self.pairs] ** 2
        )
        return Costs(seconds, self.transition, self.predecessor, self.dense)

    def linear_at(self, choice: np.ndarray | Sequence[int]) -> tuple[Costs, float]:
        """Costs without products that take equally much at these level indices and nearly so around them, and seconds
        to add to those.

        Of two widths x and y, and x0 and y0 at the choice: x y is about x y0 + x0 y - x0 y0.
        """
        at_choice = self.kept[np.arange(len(self.kept)), np.asarray(choice)][self.pairs]
        seconds = self.seconds.copy()
        slopes = self.pair_seconds[:, None] * at_choice[:, ::-1]
        np.add.at(seconds, self.pairs, slopes[:, :, None] * self.kept[self.pairs])
        constant = -float((self.pair_seconds * at_choice.prod(axis=1)).sum())
        return Costs(seconds, self.transition, self.predecessor, self.dense), constant

    def _fastest(self, errors: np.ndarray) -> np.ndarray:
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
        return self.seconds[layer] + self.steps[layer].after_dense[:, None] * self.transition[layer]

    @cached_property
    def steps(self) -> list[_Step]:
        """How the state goes on from layer to layer."""
        steps: list[_Step] = []
        awaited: list[int] = []  # layers whose kind a later layer asks for: bit i of a state is awaited[i]
        for layer, source in enumerate(self.predecessor):
            states = np.arange(2 ** len(awaited))
            bits = {one: states >> number & 1 for number, one in enumerate(awaited)}
            after_dense = bits[source] if source in bits else np.zeros_like(states)
            awaited = [one for one in (*awaited, layer) if one in self.predecessor[layer + 1 :]]
            following = np.zeros((len(states), self.seconds.shape[1]), np.int64)
            for number, one in enumerate(awaited):
                following |= (self.dense[layer][None, :] if one == layer else bits[one][:, None]) << number
            steps.append(_Step(after_dense, following, 2 ** len(awaited)))
        return steps


def weighted_sum(several: Sequence[Costs], weights: Sequence[float]) -> Costs:
    """Costs of the same layers and levels on several devices, as one.

    Equal to the weighted sum of their totals for every choice where kernels change at the same levels everywhere; where
    they don't, never less: what a change of kernels takes counts as if there always were one.

    Args:
        several: of the same shape, with the same widths.
        weights: as many, >= 0.
    Raises:
        InvalidCosts: shapes or widths differ.
    """
    first = several[0]
    if any(one.seconds.shape != first.seconds.shape or (one.kept != first.kept).any() for one in several):
        raise InvalidCosts("times of several devices must be of the same layers, levels and widths")
    alike = all((one.dense == first.dense).all() and (one.predecessor == first.predecessor).all() for one in several)
    scales = np.asarray(weights)[:, None, None]
    seconds = (scales * [one.seconds for one in several]).sum(axis=0)
    changes = np.array([one.transition for one in several])
    transition = (scales * (changes if alike else np.maximum(changes, 0))).sum(axis=0)
    pairs = np.concatenate([one.pairs for one in several])
    pair_seconds = np.concatenate([weight * one.pair_seconds for weight, one in zip(weights, several, strict=True)])
    if alike:
        return Costs(seconds, transition, first.predecessor, first.dense, first.kept, pairs, pair_seconds)
    return Costs(seconds + transition, kept=first.kept, pairs=pairs, pair_seconds=pair_seconds)


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
