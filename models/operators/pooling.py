"""Pooling over windows and over whole planes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.conv import CONVOLUTIONS, same_padding, torch_padding
from onnx_spdy.models.operators.operator import Compute, Node

MAX_POOLS: dict[int, Compute] = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}  # by rank of the input
AVERAGE_POOLS: dict[int, Compute] = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def max_pool(node: Node) -> Compute:
    window = _Window(node)
    if len(node.outputs) > 1:
        return _max_pool_with_indices(node, window)
    if window.fits_torch:
        padding = window.begins
        return lambda x: MAX_POOLS[x.dim()](
            x, window.kernel, window.strides, padding, window.dilations, window.ceil_mode
        )

    def run(x: Tensor) -> Tensor:
        begins, ends, _ = window.pads(x.shape[2:])
        lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
        padded = F.pad(x, torch_padding(begins, ends), value=lowest)
        return MAX_POOLS[x.dim()](padded, window.kernel, window.strides, 0, window.dilations)

    return run


def _max_pool_with_indices(node: Node, window: _Window) -> Compute:
    if not window.fits_torch:
        raise node.unsupported("the second output (indices of the largest values) with unequal padding")
    column_first = bool(node.get("storage_order", 0))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        values, where = MAX_POOLS[x.dim()](
            x, window.kernel, window.strides, window.begins, window.dilations, window.ceil_mode, True
        )
        sizes = x.shape[2:]
        if column_first:
            where = torch.stack(torch.unravel_index(where, sizes))
            strides = torch.tensor([prod(sizes[:i]) for i in range(len(sizes))], device=x.device)
            where = (where * strides.reshape(-1, *[1] * (where.dim() - 1))).sum(0)
        # PyTorch counts within each plane, ONNX through the whole tensor.
        planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * prod(sizes)
        return values, where + planes.reshape(*x.shape[:2], *[1] * len(sizes))

    return run


def lp_pool(node: Node) -> Compute:
    window, p = _Window(node), node.get("p", 2)

    def run(x: Tensor) -> Tensor:
        begins, ends, _ = window.pads(x.shape[2:])
        batch, channels, *sizes = x.shape
        planes = F.pad(x.abs().pow(p).reshape(batch * channels, 1, *sizes), torch_padding(begins, ends))
        ones = x.new_ones((1, 1, *window.kernel))
        sums = CONVOLUTIONS[x.dim()](planes, ones, None, window.strides, 0, window.dilations)
        return sums.pow(1 / p).reshape(batch, channels, *sums.shape[2:])

    return run


def average_pool(node: Node) -> Compute:
    window = _Window(node)
    include_pad = bool(node.get("count_include_pad", 0))
    if window.fits_torch and set(window.dilations) == {1}:
        return lambda x: AVERAGE_POOLS[x.dim()](
            x, window.kernel, window.strides, window.begins, window.ceil_mode, include_pad
        )

    def run(x: Tensor) -> Tensor:
        begins, ends, declared = window.pads(x.shape[2:])
        batch, channels, *sizes = x.shape
        ones = x.new_ones((1, 1, *window.kernel))

        def window_sums(planes: Tensor) -> Tensor:
            return CONVOLUTIONS[x.dim()](planes, ones, None, window.strides, 0, window.dilations)

        planes = F.pad(x.reshape(batch * channels, 1, *sizes), torch_padding(begins, ends))
        counted = x.new_ones((1, 1, *sizes))
        if include_pad:
            counted = F.pad(counted, torch_padding(begins, declared), value=1)
        beyond = [end - (said if include_pad else 0) for end, said in zip(ends, declared, strict=True)]
        counted = F.pad(counted, torch_padding([0] * len(begins) if include_pad else begins, beyond))
        averages = window_sums(planes) / window_sums(counted)
        return averages.reshape(batch, channels, *averages.shape[2:])

    return run


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return torch.amax(x, tuple(range(2, x.dim())), keepdim=True)


class _Window:
    """The window of a pooling node, and how much padding its positions need."""

    def __init__(self, node: Node) -> None:
        self.kernel: list[int] = list(node.get("kernel_shape"))
        rank = len(self.kernel)
        self.strides: list[int] = list(node.get("strides", [1] * rank))
        self.dilations: list[int] = list(node.get("dilations", [1] * rank))
        self.ceil_mode = bool(node.get("ceil_mode", 0))
        self.automatic: str = node.get("auto_pad", "NOTSET")
        pads = [0] * 2 * rank if self.automatic == "VALID" else list(node.get("pads", [0] * 2 * rank))
        self.begins, self.ends = pads[:rank], pads[rank:]
        # PyTorch pads both ends alike, and by half a window at most.
        half_fits = all(2 * pad <= size for pad, size in zip(self.begins, self.kernel, strict=True))
        self.fits_torch = not self.automatic.startswith("SAME") and self.begins == self.ends and half_fits

    def pads(self, sizes: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Begins; ends, such that exactly the wanted positions fit (negative: cut off); ends as the node says."""
        begins, ends, declared = [], [], []
        for axis, size in enumerate(sizes):
            kernel, stride, dilation = self.kernel[axis], self.strides[axis], self.dilations[axis]
            begin, end = self.begins[axis], self.ends[axis]
            if self.automatic.startswith("SAME"):
                begin, end = same_padding(size, kernel, stride, dilation, self.automatic == "SAME_UPPER")
            reach = (kernel - 1) * dilation + 1
            room = size + begin + end - reach
            count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
            if self.ceil_mode and (count - 1) * stride >= size + begin:
                count -= 1  # the last window would lie wholly in the padding
            begins.append(begin)
            ends.append((count - 1) * stride + reach - size - begin)
            declared.append(end)
        return begins, ends, declared
