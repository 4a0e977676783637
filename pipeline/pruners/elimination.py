"""Greedy OBS elimination: the order in which each row of a layer gives up its weights, and what each one costs.

In each row, again and again: remove the unit (a weight; for block4 a run of 4 input channels) whose removal raises the
squared output error least after all other weights have been adapted, w_G^T ([H^-1]_GG)^-1 w_G, and adapt them. One
trace of a row holds all its levels.

A panel of `PANEL` removals is found first, on few columns, and then applied to the inverse in one matrix product; what
is removed is cut out of the inverse now and then. With `candidates` a panel is found among the so many units that are
cheapest at its start, which is nearly always the same and much faster; without, among all.

Source: Frantar & Alistarh, OBC (NeurIPS 2022), Algorithms 1 and 2 and section 4.2 (N:M, blocks).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.pruners.quadratic import solve_nested

PANEL = 64  # removals that are applied to the inverse together
STATE_BYTES = 768 << 20  # of the rows that are worked on together, or one row's inverse where that is larger


class Units:
    """What is removed at a time, and how many go in each group.

    Attributes:
        columns: (units, size) of `weight.flatten(1)`; a ragged run of channels is filled up with -1.
        group: (units,) the unit's N:M group, or None.
        quota: (groups,) how many units of a group go, or None for all.
        steps: removals in a row's whole trace.
    """

    def __init__(self, shape: Sequence[int], level: Level) -> None:
        channels, positions = shape[1], int(torch.Size(shape[2:]).numel())
        size = 4 if level.pattern == "block4" else 1
        every = torch.full((-(-channels // size) * size, positions), -1)
        every[:channels] = torch.arange(channels * positions).view(channels, positions)
        self.columns = every.view(-1, size, positions).movedim(1, 2).reshape(-1, size)
        self.group: torch.Tensor | None = None
        self.quota: torch.Tensor | None = None
        self.steps = len(self.columns)
        if level.is_n_of_m:
            kept, wide = level.group
            channel = torch.arange(channels).repeat_interleave(positions)
            position = torch.arange(positions).repeat(channels)
            self.group = channel // wide * positions + position
            self.quota = (torch.bincount(self.group) - kept).clamp_min(0)  # a ragged group keeps up to N too
            self.steps = int(self.quota.sum())


def eliminate(
    dense: torch.Tensor, inverse: torch.Tensor, units: Units, candidates: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy traces of all rows.

    Args:
        dense: (out, d).
        inverse: (d, d), H^-1, in the precision of the computation.
        units: what is removed at a time.
        candidates: among how many of the cheapest units a panel is found; None for all.
    Returns:
        order (out, steps) of units, first removed first; losses (out, steps), rise of the squared error by each.
    """
    columns = units.columns.flatten()
    missing = columns < 0  # what a ragged unit lacks: a weight of 0 that is correlated with nothing
    matrix = inverse[columns.unsqueeze(1), columns]
    matrix.masked_fill_(missing.unsqueeze(1) | missing, 0.0)
    matrix.diagonal().add_(missing.to(matrix.dtype))
    weight = dense[:, columns].masked_fill_(missing, 0.0).view(len(dense), *units.columns.shape)
    at_once = max(1, STATE_BYTES // (2 * matrix.element_size() * matrix.numel()))
    if units.steps == 0:
        return torch.zeros(len(dense), 0, dtype=torch.long), dense.new_zeros(len(dense), 0)
    parts = [_trace(rows, matrix, units, candidates) for rows in weight.split(at_once)]
    return torch.cat([order for order, _ in parts]), torch.cat([losses for _, losses in parts])


def _trace(
    weight: torch.Tensor, matrix: torch.Tensor, units: Units, candidates: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eliminate` for some rows; weight (rows, units, size) and matrix (units * size, units * size)."""
    rows, size = len(weight), weight.shape[2]
    row = torch.arange(rows)[:, None]
    inverse = matrix.expand(rows, -1, -1).clone()
    left = torch.arange(len(units.columns)).expand(rows, -1)  # which unit is where
    gone = torch.zeros(rows, len(units.columns), dtype=torch.bool)
    quota = None if units.quota is None else units.quota.expand(rows, -1).clone()
    order, losses = [], []
    done = 0
    while done < units.steps:
        barred = gone if quota is None else gone | (quota.gather(1, units.group[left]) == 0)  # type: ignore[index]
        costs = _cost(weight, _blocks(inverse, size)).masked_fill_(barred, torch.inf)
        count = min(units.steps - done, PANEL)
        width = costs.shape[1] if candidates is None else min(candidates, costs.shape[1])
        chosen = costs.topk(width, largest=False).indices if width < costs.shape[1] else None  # (rows, width)
        panel = _Panel(weight, inverse, left, barred, quota, units, chosen)
        while len(panel.order) < count and panel.step():
            pass
        found = torch.stack(panel.order, 1)  # (rows, count) positions in this matrix
        losses += panel.losses
        order.append(left.gather(1, found))
        done += found.shape[1]
        gone[row, found] = True
        _apply(weight, inverse, found, gone, size)
        if done < units.steps and int(gone[0].sum()) * 10 >= gone.shape[1]:
            stay = torch.nonzero(~gone)[:, 1].view(rows, -1)  # every row has lost the same number
            inverse = _submatrices(inverse, _flat(stay, size))
            weight, left, gone = weight[row, stay], left[row, stay], gone[row, stay]
    return torch.cat(order, 1), torch.stack(losses, 1)


class _Panel:
    """The next removals of each row, found one by one on some of its units.

    Without candidates the inverse isn't copied: what a removal changes in it is kept as columns.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        inverse: torch.Tensor,
        left: torch.Tensor,
        barred: torch.Tensor,
        quota: torch.Tensor | None,
        units: Units,
        chosen: torch.Tensor | None,
    ) -> None:
        self._row = torch.arange(len(weight))
        self._chosen, self._quota = chosen, quota
        self._size = weight.shape[2]
        if chosen is None:
            self._weight, self._inverse, self._barred = weight.clone(), inverse, barred.clone()
        else:
            at = self._row[:, None]
            self._weight, self._barred, left = weight[at, chosen], barred[at, chosen], left[at, chosen]
            flat = _flat(chosen, self._size)
            self._inverse = inverse[at[:, :, None], flat.unsqueeze(2), flat.unsqueeze(1)]
        self._group = None if units.group is None else units.group[left]  # (rows, units)
        self._blocks = _blocks(self._inverse, self._size)
        self._panel = self._inverse.new_zeros(len(weight), PANEL * self._size, self._inverse.shape[1])
        self.order: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []

    def step(self) -> bool:
        """Remove the cheapest unit of each row; False where some row has no candidate left."""
        row, size = self._row, self._size
        costs = _cost(self._weight, self._blocks).masked_fill_(self._barred, torch.inf)
        loss, best = costs.min(1)
        if self.order and bool(torch.isinf(loss).any()):
            return False
        weights = self._weight.view(len(row), -1)
        for member in range(size):  # the members of a unit one after the other is the same as all at once
            column, flat = len(self.order) * size + member, best * size + member
            one = self._inverse[row, flat]  # (rows, d): it is symmetric, and rows lie together in memory
            if column:
                before = self._panel[:, :column]
                one = one - torch.bmm(before[row, :, flat].unsqueeze(1), before).squeeze(1)
            one = one * one[row, flat].rsqrt().unsqueeze(1)
            weights -= one * (weights[row, flat] / one[row, flat]).unsqueeze(1)
            self._panel[:, column] = one
            if size == 1:
                self._blocks -= one.square().view_as(self._blocks)
            else:
                members = one.view(len(row), -1, size)
                self._blocks -= members.unsqueeze(3) * members.unsqueeze(2)
        self._barred[row, best] = True
        if self._quota is not None and self._group is not None:
            group = self._group[row, best]
            self._quota[row, group] -= 1
            full = self._quota[row, group] == 0
            self._barred |= full.unsqueeze(1) & (self._group == group.unsqueeze(1))
        self.order.append(best if self._chosen is None else self._chosen[row, best])
        self.losses.append(loss)
        return True


def _apply(weight: torch.Tensor, inverse: torch.Tensor, found: torch.Tensor, gone: torch.Tensor, size: int) -> None:
    """Remove the units `found` (rows, count) from the weights and the inverse, in place."""
    row = torch.arange(len(found))[:, None]
    flat = _flat(found, size)
    columns = inverse[row, flat]  # (rows, count, d)
    factor = torch.linalg.cholesky(columns.gather(2, flat.unsqueeze(1).expand(-1, flat.shape[1], -1)))
    unfactor = torch.linalg.solve_triangular(factor, torch.eye(flat.shape[1], dtype=factor.dtype), upper=False)
    scaled = unfactor @ columns
    flat_weight = weight.view(len(found), -1)
    removed = unfactor @ flat_weight.gather(1, flat).unsqueeze(2)
    flat_weight -= (scaled.mT @ removed).squeeze(2)
    inverse.baddbmm_(scaled.mT, scaled, alpha=-1)
    weight[gone] = 0.0
    # What is gone is correlated with nothing any more; exactly, so that it can't grow again by rounding.
    inverse[row, flat] = 0.0
    inverse.mT[row, flat] = 0.0
    inverse[row, flat, flat] = 1.0


def _blocks(inverse: torch.Tensor, size: int) -> torch.Tensor:
    """(rows, units, size, size), a copy of the diagonal blocks."""
    units = inverse.shape[1] // size
    blocks = inverse.view(len(inverse), units, size, units, size).diagonal(dim1=1, dim2=3)
    return blocks.movedim(3, 1).clone()


def _flat(units: torch.Tensor, size: int) -> torch.Tensor:
    """(rows, n) units -> (rows, n * size) columns."""
    return units if size == 1 else (units.unsqueeze(2) * size + torch.arange(size)).flatten(1)


def _submatrices(inverse: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """(rows, n, n); one row after the other, so that indices don't take more room than values."""
    found = inverse.new_empty(len(flat), flat.shape[1], flat.shape[1])
    for into, matrix, index in zip(found, inverse, flat, strict=True):
        torch.index_select(matrix.index_select(0, index), 1, index, out=into)
    return found


def _cost(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(rows, units) w^T B^-1 w for weights (rows, units, size) and blocks B (rows, units, size, size)."""
    if weight.shape[2] == 1:
        return weight.square().squeeze(2) / blocks.flatten(2).squeeze(2)
    cost = torch.zeros_like(weight[..., 0])
    for _ in range(weight.shape[2]):  # eliminate the first member: Schur complement
        pivot, column = blocks[..., 0, 0], blocks[..., 1:, 0]
        first = weight[..., 0]
        cost += first.square() / pivot
        weight = weight[..., 1:] - column * (first / pivot).unsqueeze(-1)
        blocks = blocks[..., 1:, 1:] - column.unsqueeze(-1) * column.unsqueeze(-2) / pivot[..., None, None]
    return cost


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
    dense: torch.Tensor, hessian: torch.Tensor, kept: Sequence[tuple[torch.Tensor, list[int]]]
) -> list[torch.Tensor]:
    """The exact least-squares weights (out, d) of each level; `kept` as `kept_columns` gives it."""
    target = dense @ hessian
    found = [torch.zeros_like(dense) for _ in (kept[0][1] if kept else [])]
    for row, (order, counts) in enumerate(kept):
        for weights, one in zip(found, solve_nested(hessian, target[row], order, counts), strict=True):
            weights[row] = one
    return found
