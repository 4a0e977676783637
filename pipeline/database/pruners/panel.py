"""A panel: the next removals of rows, found one by one among some units of each, with the inverse on those alone."""

from __future__ import annotations

from typing import Protocol

import torch


class Rows(Protocol):
    """The rows as they are when a panel begins: see `elimination`."""

    weight: torch.Tensor
    blocks: torch.Tensor
    barred: torch.Tensor
    quota: torch.Tensor | None
    group: torch.Tensor | None

    def factor_at(self, places: torch.Tensor) -> torch.Tensor: ...
    def inverse_at(self, places: torch.Tensor, factor: torch.Tensor, *, by_all: bool) -> torch.Tensor: ...


class Panel:
    """The next removals of each row, found one by one among some of its units.

    Attributes:
        order: (rows,) for each removal which of the candidates; losses: (rows,) what it costs.
        factor: (rows, candidates * size, removed), V^T.
    """

    def __init__(self, rows: Rows, chosen: torch.Tensor, count: int) -> None:
        self._row = torch.arange(len(chosen))
        at = self._row[:, None]
        self._weight, self._blocks = rows.weight[at, chosen], rows.blocks[at, chosen]
        self._barred = rows.barred.gather(1, chosen)
        self._group = None if rows.group is None else rows.group.gather(1, chosen)
        self._quota = None if rows.quota is None else rows.quota.clone()
        self.factor = rows.factor_at(chosen)
        self._inverse = rows.inverse_at(chosen, self.factor, by_all=False)
        self._size = self._weight.shape[2]
        self._panel = self._inverse.new_zeros(len(chosen), count * self._size, self._inverse.shape[1])
        self.order: list[torch.Tensor] = []
        self.losses: list[torch.Tensor] = []

    def step(self) -> bool:
        """Remove the cheapest unit of each row; False where some row's groups have no candidate left."""
        row, size = self._row, self._size
        costs = removal_costs(self._weight, self._blocks).masked_fill_(self._barred, torch.inf)
        loss, best = costs.min(1)
        if self._quota is not None and self.order and bool(torch.isinf(loss).any()):
            return False
        weights = self._weight.flatten(1, 2)
        for member in range(size):  # the members of a unit one after the other is the same as all at once
            column, flat = len(self.order) * size + member, best * size + member
            one = self._inverse[row, flat]  # (rows, candidates * size)
            if column:
                before = self._panel[:, :column]
                one = one - torch.bmm(before[row, :, flat].unsqueeze(1), before).squeeze(1)
            one = one * one[row, flat].rsqrt().unsqueeze(1)
            weights -= one.unsqueeze(2) * (weights[row, flat] / one[row, flat].unsqueeze(1)).unsqueeze(1)
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
        self.order.append(best)
        self.losses.append(loss)
        return True


def removal_costs(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """(rows, units) the sum of w^T B^-1 w over the outputs, for weights (rows, units, size, outputs) and blocks B
    (rows, units, size, size)."""
    if weight.shape[2] == 1:
        return weight.square().sum(3).squeeze(2) / blocks.flatten(2).squeeze(2)
    cost = torch.zeros_like(weight[..., 0, 0])
    for _ in range(weight.shape[2]):  # eliminate the first member: Schur complement
        pivot, column = blocks[..., 0, 0], blocks[..., 1:, 0]
        first = weight[..., 0, :]
        cost += first.square().sum(-1) / pivot
        weight = weight[..., 1:, :] - column.unsqueeze(-1) * (first / pivot.unsqueeze(-1)).unsqueeze(-2)
        blocks = blocks[..., 1:, 1:] - column.unsqueeze(-1) * column.unsqueeze(-2) / pivot[..., None, None]
    return cost
