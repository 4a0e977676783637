"""Which indices, of which axes, stand and fall together.

Every index of every axis of a stored tensor is an *atom*, a number. Atoms that must be removed together are tied; some
are frozen, because something that isn't understood, or mustn't change, depends on them. Classes of tied atoms are what
becomes the units of groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Atoms:
    """The atoms of a graph: how many there are, which are tied, and which are frozen and why.

    Attributes:
        count: of atoms.
        frozen: (atoms, reason), in the order in which they were found.
    """

    count: int = 0
    frozen: list[tuple[np.ndarray, str]] = field(default_factory=list)
    _ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def new(self, size: int) -> np.ndarray:
        """(size,) atoms that there weren't before."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def tie(self, some: np.ndarray, others: np.ndarray) -> None:
        """Each of `some` goes with the one of `others` at its place; shapes are broadcast."""
        some, others = np.broadcast_arrays(some, others)
        self._ties.append((some.ravel(), others.ravel()))

    def freeze(self, some: np.ndarray, reason: str) -> None:
        """These can't be removed."""
        self.frozen.append((some.ravel(), reason))

    def classes(self) -> np.ndarray:
        """(count,) for each atom the smallest one of its class."""
        root = np.arange(self.count)
        if not self._ties:
            return root
        some, others = (np.concatenate(side) for side in zip(*self._ties, strict=True))
        while True:
            a, b = root[some], root[others]
            if (a == b).all():
                return root
            lower = np.minimum(a, b)
            np.minimum.at(root, a, lower)
            np.minimum.at(root, b, lower)
            while not np.array_equal(above := root[root], root):
                root = above
