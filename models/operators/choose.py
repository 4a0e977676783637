"""Choose elements by value: results whose size depends on the data, and boxes of detectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node, trimmed


def compress(node: Node) -> Compute:
    axis = node.get("axis")

    def run(x: Tensor, condition: Tensor) -> Tensor:
        kept = condition.nonzero().flatten()
        return x.flatten()[kept] if axis is None else x.index_select(axis, kept)

    return run


def unique(node: Node) -> Compute:
    axis, ordered = node.get("axis"), node.get("sorted", 1)

    def run(x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = x.flatten() if axis is None else x
        along = axis or 0
        values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=along)
        positions = torch.arange(len(inverse), device=x.device)
        firsts = torch.full_like(counts, len(inverse)).scatter_reduce(0, inverse, positions, "amin")
        if not ordered:  # in the order of first appearance
            order = firsts.argsort()
            values, counts, firsts = values.index_select(along, order), counts[order], firsts[order]
            inverse = order.argsort()[inverse]
        return trimmed(node, (values, firsts, inverse, counts))

    return run


def reverse_sequence(node: Node) -> Compute:
    batch_axis, time_axis = node.get("batch_axis", 1), node.get("time_axis", 0)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        y = x.movedim((batch_axis, time_axis), (0, 1))
        time = torch.arange(y.shape[1], device=x.device)[None]
        ends = lengths.reshape(-1, 1).long()
        source = torch.where(time < ends, ends - 1 - time, time)
        source = source.reshape(*source.shape, *[1] * (y.dim() - 2)).expand(y.shape)
        return y.gather(1, source).movedim((0, 1), (batch_axis, time_axis))

    return run


def center_crop_pad(node: Node) -> Compute:
    axes = node.get("axes")

    def run(x: Tensor, shape: Tensor) -> Tensor:
        for axis, wanted in zip(range(x.dim()) if axes is None else axes, shape.tolist(), strict=True):
            along, have = axis % x.dim(), x.shape[axis]
            if wanted < have:
                x = x.narrow(along, (have - wanted) // 2, wanted)
            elif wanted > have:
                begin = (wanted - have) // 2
                x = F.pad(x, (*[0, 0] * (x.dim() - 1 - along), begin, wanted - have - begin))
        return x

    return run


def non_max_suppression(node: Node) -> Compute:
    """Boxes in the order of their scores, without those that overlap a better one of their class. (kept, 3)"""
    centred = bool(node.get("center_point_box", 0))

    def run(
        boxes: Tensor,
        scores: Tensor,
        most: Tensor | None = None,
        iou: Tensor | None = None,
        least: Tensor | None = None,
    ) -> Tensor:
        limit = 0 if most is None else int(most.item())
        overlap = 0.0 if iou is None else float(iou.item())
        found = []
        for b in range(len(boxes)):
            corners = _corners(boxes[b], centred)
            for c in range(scores.shape[1]):
                for i in _kept(corners, scores[b, c], limit, overlap, None if least is None else float(least.item())):
                    found.append((b, c, i))
        return torch.tensor(found, dtype=torch.int64, device=boxes.device).reshape(-1, 3)

    return run


def _corners(boxes: Tensor, centred: bool) -> Tensor:
    """(boxes, 4): lower and upper corner of each."""
    a, b = boxes[:, :2], boxes[:, 2:]
    return torch.cat([a - b / 2, a + b / 2], 1) if centred else torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1)


def _kept(corners: Tensor, scores: Tensor, limit: int, overlap: float, least: float | None) -> list[int]:
    order = torch.sort(scores, descending=True, stable=True).indices
    if least is not None:
        order = order[scores[order] > least]
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    kept: list[int] = []
    while len(order) and len(kept) < limit:
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = torch.maximum(corners[order, :2], corners[best, :2])
        high = torch.minimum(corners[order, 2:], corners[best, 2:])
        shared = (high - low).clamp_min(0).prod(1)
        union = areas[order] + areas[best] - shared
        order = order[shared <= overlap * union]
    return kept
