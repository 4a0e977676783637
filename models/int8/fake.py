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


def activation_rounding(grid: Grid) -> Rounding:
    """float32 -> the nearest values of the grid."""
    low, high = grid.bounds
    scale = torch.from_numpy(np.atleast_1d(grid.scale))
    if grid.axis is None:
        step = float(scale)
        return lambda x: torch.fake_quantize_per_tensor_affine(x, step, grid.zero, low, high)
    axis, zeros = grid.axis, torch.full(scale.shape, grid.zero, dtype=torch.int32)
    return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zeros, axis, low, high)


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
