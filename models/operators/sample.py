"""Values at places between the pixels, and windows put back into a plane."""

from __future__ import annotations

from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node

MODES = {"bilinear": "bilinear", "linear": "bilinear", "nearest": "nearest", "bicubic": "bicubic", "cubic": "bicubic"}


def grid_sample(node: Node) -> Compute:
    mode, padding = MODES[node.get("mode", "linear")], node.get("padding_mode", "zeros")
    corners = bool(node.get("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, mode, padding, corners)


def affine_grid(node: Node) -> Compute:
    corners = bool(node.get("align_corners", 0))
    return lambda theta, size: F.affine_grid(theta, size.tolist(), corners)


def col2im(node: Node) -> Compute:
    """Sums of overlapping windows; two spatial axes."""

    def run(x: Tensor, image: Tensor, block: Tensor) -> Tensor:
        rank = image.numel()
        if rank != 2:
            raise node.unsupported(f"{rank} spatial axes; PyTorch's fold knows 2")
        strides, dilations = node.get("strides", [1, 1]), node.get("dilations", [1, 1])
        pads = node.get("pads", [0] * 4)
        top, left, bottom, right = pads
        height, width = image.tolist()
        whole = F.fold(x, (height + top + bottom, width + left + right), tuple(block.tolist()), dilations, 0, strides)
        return whole[..., top : top + height, left : left + width]

    return run


def max_unpool(node: Node) -> Compute:
    kernel = node.get("kernel_shape")
    rank = len(kernel)
    strides, pads = node.get("strides", [1] * rank), node.get("pads", [0] * 2 * rank)

    def run(x: Tensor, indices: Tensor, shape: Tensor | None = None) -> Tensor:
        natural = [
            (x.shape[2 + i] - 1) * strides[i] - pads[i] - pads[rank + i] + kernel[i] for i in range(rank)
        ]  # the indices count through a tensor of this shape
        flat = x.new_zeros(prod((*x.shape[:2], *natural)))
        plane = flat.index_put((indices.flatten().long(),), x.flatten()).reshape(*x.shape[:2], *natural)
        if shape is None:
            return plane
        wanted = shape.tolist()[2:]
        padding = [
            amount for have, want in zip(natural[::-1], wanted[::-1], strict=True) for amount in (0, want - have)
        ]
        return F.pad(plane, padding)

    return run


def roi_align(node: Node) -> Compute:
    height, width = node.get("output_height", 1), node.get("output_width", 1)
    ratio, scale = node.get("sampling_ratio", 0), node.get("spatial_scale", 1.0)
    largest = node.get("mode", "avg") == "max"
    half = node.get("coordinate_transformation_mode", "half_pixel" if node.opset >= 16 else "output_half_pixel")
    shift, at_least = (0.5, None) if half == "half_pixel" else (0.0, 1.0)

    def one(plane: Tensor, roi: list[float]) -> Tensor:
        left, top, right, bottom = (value * scale - shift for value in roi)
        sizes = (bottom - top, right - left)
        if at_least is not None:
            sizes = (max(sizes[0], at_least), max(sizes[1], at_least))
        rows = _places(top, sizes[0], height, ratio, plane)
        columns = _places(left, sizes[1], width, ratio, plane)
        rows_in, columns_in = _inside(rows, plane.shape[1]), _inside(columns, plane.shape[2])
        (y0, y1, wy), (x0, x1, wx) = _neighbours(rows, plane.shape[1]), _neighbours(columns, plane.shape[2])
        corners = []
        for y, fy in ((y0, 1 - wy), (y1, wy)):
            for x, fx in ((x0, 1 - wx), (x1, wx)):
                weight = (fy * rows_in)[:, None] * (fx * columns_in)[None]
                corners.append(plane[:, y][:, :, x] * weight)
        # The standard's maximum is over the weighted corners too, not over the interpolated values.
        values = torch.stack(corners).amax(0) if largest else torch.stack(corners).sum(0)
        split = values.reshape(len(plane), height, len(rows) // height, width, len(columns) // width)
        return split.amax((2, 4)) if largest else split.mean((2, 4))

    def run(x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
        found = [one(x[i], roi) for i, roi in zip(batch.tolist(), rois.tolist(), strict=True)]
        return torch.stack(found) if found else x.new_zeros(0, x.shape[1], height, width)

    return run


def _places(start: float, length: float, bins: int, ratio: int, like: Tensor) -> Tensor:
    """Coordinates of all sampling points along one axis. (bins * points of a bin,)"""
    points = ratio if ratio > 0 else max(ceil(length / bins), 1)
    steps = torch.arange(bins * points, device=like.device, dtype=like.dtype)
    return start + (steps + 0.5) * (length / bins / points)


def _inside(places: Tensor, size: int) -> Tensor:
    return ((places >= -1) & (places <= size)).to(places.dtype)


def _neighbours(places: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    clamped = places.clamp(0, size - 1)
    lower = clamped.floor()
    return lower.long(), (lower + 1).clamp(max=size - 1).long(), clamped - lower
