"""Rounding to 8 bits in floating point, as a network in int8 would, with gradients that go straight through.

Source: Bengio, Léonard & Courville (2013) for the straight-through estimator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from onnx_spdy.models.int8.grid import Grid
from onnx_spdy.models.int8.nearest import LARGEST, LEAST_SCALE

Rounding = Callable[[torch.Tensor], torch.Tensor]
IN_CACHE = 1 << 18  # values that are rounded in one go


def activation_rounding(grid: Grid) -> Rounding:
    """Values of any floating type -> the nearest ones of the grid, in that type."""
    low, high = (bound - grid.zero for bound in grid.bounds)
    scale = torch.from_numpy(np.atleast_1d(grid.scale).astype(np.float32))

    def rounding(x: torch.Tensor) -> torch.Tensor:
        if grid.axis is not None:
            shape = [1] * x.dim()
            shape[grid.axis] = -1
            return _Round.apply(x, scale.reshape(shape), low, high)
        return _Round.apply(x, scale, low, high)

    return rounding


class _Round(torch.autograd.Function):
    """As torch.fake_quantize_per_tensor_affine and ..._per_channel_affine do, which take 5 to 10 times as long.

    Rounding a whole tensor step by step would go through memory for each; so some samples at a time, which stay in the
    cache. The sums are in float32 whatever the type of the values.
    """

    @staticmethod
    def forward(  # type: ignore[override]  # autograd's own signature is any
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, scale: torch.Tensor, low: int, high: int
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bounds = low - 0.5, high + 0.5  # type: ignore[attr-defined]  # what is rounded to them is within
        rounded, inverse = torch.empty_like(x), 1 / scale
        for some, out in zip(_parts(x), _parts(rounded), strict=True):
            out.copy_((some * inverse).round_().clamp_(low, high).mul_(scale))
        return rounded

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[override]
        x, scale = ctx.saved_tensors
        low, high = ctx.bounds
        within = torch.ops.aten.hardtanh_backward  # passes a gradient on where a value is between two numbers
        if scale.numel() == 1:
            return within(gradient, x, low * float(scale), high * float(scale)), None, None, None
        passed, inverse = torch.empty_like(gradient), 1 / scale
        for some, values, out in zip(_parts(gradient), _parts(x), _parts(passed), strict=True):
            out.copy_(within(some, (values * inverse).to(some.dtype), low, high))
        return passed, None, None, None


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Some samples at a time, as many as stay in the cache."""
    return x.split(max(1, IN_CACHE * len(x) // max(1, x.numel()))) if x.dim() else (x.reshape(1),)


def weight_rounding(axis: int) -> Rounding:
    """A stored weight, float32 -> the nearest values of the grid of each of its channels, which holds its largest.

    Args:
        axis: on which the output channels lie.
    """

    def rounding(weight: torch.Tensor) -> torch.Tensor:
        others = [number for number in range(weight.dim()) if number != axis]
        scale = (weight.detach().abs().amax(others) / LARGEST).clamp_min(LEAST_SCALE)
        zeros = torch.zeros(scale.shape, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -LARGEST, LARGEST)

    return rounding
