"""Quantised numbers: from and to floats, and products of them."""

from __future__ import annotations

import torch
from torch import Tensor

from onnx_spdy.models.operators.conv import conv
from onnx_spdy.models.operators.operator import TORCH_DTYPES, Compute, Node, trimmed

EXACT = torch.float64  # holds every sum of products of 8-bit numbers


def quantize_linear(node: Node) -> Compute:
    axis, block, kind = node.get("axis", 1), node.get("block_size", 0), node.get("output_dtype", 0)
    if kind and kind not in TORCH_DTYPES:
        raise node.unsupported(f"output element type {kind}, which PyTorch doesn't have")

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        dtype = TORCH_DTYPES[kind] if kind else torch.uint8 if zero is None else zero.dtype
        scaled = torch.round(x / _spread(scale, x, axis, block))
        return _saturated(scaled if zero is None else scaled + _spread(zero, x, axis, block).to(x.dtype), dtype)

    return run


def dequantize_linear(node: Node) -> Compute:
    axis, block = node.get("axis", 1), node.get("block_size", 0)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        centred = x.to(torch.int32) if zero is None else x.to(torch.int32) - _spread(zero, x, axis, block).int()
        return centred.to(scale.dtype) * _spread(scale, x, axis, block)

    return run


def dynamic_quantize_linear(node: Node) -> Compute:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        zero = _saturated(torch.round(-low / scale), torch.uint8)
        return trimmed(node, (_saturated(torch.round(x / scale) + zero, torch.uint8), scale, zero))

    return run


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    if a_zero is not None and a_zero.dim() == 1 and a_zero.numel() > 1:
        a_zero = a_zero[:, None]  # one for each row
    return torch.matmul(_centred(a, a_zero), _centred(b, b_zero)).to(torch.int32)


def qlinear_matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, scale: Tensor, zero: Tensor
) -> Tensor:
    product = torch.matmul(_centred(a, a_zero), _centred(b, b_zero))
    factor = a_scale.to(EXACT) * b_scale.to(EXACT) / scale.to(EXACT)
    return _saturated(torch.round(product * factor) + zero, zero.dtype)


def conv_integer(node: Node) -> Compute:
    convolve = conv(node)

    def run(x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None) -> Tensor:
        return convolve(_centred(x, x_zero), _centred(weight, _per_output(weight_zero, weight))).to(torch.int32)

    return run


def qlinear_conv(node: Node) -> Compute:
    convolve = conv(node)

    def run(
        x: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor,
        scale: Tensor, zero: Tensor, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        sums = convolve(
            _centred(x, x_zero),
            _centred(weight, _per_output(weight_zero, weight)),
            None if bias is None else bias.to(EXACT),
        )
        if weight_scale.numel() > 1:
            weight_scale = weight_scale.reshape(-1, *[1] * (x.dim() - 2))
        factor = x_scale.to(EXACT) * weight_scale.to(EXACT) / scale.to(EXACT)
        return _saturated(torch.round(sums * factor) + zero, zero.dtype)

    return run


def _per_output(zero: Tensor | None, weight: Tensor) -> Tensor | None:
    return zero if zero is None or zero.numel() == 1 else zero.reshape(-1, *[1] * (weight.dim() - 1))


def _centred(x: Tensor, zero: Tensor | None) -> Tensor:
    return x.to(EXACT) if zero is None else x.to(EXACT) - zero.to(EXACT)


def _spread(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """One value for the tensor, for each index of an axis, or for each block along it, in a shape that fits `x`."""
    if values.dim() == 0 or values.numel() == 1:
        return values.reshape(())
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.iinfo(dtype)
    return x.clamp(limits.min, limits.max).to(dtype)
