"""Rounding in floating point beside PyTorch's own, which takes much longer."""

import numpy as np
import pytest
import torch

from onnx_spdy.models.int8 import fake
from onnx_spdy.models.int8.fake import activation_rounding
from onnx_spdy.models.int8.grid import Grid

GRIDS = [
    Grid(np.float32([0.02]).reshape(()), 0, signed=False),
    Grid(np.float32([0.037]).reshape(()), 113, signed=False),
    Grid(np.float32([0.05]).reshape(()), 0, signed=True),
    Grid(np.float32([0.02, 0.05, 0.1]), 7, signed=False, axis=1),
]


def torchs(grid: Grid, x: torch.Tensor) -> torch.Tensor:
    low, high = grid.bounds
    if grid.axis is None:
        return torch.fake_quantize_per_tensor_affine(x, float(grid.scale), grid.zero, low, high)
    zeros = torch.full((grid.scale.size,), grid.zero, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, torch.from_numpy(grid.scale), zeros, grid.axis, low, high)


@pytest.mark.parametrize("grid", GRIDS, ids=["unsigned", "lopsided", "symmetric", "by channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_cache", [1, 50, 1 << 18])
def test_values_and_gradients_are_those_of_pytorch(
    grid: Grid, dtype: torch.dtype, in_cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "IN_CACHE", in_cache)
    torch.manual_seed(0)
    values, gradient = (3 * torch.randn(5, 3, 4, 4)).to(dtype), torch.randn(5, 3, 4, 4).to(dtype)
    one, other = values.clone().requires_grad_(), values.float().requires_grad_()
    rounded = activation_rounding(grid)(one)
    assert rounded.dtype == dtype
    expected = torchs(grid, other)
    assert (expected.detach() != other.detach()).any()
    assert torch.equal(rounded.detach(), expected.detach().to(dtype))
    rounded.backward(gradient)
    expected.backward(gradient.float())
    assert torch.equal(one.grad.float(), other.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (1, 3)])
def test_any_shape_goes(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.31)
    assert torch.equal(activation_rounding(GRIDS[0])(x), torch.full(shape, float(np.float32(0.02) * 16)))


def test_a_tensor_that_lies_turned_in_memory_stays_so() -> None:
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    rounded = activation_rounding(GRIDS[1])(x)
    assert rounded.stride() == x.stride()
    assert torch.equal(rounded, torchs(GRIDS[1], x))
