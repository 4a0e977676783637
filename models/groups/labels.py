"""What the tracing knows of a value: its shape, and the atoms along its axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, eq=False)
class Factor:
    """Atoms along one axis of a value, or along several: (heads, head_dim) after a Reshape of heads * head_dim.

    Attributes:
        axes: of the value, ascending.
        atoms: shape as that of the value on these axes.
    """

    axes: tuple[int, ...]
    atoms: np.ndarray

    def spread(self, axes: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        """The atoms with axes of size 1 for those of `axes` that the factor hasn't; broadcast to the `sizes`."""
        own = dict(zip(self.axes, self.atoms.shape, strict=True))
        return np.broadcast_to(self.atoms.reshape([own.get(axis, 1) for axis in axes]), tuple(sizes))

    def first_along(self, axis: int) -> Factor:
        """The first atoms along an axis, on the axes that are left."""
        left = tuple(one for one in self.axes if one != axis)
        return Factor(left, self.atoms.take(0, axis=self.axes.index(axis)))

    def moved(self, where: Sequence[int] | dict[int, int]) -> Factor:
        """With axis `where[k]` for its axis k."""
        axes = [where[axis] for axis in self.axes]
        order = np.argsort(axes)
        return Factor(tuple(axes[k] for k in order), self.atoms.transpose(order))


@dataclass(frozen=True, eq=False)
class Labelled:
    """A value of the graph.

    Attributes:
        shape: None if it isn't known.
        factors: no axis is in two of them; an axis in none can't shrink.
        stored: it depends on stored tensors only.
    """

    shape: tuple[int, ...] | None
    factors: tuple[Factor, ...] = ()
    stored: bool = False

    def factor(self, axis: int) -> Factor | None:
        """The one that an axis is in."""
        return next((factor for factor in self.factors if axis in factor.axes), None)


def reshaped(factors: Iterable[Factor], before: Sequence[int], after: Sequence[int]) -> tuple[Factor, ...] | None:
    """The factors of a value whose shape becomes another one, by the order of its elements.

    Returns:
        None where atoms of two factors end up on one axis.
    """
    segments = _segments(before, after)
    found = list(factors)
    # From behind, so that axes before a segment still have their numbers; new numbers are below -1 until the end.
    for (first, last), (start, stop) in segments:
        inside = [factor for factor in found if any(first <= axis < last for axis in factor.axes)]
        if last - first == stop - start == 1:
            found = [_renumbered(factor, {first: ~start}) for factor in found]
        elif len(inside) > 1:
            return None
        elif inside:
            found = [factor for factor in found if factor is not inside[0]]
            found.append(_through(inside[0], range(first, last), before, range(start, stop), after))
    done = [Factor(tuple(~axis for axis in factor.axes), factor.atoms) for factor in found]
    return tuple(_simple(factor.moved({axis: axis for axis in factor.axes})) for factor in done)


def _segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The shortest runs of axes with equal products: ((first, last), (start, stop)) before and after."""
    cuts = [(0, 0)]
    i = j = 0
    p = q = 1
    while i < len(before) or j < len(after):
        if (p <= q and i < len(before)) or j == len(after):
            p, i = p * before[i], i + 1
        else:
            q, j = q * after[j], j + 1
        if p == q and p > 1:
            cuts.append((i, j))
            p = q = 1
    if cuts[-1] != (len(before), len(after)):  # axes of size 1 at the end
        cuts.append((len(before), len(after)))
    return [((a, c), (b, d)) for (a, b), (c, d) in pairwise(cuts)]


def _renumbered(factor: Factor, where: dict[int, int]) -> Factor:
    return Factor(tuple(where.get(axis, axis) for axis in factor.axes), factor.atoms)


def _through(factor: Factor, old: range, before: Sequence[int], new: range, after: Sequence[int]) -> Factor:
    """A factor whose axes in `old` become those in `new`, which are marked with ~."""
    others = [axis for axis in factor.axes if axis not in old]
    sizes = dict(zip(factor.axes, factor.atoms.shape, strict=True))
    order = [*others, *(axis for axis in factor.axes if axis in old)]
    atoms = factor.atoms.transpose([factor.axes.index(axis) for axis in order])
    rest = [sizes[axis] for axis in others]
    atoms = atoms.reshape([*rest, *(sizes.get(axis, 1) for axis in old)])
    atoms = np.broadcast_to(atoms, [*rest, *(before[axis] for axis in old)]).reshape([*rest, *(after[k] for k in new)])
    return Factor((*others, *(~axis for axis in new)), atoms)


def _simple(factor: Factor) -> Factor:
    """Without the axes along which the atoms are the same, from the last; one axis stays."""
    axes, atoms = list(factor.axes), factor.atoms
    for position in reversed(range(len(axes))):
        if len(axes) > 1 and (atoms == atoms.take([0], axis=position)).all():
            atoms = atoms.take(0, axis=position)
            del axes[position]
    return Factor(tuple(axes), atoms)
