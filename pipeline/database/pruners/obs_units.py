"""Greedy OBS elimination of units: again and again the unit goes whose removal costs least, and the rest is adapted.

All rows of a consumer lose the same columns, so they share one inverse. Removing the columns G of a unit costs
tr(W_G ([H^-1]_GG)^-1 W_G^T) in a consumer after all that is left has been adapted; costs of several consumers add up,
each relative to the power of the consumer's dense output. Every removal is the cheapest of all units that are left,
by exact costs. (The cheapest by their costs at the start, which is a sort, had 1.3 to 2.2 times the error in the first
four inner groups of ResNet-18 at half width; exchanging units afterwards gained nothing there, at other widths at most
1.4 %.)

Removing G takes Z^T Z from H^-1 and Z^T Q from W^T, with L L^T = [H^-1]_GG, Z = L^-1 [H^-1]_G,: and Q = L^-1 W_G^T.
Only each unit's diagonal blocks of H^-1 and of W^T W are brought up to date at once, which is all that costs need;
the matrices are when some Z have come together, and what is gone is cut out of them then: d^3 / 3 multiplications for
the inverse, and out * d^2 for the weights. In float64, so the weights at each width are the least-squares solution on
what is left, (W0 H)_S (H_SS)^-1.

Source: Hassibi & Stork, OBS (1993); Frantar & Alistarh, OBC (NeurIPS 2022), eq. 5 (groups of weights); Kurtic et al.,
ZipLM (NeurIPS 2023), section 3.1 (structures that all rows share).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from onnx_spdy.pipeline.database.pruners.quadratic import cholesky, damped, inverse
from onnx_spdy.pipeline.database.pruners.units import Consumer

PENDING = 256  # rows of Z that come together before the matrices are brought up to date


def obs_units(
    consumers: Sequence[Consumer], widths: Sequence[int]
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """See `UnitPruner`. Memory: for each consumer its inverse and its weights in float64."""
    states = [_State(one) for one in consumers]
    left = torch.arange(len(consumers[0].columns))  # units, in the order of the states
    gone = torch.zeros(len(left), dtype=torch.bool)
    for width in widths:
        while len(left) - int(gone.sum()) > width:
            costs = torch.stack([state.costs() for state in states]).sum(0).masked_fill_(gone, torch.inf)
            place = int(costs.argmin())
            for state in states:
                state.remove(place)
            gone[place] = True
            if any(state.pending >= PENDING for state in states):
                for state in states:
                    state.settle(~gone)
                left, gone = left[~gone], gone[~gone]
        for state in states:
            state.settle(~gone)
        left, gone = left[~gone], gone[~gone]
        yield left.clone(), [state.solution() for state in states]


class _State:
    """A consumer whose units go.

    Its columns are those of the units that are left, each unit filled up to as many as the largest has, and then those
    of no unit.

    Attributes:
        pending: rows of Z by which the matrices are behind.
    """

    def __init__(self, consumer: Consumer) -> None:
        self._shape, self._dtype = consumer.weight.shape, consumer.weight.dtype
        dense = consumer.weight.flatten(1).double()
        columns = pad_sequence(list(consumer.columns), batch_first=True, padding_value=-1)  # (units, size)
        self._size = columns.shape[1]
        mine = columns.flatten()
        other = torch.ones(dense.shape[1], dtype=torch.bool)
        other[mine[mine >= 0]] = False
        self._places = torch.cat([mine, torch.nonzero(other).flatten()])  # (columns,) of the weight, -1 for filling
        filling = self._places < 0
        curvature = damped(consumer.hessian)
        self._inverse = inverse(curvature)[self._places[:, None], self._places]
        self._inverse[filling] = 0.0
        self._inverse[:, filling] = 0.0
        self._inverse.diagonal()[filling] = 1.0
        self._weight = dense.T[self._places]  # (columns, out)
        self._weight[filling] = 0.0
        power = float(((dense @ consumer.hessian) * dense).sum()) or float(((dense @ curvature) * dense).sum())
        self._scale = 1 / power if power > 0 else 0.0  # inputs that are all zero: by magnitude
        self._units = len(columns)
        block = self._places.new_tensor(range(len(mine))).view(columns.shape)
        self._blocks = self._inverse[block[:, :, None], block[:, None, :]]  # (units, size, size)
        grouped = self._weight[: len(mine)].view(self._units, self._size, -1)
        self._powers = grouped @ grouped.mT  # (units, size, size), W_G^T W_G
        self._z: list[torch.Tensor] = []
        self._q: list[torch.Tensor] = []
        self.pending = 0

    def costs(self) -> torch.Tensor:
        """(units,) by which the relative squared error rises when a unit goes."""
        inverted = torch.cholesky_inverse(cholesky(self._blocks))
        return self._scale * (inverted * self._powers).sum((1, 2)).clamp_min(0.0)

    def remove(self, place: int) -> None:
        """Remove a unit by its place among those of the state."""
        size = self._size
        mine = slice(place * size, (place + 1) * size)
        rows, weight = self._inverse[mine].clone(), self._weight[mine].clone()
        if self._z:
            z, q = torch.cat(self._z), torch.cat(self._q)
            rows -= z[:, mine].T @ z
            weight -= z[:, mine].T @ q
        factor = cholesky(rows[:, mine])
        new = torch.linalg.solve_triangular(factor, rows, upper=False)  # (size, columns)
        target = torch.linalg.solve_triangular(factor, weight, upper=False)  # (size, out)
        product = self._weight @ target.T
        if self._z:
            product -= z.T @ (q @ target.T)
        # (W - Z^T Q)_G (W - Z^T Q)_G^T = W_G W_G^T - K Z_G - (K Z_G)^T with K = W_G Q^T - Z_G^T Q Q^T / 2
        half = (product - new.T @ (target @ target.T) / 2)[: self._units * size].view(self._units, size, size)
        members = new[:, : self._units * size].view(size, self._units, size)
        change = torch.einsum("usk,kut->ust", half, members)
        self._powers -= change + change.mT
        self._blocks -= torch.einsum("kus,kut->ust", members, members)
        self._blocks[place] = torch.eye(size, dtype=self._blocks.dtype)  # so that it stays positive definite
        self._z.append(new)
        self._q.append(target)
        self.pending += size

    def settle(self, stay: torch.Tensor) -> None:
        """Bring the matrices up to date and keep only the units where `stay` (units,) is True."""
        columns = torch.ones(len(self._places), dtype=torch.bool)
        columns[: self._units * self._size] = stay.repeat_interleave(self._size)
        at = torch.nonzero(columns).flatten()
        self._places = self._places[at]
        self._inverse, self._weight = self._inverse[at[:, None], at], self._weight[at]
        self._blocks, self._powers, self._units = self._blocks[stay], self._powers[stay], int(stay.sum())
        if self._z:
            z = torch.cat(self._z)[:, at]
            self._inverse.addmm_(z.T, z, alpha=-1)
            self._weight.addmm_(z.T, torch.cat(self._q), alpha=-1)
        self._z, self._q, self.pending = [], [], 0

    def solution(self) -> torch.Tensor:
        """The consumer's weights; the state must be settled."""
        real = self._places >= 0
        found = torch.zeros(self._shape, dtype=self._dtype)
        found.flatten(1)[:, self._places[real]] = self._weight[real].T.to(self._dtype)
        return found
