"""Greedy OBS elimination: the order in which each row of a layer gives up its weights, and what each one costs.

In each row, again and again: remove the unit (a weight; for block4 a run of 4 input channels) whose removal raises the
squared output error least after all other weights have been adapted, w_G^T ([H^-1]_GG)^-1 w_G, and adapt them. One
trace of a row holds all its levels. Output channels that share their zeros are one row here: what is left of H^-1 is
the same for all of them, and what a removal costs is a sum over them.

The inverse of H on what a row has left is H^-1 - V^T V with a row of V for each weight that is gone (the Cholesky
factor of H^-1 in the order of removal). Only V is kept, on the columns that are left, and columns of the inverse are
computed when they are needed: d^3 / 3 multiplications for a whole trace, half of what updates of the inverse take, a
quarter of the memory, and H^-1 is shared by all rows.

With `panels` up to `PANEL` removals are found at a time, among the cheapest `CANDIDATES` times as many units at the
panel's start: nearly always the same and much faster. The last `TAIL` units of a row are one panel with all of them
as candidates, which is exact. Without panels every removal is found among all units.

Source: Frantar & Alistarh, OBC (NeurIPS 2022), Algorithms 1 and 2 and section 4.2 (N:M, blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from onnx_spdy.pipeline.database.pruners.panel import Panel, removal_costs
from onnx_spdy.pipeline.database.pruners.quadratic import cholesky, inverse, solve_nested
from onnx_spdy.pipeline.level import Level

PANEL = 64  # removals that are found together
PANEL_PART = 12  # and at most one in so many of what is left: the last removals matter most
CANDIDATES = 2
TAIL = 256
CUT = 10  # columns that are gone are cut out of V when they are a part of so many
PADDED = 1.1  # how much longer than its shortest row the longest row of a batch may be
STATE_BYTES = 768 << 20  # of the rows that are worked on together, or one row's V where that is larger


@dataclass(frozen=True)
class Units:
    """What is removed at a time, and how many go in each group.

    Attributes:
        columns: (units, size) of `weight.flatten(1)`; a ragged run of channels is filled up with -1.
        group: (units,) the unit's N:M group, or None.
        quota: (groups,) how many units of a group go, or None for all.
        steps: removals in a row's whole trace.
        outputs: how many consecutive output channels are a row.
    """

    columns: torch.Tensor
    group: torch.Tensor | None
    quota: torch.Tensor | None
    steps: int
    outputs: int = 1

    @classmethod
    def of(cls, shape: Sequence[int], level: Level) -> Units:
        """Those of a layer (out, in, *kernel) for the pattern of a level."""
        channels, positions = shape[1], int(torch.Size(shape[2:]).numel())
        outputs, size = level.block
        every = torch.full((-(-channels // size) * size, positions), -1)
        every[:channels] = torch.arange(channels * positions).view(channels, positions)
        columns = every.view(-1, size, positions).movedim(1, 2).reshape(-1, size)
        if not level.is_n_of_m:
            return cls(columns, None, None, len(columns), outputs)
        kept, wide = level.group
        channel = torch.arange(channels).repeat_interleave(positions)
        position = torch.arange(positions).repeat(channels)
        group = channel // wide * positions + position
        quota = (torch.bincount(group) - kept).clamp_min(0)  # a ragged group keeps up to N too
        return cls(columns, group, quota, int(quota.sum()))

    def first(self, count: int) -> Units:
        """So many units that may all go."""
        return Units(self.columns[:count], None, None, count, self.outputs)

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """(out, n) -> (rows, n, outputs); a ragged row is filled up with 0."""
        padded = functional.pad(values, (0, 0, 0, -len(values) % self.outputs))
        return padded.view(-1, self.outputs, values.shape[1]).movedim(1, 2)


def eliminate(
    dense: torch.Tensor, inverted: torch.Tensor, units: Units, *, panels: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy traces of all rows.

    Args:
        dense: (out, d).
        inverted: (d, d), H^-1, in the precision of the computation.
        units: what is removed at a time.
        panels: find removals in panels, or each among all units.
    Returns:
        order (rows, steps) of units, first removed first; losses (rows, steps), rise of the squared error by each.
    """
    columns = units.columns.flatten()
    missing = columns < 0  # what a ragged unit lacks
    matrix = _submatrix(inverted, columns, missing)
    weight = units.by_row(dense[:, columns].masked_fill_(missing, 0.0)).unflatten(1, units.columns.shape)
    if units.steps == 0:
        return torch.zeros(len(weight), 0, dtype=torch.long), dense.new_zeros(len(weight), 0)
    at_once = max(1, STATE_BYTES // (matrix.element_size() * _room(units)))
    alike = -(-len(weight) // -(-len(weight) // at_once))  # as many rows in each part
    parts = [_trace(_Rows(rows, matrix[None], units), units, panels) for rows in weight.split(alike)]
    return torch.cat([order for order, _ in parts]), torch.cat([losses for _, losses in parts])


def eliminate_rest(
    dense: torch.Tensor, hessian: torch.Tensor, units: Units, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy traces, in panels, of rows that have given up some of their units already.

    Args:
        dense: (out, d).
        hessian: (d, d), positive definite.
        units: what is removed at a time; no groups.
        mask: (out, d) bool, what each output has left; the same for those of a row.
    Returns:
        As `eliminate`; what is gone already comes first in a row's order and costs nothing.
    """
    left = mask[:: units.outputs, units.columns[:, 0]]  # (rows, units)
    counts = left.sum(1)
    by_need = left.to(torch.uint8).sort(dim=1, stable=True).indices  # what is gone comes first
    order, losses = by_need.clone(), dense.new_zeros(by_need.shape)
    target = units.by_row(dense @ hessian)
    rows = torch.argsort(counts)[int((counts == 0).sum()) :]  # neighbours need little padding
    while len(rows):
        some = units.first(int(counts[rows[-1]]))  # as many as the longest row of the batch has
        count, size = some.columns.shape
        state = dense.element_size() * (_room(some) + 3 * (count * size) ** 2)
        alike = int((counts[rows] * PADDED >= count).sum())
        chunk, rows = rows.tensor_split([len(rows) - min(max(1, STATE_BYTES // state), alike)])[::-1]
        places = by_need[chunk, -count:]  # (rows, count); padding at the start
        columns = units.columns[places].flatten(1)
        missing = (columns < 0) | ~left[chunk].gather(1, places).repeat_interleave(size, 1)
        inverted = inverse(_submatrix(hessian, columns, missing))
        wanted = target[chunk[:, None], columns.clamp_min(0)].masked_fill_(missing.unsqueeze(2), 0.0)
        adapted = (inverted @ wanted).unflatten(1, (count, size))
        found, costs = _trace(_Rows(adapted, inverted, some), some, panels=True)
        # Padding has weight 0 and costs nothing; it is gone before, in whatever order.
        padded = ~left[chunk[:, None], places.gather(1, found)]
        stays = padded.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        order[chunk, -count:] = places.gather(1, found).gather(1, stays)
        losses[chunk, -count:] = costs.masked_fill(padded, 0.0).gather(1, stays)
    return order, losses


def _submatrix(matrix: torch.Tensor, columns: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """A (d, d) matrix at columns (..., n), on both sides; those that are missing are correlated with nothing."""
    found = matrix[columns.unsqueeze(-1), columns.unsqueeze(-2)]
    found.masked_fill_(missing.unsqueeze(-1) | missing.unsqueeze(-2), 0.0)
    found.diagonal(dim1=-2, dim2=-1).add_(missing.to(found.dtype))
    return found


def _trace(rows: _Rows, units: Units, panels: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`eliminate` for some rows."""
    order, losses, done = [], [], 0
    while done < units.steps:
        costs = rows.costs()
        if not panels:
            loss, found = costs.min(1, keepdim=True)
            factor = rows.factor_at(found)
            losses.append(loss)
        else:
            count, width = _panel(costs.shape[1], units.steps - done)
            chosen = costs.topk(width, largest=False).indices  # (rows, width)
            panel = Panel(rows, chosen, count)
            while len(panel.order) < count and panel.step():
                pass
            best = torch.stack(panel.order, 1)  # (rows, count) of the candidates
            found, factor = chosen.gather(1, best), panel.factor[rows.row, _flat(best, units.columns.shape[1])]
            losses.append(torch.stack(panel.losses, 1))
        order.append(rows.left.gather(1, found))
        done += found.shape[1]
        if done < units.steps:
            rows.remove(found, factor)
    return torch.cat(order, 1), torch.cat(losses, 1)


def _panel(left: int, steps: int) -> tuple[int, int]:
    """How many removals come next, and among how many candidates, with `left` units of which `steps` will go."""
    if left <= TAIL:
        return steps, left
    count = min(steps, PANEL, max(1, left // PANEL_PART))
    return count, min(left, CANDIDATES * count)


def _room(units: Units) -> int:
    """The most elements that V of one row takes: rows of what is gone and goes until the next cut, by columns."""
    count, size = units.columns.shape
    gone = torch.arange(units.steps + 1)
    rows = (gone + (count - gone) // CUT + max(PANEL, TAIL) + 1).clamp_max(units.steps)  # as in _Rows._view
    return int((rows * (count - gone)).max()) * size * size


class _Rows:
    """Rows on the way through their traces.

    Attributes:
        row: (rows, 1), 0 to rows - 1, for indices.
        left: (rows, units), which unit is where; what is gone stays until the next cut.
        weight: (rows, units, size, outputs), adapted.
        blocks: (rows, units, size, size), the diagonal blocks of the inverse.
        barred: (rows, units), what can't be removed.
        quota: (rows, groups), how many units of a group can still go, or None.
        group: (rows, units) each unit's group, or None.
    """

    def __init__(self, weight: torch.Tensor, matrix: torch.Tensor, units: Units) -> None:
        rows, count, size, _ = weight.shape
        self.row = torch.arange(rows)[:, None]
        self._matrix, self._units = matrix.expand(rows, -1, -1), units  # (rows or 1, columns, columns) H^-1
        self.left = torch.arange(count).expand(rows, -1)
        self._gone = torch.zeros(rows, count, dtype=torch.bool)
        self._storage = matrix.new_empty(rows, _room(units))
        self._removed = 0  # rows of V
        self._whole = self._view(count)
        self.weight = weight.clone(memory_format=torch.contiguous_format)
        diagonal = matrix.view(-1, count, size, count, size).diagonal(dim1=1, dim2=3).movedim(3, 1)
        self.blocks = diagonal.expand(rows, -1, -1, -1).clone()
        self.quota = None if units.quota is None else units.quota.expand(rows, -1).clone()
        self._bar()

    def _view(self, count: int) -> torch.Tensor:
        """(rows, count * size, most rows of V until the next cut)."""
        size = self._units.columns.shape[1]
        most = min(self._units.steps * size, self._removed + (count // CUT + max(PANEL, TAIL) + 1) * size)
        return self._storage[:, : count * size * most].view(len(self._storage), count * size, most)

    def _bar(self) -> None:
        self.group = None if self._units.group is None else self._units.group[self.left]
        self.barred = self._gone.clone()
        if self.quota is not None and self.group is not None:
            self.barred |= self.quota.gather(1, self.group) == 0

    @property
    def _factor(self) -> torch.Tensor:
        """(rows, units * size, removed), V^T: what is gathered and cut lies together in memory."""
        return self._whole[:, :, : self._removed]

    def costs(self) -> torch.Tensor:
        """(rows, units) what the removal of each would cost."""
        return removal_costs(self.weight, self.blocks).masked_fill_(self.barred, torch.inf)

    def factor_at(self, places: torch.Tensor) -> torch.Tensor:
        """(rows, n * size, removed): V^T at these places (rows, n)."""
        return self._factor[self.row, _flat(places, self.weight.shape[2])]

    def inverse_at(self, places: torch.Tensor, factor: torch.Tensor, *, by_all: bool) -> torch.Tensor:
        """The inverse at places (rows, n), where V^T is `factor`, by all of the row or by themselves."""
        size = self.weight.shape[2]
        left = self.left if by_all else self.left.gather(1, places)
        first, second = _flat(self.left.gather(1, places), size), _flat(left, size)
        of_all = self._matrix[self.row[:, :, None], first.unsqueeze(2), second.unsqueeze(1)]
        other = (self._factor if by_all else factor).mT
        return of_all.baddbmm_(factor, other, alpha=-1)

    def remove(self, found: torch.Tensor, factor: torch.Tensor) -> None:
        """Remove the units at `found` (rows, count), where V^T is `factor`."""
        size = self.weight.shape[2]
        flat = _flat(found, size)
        columns = self.inverse_at(found, factor, by_all=True)
        pivots = cholesky(columns.gather(2, flat.unsqueeze(1).expand(-1, flat.shape[1], -1)))
        identity = torch.eye(flat.shape[1], dtype=pivots.dtype)
        unfactor = torch.linalg.solve_triangular(pivots, identity, upper=False)
        new = unfactor @ columns  # (rows, count, left)
        self._whole[:, :, self._removed : self._removed + flat.shape[1]] = new.mT
        flat_weight = self.weight.flatten(1, 2)  # the same memory
        flat_weight -= new.mT @ (unfactor @ flat_weight[self.row, flat])
        if size == 1:
            self.blocks -= new.square().sum(1).view_as(self.blocks)
        else:
            members = new.view(len(found), flat.shape[1], -1, size)
            self.blocks -= torch.einsum("rkus,rkut->rust", members, members)
        self._removed += flat.shape[1]
        self._gone[self.row, found] = True
        self.weight[self._gone] = 0.0
        self.blocks[self._gone] = torch.eye(size, dtype=self.blocks.dtype)
        if self.quota is not None and self.group is not None:
            self.quota.scatter_add_(1, self.group.gather(1, found), torch.full_like(found, -1))
        if int(self._gone[0].sum()) * CUT >= self._gone.shape[1]:
            self._cut()
        self._bar()

    def _cut(self) -> None:
        """Keep only the columns of what is left; every row has lost the same number."""
        stay = torch.nonzero(~self._gone)[:, 1].view(len(self._gone), -1)
        flat = _flat(stay, self.weight.shape[2])
        before = self._factor
        self._whole = self._view(stay.shape[1])
        for old, new, index in zip(before, self._factor, flat, strict=True):
            new.copy_(old.index_select(0, index))  # of one row at a time: old and new overlap
        self.weight, self.blocks = self.weight[self.row, stay], self.blocks[self.row, stay]
        self.left, self._gone = self.left.gather(1, stay), self._gone.gather(1, stay)


def _flat(units: torch.Tensor, size: int) -> torch.Tensor:
    """(rows, n) units -> (rows, n * size) columns."""
    return units if size == 1 else (units.unsqueeze(2) * size + torch.arange(size)).flatten(1)


def kept_columns(
    order: torch.Tensor, losses: torch.Tensor, units: Units, levels: Sequence[Level]
) -> list[tuple[torch.Tensor, list[int]]]:
    """For each row its columns, the most precious first, and how many of them it keeps at each level.

    Unstructured and block levels merge the rows: the next unit of the whole layer is the cheapest of the rows' next
    ones. So a unit goes after every dearer one before it in its row: the order is that of the running maxima.
    """
    total = torch.tensor([level.zeros(order.shape[0] * len(units.columns)) for level in levels])  # units, of the layer
    if units.quota is None:
        ranks = losses.cummax(1).values.flatten().sort(stable=True).indices  # of equal ones the earlier
        place = torch.empty_like(ranks)
        place[ranks] = torch.arange(len(ranks))
        removed = torch.searchsorted(place.view(losses.shape).sort(1).values, total.expand(len(order), -1).contiguous())
    else:
        removed = torch.full((len(order), len(levels)), units.steps)
    found = []
    for trace, gone in zip(order, removed.tolist(), strict=True):
        never = torch.ones(len(units.columns), dtype=torch.bool)
        never[trace] = False
        columns = units.columns[torch.cat([torch.nonzero(never).flatten(), trace.flip(0)])]
        counts = (columns >= 0).sum(1).cumsum(0).tolist()
        kept = [counts[len(columns) - n - 1] if n < len(columns) else 0 for n in gone]
        flat = columns.flatten()
        found.append((flat[flat >= 0], kept))
    return found


def solutions(
    dense: torch.Tensor, hessian: torch.Tensor, units: Units, kept: Sequence[tuple[torch.Tensor, list[int]]]
) -> list[torch.Tensor]:
    """The exact least-squares weights (out, d) of each level; `kept` as `kept_columns` gives it."""
    target = dense @ hessian
    found = [torch.zeros_like(dense) for _ in (kept[0][1] if kept else [])]
    for row, (order, counts) in enumerate(kept):
        own = slice(row * units.outputs, (row + 1) * units.outputs)
        for weights, some in zip(found, solve_nested(hessian, target[own], order, counts), strict=True):
            weights[own] = some
    return found
