"""SparseGPT: one sweep over the columns of a layer; each pruned column's error is made good by the columns after it.

Masks are chosen a block of columns at a time by w^2 / U_ii^2 with U^T U = H^-1, each block at the level's own
sparsity. One factorisation serves all rows and levels, so it is the cheapest second-order pruner: about out * d^2
multiplications a level. A column can't be adapted once the sweep has passed it, which costs quality.

Columns are swept kernel position by kernel position, so that the input channels of a block or an N:M group are
neighbours and swept together.

Source: Frantar & Alistarh, SparseGPT (ICML 2023), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onnx_spdy.pipeline.database.pruners.quadratic import cholesky, damped, inverse
from onnx_spdy.pipeline.level import BLOCKS, Level
from onnx_spdy.pipeline.mask import select_mask

BLOCK = 128  # columns, about
SWEEP_BYTES = 256 << 20  # weights of the levels that are swept together


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level]) -> Iterator[torch.Tensor]:
    """See `Pruner`. Levels may come in any order: each depends on the dense weights alone."""
    at_once = max(1, SWEEP_BYTES // (4 * weight.numel()))
    channels, positions = weight.shape[1], weight[0, 0].numel()
    order = torch.arange(channels * positions).view(channels, positions).T.flatten()  # (position, channel)
    curvature = damped(hessian)[order][:, order]
    factor = cholesky(inverse(curvature), upper=True).float()  # (d, d), U
    dense = weight.flatten(1).float()[:, order]
    for start in range(0, len(levels), at_once):
        some = levels[start : start + at_once]
        for level, swept in zip(some, _sweep(dense, factor, channels, some), strict=True):
            pruned = torch.empty_like(swept)
            pruned[:, order] = swept
            yield weight.clone() if level.pattern == "dense" else pruned.view(weight.shape).to(weight.dtype)


def _sweep(dense: torch.Tensor, factor: torch.Tensor, channels: int, levels: Sequence[Level]) -> torch.Tensor:
    """(levels, out, d) pruned; columns of `dense` (out, d) and `factor` (d, d) are (position, channel)."""
    weights = dense.repeat(len(levels), 1, 1)
    scale = factor.diagonal()
    spread = _Spread(len(dense), channels, levels)
    for begin, end in _blocks(dense.shape[1], channels, levels):
        scores = (weights[:, :, begin:end] / scale[begin:end]).square()
        masks = torch.stack([spread.mask(number, scores[number], begin, end) for number in range(len(levels))])
        errors = torch.empty_like(scores)
        block = weights[:, :, begin:end]
        for column in range(end - begin):
            error = torch.where(masks[:, :, column], 0.0, block[:, :, column] / scale[begin + column])
            block[:, :, column:] -= error.unsqueeze(2) * factor[begin + column, begin + column : end]
            errors[:, :, column] = error
        block.masked_fill_(~masks, 0.0)
        weights[:, :, end:] -= errors @ factor[begin:end, end:]
    return weights


def _blocks(columns: int, channels: int, levels: Sequence[Level]) -> Iterator[tuple[int, int]]:
    """(begin, end) of blocks of about `BLOCK` columns that cut no run of channels in two."""
    run = max(level.group[1] if level.is_n_of_m else level.block[1] for level in levels)
    if channels <= BLOCK:  # some whole positions
        size = max(1, BLOCK // channels) * channels
        yield from ((begin, min(begin + size, columns)) for begin in range(0, columns, size))
        return
    size = max(run, BLOCK // run * run)
    for position in range(0, columns, channels):
        for begin in range(0, channels, size):
            yield position + begin, position + min(begin + size, channels)


class _Spread:
    """Gives each block its share of a level's zeros, so that rounding leaves none out."""

    def __init__(self, out: int, channels: int, levels: Sequence[Level]) -> None:
        self._out, self._channels, self._levels = out, channels, levels

    def mask(self, number: int, scores: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """The mask (out, end - begin) of level `number` for a block with these scores."""
        level = self._levels[number]
        width = min(self._channels, end - begin)
        canonical = scores.view(self._out, -1, width).movedim(1, 2)  # (out, channels, positions)
        zeros = None
        if level.pattern in BLOCKS:
            zeros = level.zeros(self._units(level, end)) - level.zeros(self._units(level, begin))
        return select_mask(canonical, level, zeros).movedim(2, 1).reshape(self._out, end - begin)

    def _units(self, level: Level, column: int) -> int:
        """Weights, or blocks of them, before a column."""
        outputs, inputs = level.block
        positions, rest = divmod(column, self._channels)
        return -(-self._out // outputs) * (positions * -(-self._channels // inputs) + -(-rest // inputs))
