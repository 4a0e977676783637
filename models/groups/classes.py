"""The classes of tied atoms, once each value can be cut to a smaller one: an axis shrinks, or it doesn't."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_spdy.models.groups.atoms import Atoms
from onnx_spdy.models.groups.labels import Factor

MIXED = -1  # atoms that differ along several axes


class Classes:
    """Which atoms go together, and which of these classes are frozen.

    A value with atoms along several axes, (heads, head_dim) say, can lose indices of one axis only. Where the ties
    leave it open which one, it is the longest.

    Attributes:
        reason: (atoms) for the first atom of each class the number of the first reason why it is frozen; -1 if none.
    """

    def __init__(self, atoms: Atoms, factors: Sequence[Factor], inclusions: Sequence[tuple[Factor, Factor]]) -> None:
        self._atoms = atoms
        self._root = atoms.classes()
        self._straighten([factor for factor in factors if len(factor.axes) > 1])
        tied = [self._include(whole, part) for whole, part in inclusions]
        self._root = atoms.classes()
        self._straighten([factor for factor in factors if len(factor.axes) > 1])
        for (whole, part), before in zip(inclusions, tied, strict=True):
            if active_axis(self.of(whole.atoms)) != before:  # later ties turned it another way
                for factor in (whole, part):
                    atoms.freeze(factor.atoms, "values on some of its axes meet it in two ways")
        self.reason = np.full(atoms.count, -1)
        for number, (some, _) in reversed(list(enumerate(atoms.frozen))):
            self.reason[self.of(some)] = number

    def of(self, atoms: np.ndarray) -> np.ndarray:
        """The class of each atom: its smallest atom."""
        return self._root[atoms]

    def why(self, classes: np.ndarray) -> str | None:
        """The first reason why one of the classes is frozen."""
        reasons = self.reason[classes]
        reasons = reasons[reasons >= 0]
        return self._atoms.frozen[reasons.min()][1] if len(reasons) else None

    def _straighten(self, factors: Sequence[Factor]) -> None:
        """Tie until each factor differs along one axis at most."""
        open_ones = list(factors)
        while mixed := [one for one in open_ones if active_axis(self.of(one.atoms)) == MIXED]:
            atoms = mixed[0].atoms
            longest = int(np.argmax(atoms.shape))
            rows = np.moveaxis(atoms, longest, 0).reshape(atoms.shape[longest], -1)
            self._atoms.tie(rows[:, :1], rows)
            self._root = self._atoms.classes()
            open_ones = mixed[1:]

    def _include(self, whole: Factor, part: Factor) -> int | None:
        """Let what is on some of a factor's axes go with it, or stay."""
        active = active_axis(self.of(whole.atoms))
        if active is not None and whole.axes[active] in part.axes:
            self._atoms.tie(part.spread(whole.axes, whole.atoms.shape), whole.atoms)
        else:
            self._atoms.freeze(part.atoms, "it is the same for all units")
        return active


def active_axis(classes: np.ndarray) -> int | None:
    """The one axis along which classes differ; None if they are all the same, MIXED if there are several."""
    if classes.ndim == 1:
        return 0
    if (classes == classes.flat[0]).all():
        return None
    for axis in range(classes.ndim):
        rows = np.moveaxis(classes, axis, 0).reshape(classes.shape[axis], -1)
        if (rows == rows[:, :1]).all():
            return axis
    return MIXED
