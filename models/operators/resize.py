"""Resize by nearest, linear or cubic interpolation."""

from __future__ import annotations

from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node

TRANSFORMS = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")
TORCH_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}  # by rank of the input


def resize(node: Node) -> Compute:
    if node.get("coordinate_transformation_mode", "half_pixel") not in TRANSFORMS:
        raise node.unsupported(f"coordinate_transformation_mode '{node.get('coordinate_transformation_mode')}'")
    if node.get("antialias", 0):
        raise node.unsupported("antialias=1")
    if node.opset < 11:
        return lambda x, scales: _resized(node, x, *_from_scales(x, scales.tolist(), range(x.dim())))

    def run(x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        axes = [axis % x.dim() for axis in node.get("axes", range(x.dim()))]
        if scales is not None and scales.numel():
            return _resized(node, x, *_from_scales(x, scales.tolist(), axes))
        assert sizes is not None, "the checker lets no Resize pass that has neither scales nor sizes"
        return _resized(node, x, *_from_sizes(node, x, sizes.tolist(), axes))

    return run


def upsample(node: Node) -> Compute:
    """The forerunner of Resize: coordinates and rounding of `nn.Upsample` before align_corners."""
    attributes = {**node.attributes, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    old = Node(node.op, node.name, 10, node.inputs, node.outputs, attributes)
    if node.opset < 9:
        fixed = node.get("scales")
        return lambda x: _resized(old, x, *_from_scales(x, fixed, range(x.dim())))
    return lambda x, scales: _resized(old, x, *_from_scales(x, scales.tolist(), range(x.dim())))


def _from_scales(x: Tensor, scales: list[float], axes) -> tuple[list[int], list[float]]:
    sizes, factors = list(x.shape), [1.0] * x.dim()
    for axis, scale in zip(axes, scales, strict=True):
        sizes[axis], factors[axis] = floor(x.shape[axis] * scale), scale
    return sizes, factors


def _from_sizes(node: Node, x: Tensor, wanted: list[int], axes) -> tuple[list[int], list[float]]:
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    factors = [1.0] * x.dim()
    sizes = list(x.shape)
    if policy != "stretch":
        choose = min if policy == "not_larger" else max
        common = choose(size / x.shape[axis] for axis, size in zip(axes, wanted, strict=True))
        wanted = [floor(x.shape[axis] * common + 0.5) for axis in axes]
    for axis, size in zip(axes, wanted, strict=True):
        sizes[axis] = size
        factors[axis] = size / x.shape[axis] if policy == "stretch" else common
    return sizes, factors


def _resized(node: Node, x: Tensor, sizes: list[int], scales: list[float]) -> Tensor:
    mode = _torch_mode(node, x, sizes, scales)
    if mode is not None:
        corners = node.get("coordinate_transformation_mode") == "align_corners" if mode != "nearest" else None
        return F.interpolate(x, sizes[2:], mode=mode, align_corners=corners)
    for axis, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        if size != x.shape[axis] or scale != 1.0:
            x = _along(node, x, axis, size, scale)
    return x


def _torch_mode(node: Node, x: Tensor, sizes: list[int], scales: list[float]) -> str | None:
    """The name of PyTorch's interpolation that does exactly the same, if there is one."""
    if x.dim() not in TORCH_LINEAR or sizes[:2] != list(x.shape[:2]) or not x.is_floating_point():
        return None
    # PyTorch is given sizes, so their quotient has to be the scale.
    if any(size != length * scale for size, length, scale in zip(sizes, x.shape, scales, strict=True)):
        return None
    transform = node.get("coordinate_transformation_mode", "half_pixel")
    if node.get("mode", "nearest") == "nearest":
        rounding = node.get("nearest_mode", "round_prefer_floor")
        return "nearest" if transform == "asymmetric" and rounding == "floor" else None
    if transform == "pytorch_half_pixel" and min(sizes[2:]) > 1:
        transform = "half_pixel"  # they differ for a single pixel only
    if (
        node.get("mode") == "linear"
        and transform in ("half_pixel", "align_corners")
        and not node.get("exclude_outside")
    ):
        return TORCH_LINEAR[x.dim()]
    return None


def _along(node: Node, x: Tensor, axis: int, size: int, scale: float) -> Tensor:
    """One axis: a weighted sum of the neighbours of every new position."""
    length = x.shape[axis]
    where = _coordinates(node, length, size, scale)
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        nearest = _rounded(where, node.get("nearest_mode", "round_prefer_floor")).clamp(0, length - 1)
        return x.index_select(axis, nearest.long().to(x.device))
    lower = where.floor()
    offsets = (0, 1) if mode == "linear" else (-1, 0, 1, 2)
    weights = _weights(mode, where - lower, node.get("cubic_coeff_a", -0.75))  # (size, taps)
    taps = torch.stack([lower + offset for offset in offsets], 1)
    if node.get("exclude_outside", 0):
        weights = weights * ((taps >= 0) & (taps < length))
        weights = weights / weights.sum(1, keepdim=True)
    taps = taps.clamp(0, length - 1).long().to(x.device)
    weights = weights.to(x.device, x.dtype)
    shape = [-1 if i == axis else 1 for i in range(x.dim())]
    parts = [x.index_select(axis, taps[:, i]) * weights[:, i].reshape(shape) for i in range(len(offsets))]
    return torch.stack(parts).sum(0)


def _coordinates(node: Node, length: int, size: int, scale: float) -> Tensor:
    """Position in the original axis, for each position in the new one. (size,)"""
    x = torch.arange(size, dtype=torch.float64)
    transform = node.get("coordinate_transformation_mode", "asymmetric" if node.opset < 11 else "half_pixel")
    if transform == "asymmetric":
        return x / scale
    if transform == "align_corners":
        wanted = length * scale
        return x * (length - 1) / (wanted - 1) if wanted != 1 else x * 0
    if transform == "pytorch_half_pixel" and size <= 1:
        return x * 0
    if transform == "half_pixel_symmetric":
        adjustment = size / (scale * length)
        return length / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    return (x + 0.5) / scale - 0.5


def _rounded(where: Tensor, rounding: str) -> Tensor:
    if rounding == "floor":
        return where.floor()
    if rounding == "ceil":
        return where.ceil()
    return (where - 0.5).ceil() if rounding == "round_prefer_floor" else (where + 0.5).floor()


def _weights(mode: str, t: Tensor, a: float) -> Tensor:
    """Weights of the neighbours of a point that lies `t` above its lower neighbour. (size, taps)"""
    if mode == "linear":
        return torch.stack([1 - t, t], 1)

    def near(d: Tensor) -> Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Tensor) -> Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return torch.stack([far(1 + t), near(t), near(1 - t), far(2 - t)], 1)
