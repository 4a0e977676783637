"""Padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.conv import torch_padding
from onnx_spdy.models.operators.operator import Compute, Node


def pad(node: Node) -> Compute:
    mode = node.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise node.unsupported(f"mode '{mode}'")
    if node.opset < 11:
        amounts, fill = node.get("pads", node.get("paddings")), node.get("value", 0.0)
        return lambda x: _padded(x, amounts, None, mode, fill)

    def run(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        fill = 0 if value is None else value.item()
        return _padded(x, pads.tolist(), None if axes is None else axes.tolist(), mode, fill)

    return run


def _padded(x: Tensor, pads: list[int], axes: list[int] | None, mode: str, fill: float) -> Tensor:
    begins, ends = [0] * x.dim(), [0] * x.dim()
    for i, axis in enumerate(range(x.dim()) if axes is None else axes):
        begins[axis], ends[axis] = pads[i], pads[i + len(pads) // 2]
    if mode == "constant":
        return F.pad(x, torch_padding(begins, ends), value=fill)
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            x = x.index_select(axis, _sources(x.shape[axis], begin, end, mode, x.device))
    return x


def _sources(length: int, begin: int, end: int, mode: str, device: torch.device) -> Tensor:
    """Which element of the axis lies at each position of the padded one."""
    positions = torch.arange(-begin, length + end, device=device)
    if mode == "edge":
        return positions.clamp(0, length - 1)
    if mode == "wrap":
        return positions.remainder(length)
    period = max(2 * (length - 1), 1)
    folded = positions.remainder(period)
    return torch.minimum(folded, period - folded) if length > 1 else torch.zeros_like(positions)
