"""Convolution and its transpose, 1 to 3 spatial dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.depthwise import conv2d
from onnx_spdy.models.operators.operator import Compute, Node

CONVOLUTIONS: dict[int, Compute] = {3: F.conv1d, 4: conv2d, 5: F.conv3d}  # by rank of the input
TRANSPOSED: dict[int, Compute] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def torch_padding(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """ONNX amounts, one for each axis, in the order that `F.pad` takes: last axis first, begin and end together."""
    return [amount for pair in reversed(list(zip(begins, ends, strict=True))) for amount in pair]


def same_padding(size: int, kernel: int, stride: int, dilation: int, upper: bool) -> tuple[int, int]:
    """Begin and end padding with which a window leaves ceil(size / stride) positions."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    smaller, larger = total // 2, total - total // 2
    return (smaller, larger) if upper else (larger, smaller)


def conv(node: Node) -> Compute:
    # A number stands for all spatial dimensions, so their count needn't be known here.
    stride = tuple(node.get("strides", ())) or 1
    dilation = tuple(node.get("dilations", ())) or 1
    groups = node.get("group", 1)
    if node.get("auto_pad", "NOTSET").startswith("SAME"):
        return _conv_same(node, groups)
    pads = [] if node.get("auto_pad") == "VALID" else list(node.get("pads", ()))
    begins, ends = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    if begins == ends:
        padding = tuple(begins) or 0
        return lambda x, weight, bias=None: CONVOLUTIONS[x.dim()](x, weight, bias, stride, padding, dilation, groups)
    amounts = torch_padding(begins, ends)
    return lambda x, weight, bias=None: CONVOLUTIONS[x.dim()](
        F.pad(x, amounts), weight, bias, stride, 0, dilation, groups
    )


def _conv_same(node: Node, groups: int) -> Compute:
    upper = node.get("auto_pad") == "SAME_UPPER"

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = x.dim() - 2
        strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
        pads = [
            same_padding(*sizes, upper) for sizes in zip(x.shape[2:], weight.shape[2:], strides, dilations, strict=True)
        ]
        begins, ends = zip(*pads, strict=True)
        if begins == ends:
            return CONVOLUTIONS[x.dim()](x, weight, bias, strides, begins, dilations, groups)
        padded = F.pad(x, torch_padding(begins, ends))
        return CONVOLUTIONS[x.dim()](padded, weight, bias, strides, 0, dilations, groups)

    return run


def conv_transpose(node: Node) -> Compute:
    groups = node.get("group", 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = x.dim() - 2
        strides, dilations = node.get("strides", [1] * rank), node.get("dilations", [1] * rank)
        extra = node.get("output_padding", [0] * rank)
        begins, ends = _transposed_pads(node, x.shape[2:], weight.shape[2:], strides, dilations, extra)
        function = TRANSPOSED[x.dim()]
        if begins == ends and min(begins) >= 0:
            return function(x, weight, bias, strides, begins, extra, groups, dilations)
        whole = function(x, weight, bias, strides, 0, extra, groups, dilations)
        return F.pad(whole, torch_padding([-amount for amount in begins], [-amount for amount in ends]))

    return run


def _transposed_pads(
    node: Node,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    extra: Sequence[int],
) -> tuple[list[int], list[int]]:
    """How much of the full result is cut off at the begin and the end of each spatial axis."""
    automatic, rank = node.get("auto_pad", "NOTSET"), len(sizes)
    shape = node.get("output_shape")
    if shape is None and automatic.startswith("SAME"):
        shape = [size * stride for size, stride in zip(sizes, strides, strict=True)]
    if shape is None:
        pads = [0] * 2 * rank if automatic == "VALID" else node.get("pads", [0] * 2 * rank)
        return list(pads[:rank]), list(pads[rank:])
    begins, ends = [], []
    for size, k, stride, dilation, more, wanted in zip(
        sizes, kernel, strides, dilations, extra, shape[-rank:], strict=True
    ):
        total = stride * (size - 1) + more + (k - 1) * dilation + 1 - wanted
        half = total // 2
        begins.append(half if automatic == "SAME_UPPER" else total - half)
        ends.append(total - begins[-1])
    return begins, ends
