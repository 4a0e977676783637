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
class Product:
    """Seconds that several layers take together: the product of a factor of each.

    A convolution between two groups of units takes time for each pair of what they keep; what is in a branch that may
    go takes time as long as the branch is there.

    Attributes:
        layers: different ones, at least two.
        factors: (these layers, levels), >= 0.
    """

    layers: tuple[int, ...]
    factors: np.ndarray

    def scaled(self, scale: float) -> Product:
        """So many times the seconds."""
        return Product(self.layers, np.concatenate([scale * self.factors[:1], self.factors[1:]]))


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
        products: what several layers take together.

    >>> costs = Costs(np.array([[3.0, 1.0], [3.0, 1.0]]), np.array([[0.0, 0.0], [0.0, 0.5]]), np.array([-1, 0]))
    >>> costs.total([0, 1]), costs.total([1, 1])
    (4.5, 2.0)
    """

    seconds: np.ndarray
    transition: np.ndarray = None  # type: ignore[assignment]  # these are set below
    predecessor: np.ndarray = None  # type: ignore[assignment]
    dense: np.ndarray = None  # type: ignore[assignment]
    products: tuple[Product, ...] = ()

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
        for name, value in (checked | {"products": tuple(self._checked(one) for one in self.products)}).items():
            object.__setattr__(self, name, value)

    def _checked(self, product: Product) -> Product:
        layers, levels = np.shape(self.seconds)
        factors = np.asarray(product.factors, np.float64)
        if len(product.layers) < 2 or factors.shape != (len(product.layers), levels):
            raise InvalidCosts(
                f"a product's factors {factors.shape} must be (its layers, {levels} levels), two or more"
            )
        if len({*product.layers}) < len(product.layers) or not {*product.layers} <= {*range(layers)}:
            raise InvalidCosts(f"a product of layers {[*product.layers]} must name different ones of {layers}")
        if not (np.isfinite(factors).all() and (factors >= 0).all()):
            raise InvalidCosts("a product's factors must be finite and not negative; measure the table again")
        return Product(tuple(map(int, product.layers)), factors)

    @cached_property
    def _several(self) -> list[_Several]:
        """The products, those of equally many layers together."""
        counts = sorted({len(one.layers) for one in self.products})
        alike = ([one for one in self.products if len(one.layers) == count] for count in counts)
        return [
            _Several(np.array([one.layers for one in some]), np.array([one.factors for one in some])) for some in alike
        ]

    def of_layers(self, choice: np.ndarray | Sequence[int]) -> np.ndarray:
        """(layers,) seconds of each layer at these level indices, (layers,); a product's are shared out equally."""
        chosen = np.asarray(choice)
        rows = np.arange(len(self.seconds))
        after_dense = (self.predecessor != NO_PREDECESSOR) & self.dense[rows, chosen][self.predecessor]
        found = self.seconds[rows, chosen] + after_dense * self.transition[rows, chosen]
        for one in self._several:
            np.add.at(found, one.layers, one.at(chosen).prod(axis=1)[:, None] / one.count)
        return found

    def total(self, choice: np.ndarray | Sequence[int]) -> float:
        """Seconds of all layers together at these level indices, (layers,)."""
        return float(self.of_layers(choice).sum())

    def alone(self, layer: int) -> np.ndarray:
        """(levels,) seconds of a layer, when what it shares with others counts as if those were dense."""
        seconds = self.seconds[layer].copy()
        for one in self.products:
            if layer in one.layers:
                place = one.layers.index(layer)
                seconds += one.factors[place] * np.delete(one.factors[:, 0], place).prod()
        return seconds

    def fastest(self, errors: np.ndarray | None = None) -> np.ndarray:
        """(layers,) the levels that take least time together; of equally fast ones those with less of `errors`.

        With products it is found step by step, each no slower than the one before, from what is fastest alone and from
        the same level everywhere: exactly, where the fastest level of a layer has its least factors too.
        """
        errors = np.zeros_like(self.seconds) if errors is None else errors
        if not self.products:
            return self._fastest(errors)
        alone = np.array([self.alone(layer).argmin() for layer in range(len(self.seconds))])
        alike = [np.full_like(alone, level) for level in range(self.seconds.shape[1])]
        best = min(alike, key=self.total)
        ends = [self._faster(start, errors) for start in (alone, best)]
        return min(ends, key=self.total)

    def _faster(self, choice: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """What no step makes faster any more."""
        found = self.apart_at(choice)._fastest(errors)
        while self.total(found) < self.total(choice):
            choice, found = found, self.apart_at(found)._fastest(errors)
        return found

    def apart_at(self, choice: np.ndarray | Sequence[int]) -> Costs:
        """Costs without products that never take less time than these, and equally much at these level indices.

        Of factors x, y, ... of m layers, and x0, y0, ... at the choice: x y ... <= x0 y0 ... ((x / x0)^m + (y / y0)^m +
        ...) / m, for the mean of numbers is no less than their geometric mean. Where x0 = 0: at most x with the others'
        largest.
        """
        if not self.products:
            return self
        seconds = self.seconds.copy()
        for one in self._several:
            at = one.at(choice)  # (products, m)
            zero = at == 0
            product, ratios = at.prod(axis=1), one.factors / np.where(zero, 1, at)[:, :, None]
            bound = np.where(zero.any(axis=1)[:, None, None], 0, product[:, None, None] * ratios**one.count / one.count)
            for number in np.flatnonzero(zero.any(axis=1)):
                place = zero[number].argmax()
                others = np.delete(one.factors[number], place, axis=0).max(axis=1).prod()
                bound[number, place] = one.factors[number, place] * others
            np.add.at(seconds, one.layers, bound)
        return Costs(seconds, self.transition, self.predecessor, self.dense)

    def linear_at(self, choice: np.ndarray | Sequence[int]) -> tuple[Costs, float]:
        """Costs without products that take equally much at these level indices and nearly so around them, and seconds
        to add to those.

        Of two factors x and y, and x0 and y0 at the choice: x y is about x y0 + x0 y - x0 y0.
        """
        return self._linear([one.at(choice) for one in self._several])

    def linear_below(self) -> list[tuple[Costs, float]]:
        """The same at the least factors, and at the largest: nowhere do they take more than these costs."""
        if not self.products:
            return [(self, 0.0)]
        return [
            self._linear([one.factors.min(axis=2) for one in self._several]),
            self._linear([one.factors.max(axis=2) for one in self._several]),
        ]

    def _linear(self, around: Sequence[np.ndarray]) -> tuple[Costs, float]:
        seconds, constant = self.seconds.copy(), 0.0
        for one, at in zip(self._several, around, strict=True):
            slopes = np.stack([np.delete(at, place, axis=1).prod(axis=1) for place in range(one.count)], axis=1)
            np.add.at(seconds, one.layers, slopes[:, :, None] * one.factors)
            constant -= (one.count - 1) * float(at.prod(axis=1).sum())
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
        several: of the same shape.
        weights: as many, >= 0.
    Raises:
        InvalidCosts: shapes differ.
    """
    first = several[0]
    if any(one.seconds.shape != first.seconds.shape for one in several):
        raise InvalidCosts("times of several devices must be of the same layers and levels")
    alike = all((one.dense == first.dense).all() and (one.predecessor == first.predecessor).all() for one in several)
    scales = np.asarray(weights)[:, None, None]
    seconds = (scales * [one.seconds for one in several]).sum(axis=0)
    changes = np.array([one.transition for one in several])
    transition = (scales * (changes if alike else np.maximum(changes, 0))).sum(axis=0)
    products = tuple(
        product.scaled(weight) for weight, one in zip(weights, several, strict=True) for product in one.products
    )
    if alike:
        return Costs(seconds, transition, first.predecessor, first.dense, products)
    return Costs(seconds + transition, products=products)


@dataclass(frozen=True)
class _Several:
    """Products of equally many layers.

    Attributes:
        layers: (products, layers of each).
        factors: (products, layers of each, levels).
    """

    layers: np.ndarray
    factors: np.ndarray

    @property
    def count(self) -> int:
        """How many layers each has."""
        return self.layers.shape[1]

    def at(self, choice: np.ndarray | Sequence[int]) -> np.ndarray:
        """(products, layers of each) the factors at level indices, (layers,)."""
        chosen = np.asarray(choice)[self.layers]
        return np.take_along_axis(self.factors, chosen[:, :, None], axis=2)[:, :, 0]


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
