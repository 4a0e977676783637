"""Unit pruners: the layers that take a group's units in, and which units and weights are left at each width.

A unit (a channel, a feed-forward unit, an attention head) goes from all of its consumers at once: their input columns
for it become zero. One file each, and one line in `UNIT_PRUNERS` of `pruners/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Consumer:
    """A layer that takes a group's units in.

    Attributes:
        weight: (out, in, *kernel), dense.
        hessian: (d, d) with d = in * prod(kernel), as a pruner of layers gets it.
        columns: (units) for each unit the columns of `weight.flatten(1)` on which it lies, ascending; empty where it
            has none. Columns of no unit belong to other groups: they stay.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    columns: Sequence[torch.Tensor]


class UnitPruner(Protocol):
    """Compress the consumers of a group to several widths."""

    def __call__(
        self, consumers: Sequence[Consumer], widths: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Yield what is left at each width, in the order of `widths`.

        Args:
            consumers: of one group, at least one.
            widths: how many units stay, each less than the one before.
        Yields:
            (width,) numbers of the units that stay, ascending; and for each consumer its weights
            (out, in, *kernel), exact zeros in the columns of the other units, a new tensor for each width.
        """
