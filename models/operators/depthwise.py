"""A depthwise convolution with a stride, whose gradient doesn't take ten times as long as itself.

oneDNN has no fast kernel for the gradient that such a convolution passes back to its input. That gradient is a
depthwise convolution without a stride over the output's gradient with zeros between its values, and for those there is
one (MobileNetV2's four at 224 px, 32 images: all convolutions' gradients took 265 ms, now 155).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IN_CACHE = 1 << 21  # values of which the gradient is computed in one go


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`, with a faster gradient where the convolution is depthwise and has a stride."""
    strides, pads, dilations = (_pair(value) for value in (stride, padding, dilation))
    is_depthwise = groups == x.shape[1] == weight.shape[0] > 1
    fits = all(pad < size for pad, size in zip(pads, weight.shape[2:], strict=True))
    if not (x.requires_grad and is_depthwise and max(strides) > 1 and dilations == (1, 1) and fits):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _Strided.apply(x, weight, bias, strides, pads)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, strides, pads) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.how = strides, pads, None if bias is None else list(bias.shape)
        return F.conv2d(x, weight, bias, strides, pads, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        strides, pads, bias_sizes = ctx.how
        weight = weight.to(gradient.dtype)
        _, for_weight, for_bias = torch.ops.aten.convolution_backward(
            gradient, x.to(gradient.dtype), weight, bias_sizes, strides, pads, [1, 1], False, [0, 0], len(weight),
            [False, True, bias_sizes is not None],
        )  # fmt: skip
        return _for_input(gradient, weight, x, strides, pads), for_weight, for_bias, None, None


def _for_input(gradient: Tensor, weight: Tensor, x: Tensor, strides: Sequence[int], pads: Sequence[int]) -> Tensor:
    """Some samples at a time; their values, with zeros between and around them, give as many as the input has."""
    turned, (height, width) = weight.flip(2, 3), x.shape[2:]
    before = [kernel - 1 - pad for kernel, pad in zip(weight.shape[2:], pads, strict=True)]
    whole = [size + kernel - 1 for size, kernel in zip((height, width), weight.shape[2:], strict=True)]
    samples = max(1, IN_CACHE // max(1, x[0].numel())) if len(x) else 1
    spread = gradient.new_zeros((min(samples, len(x)), x.shape[1], *whole)).to(memory_format=torch.channels_last)
    rows = slice(before[0], before[0] + strides[0] * gradient.shape[2], strides[0])
    columns = slice(before[1], before[1] + strides[1] * gradient.shape[3], strides[1])
    found = torch.empty_like(x, dtype=gradient.dtype)
    for some, out in zip(gradient.split(samples), found.split(samples), strict=True):
        part = spread[: len(some)]
        part[:, :, rows, columns] = some
        out.copy_(F.conv2d(part, turned, groups=len(weight)))
    return found
