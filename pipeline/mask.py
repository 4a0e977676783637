"""Masks: which weights a level keeps, given how much each one matters."""

from __future__ import annotations

import torch
from torch.nn import functional

from onnx_spdy.pipeline.level import Level


def select_mask(scores: torch.Tensor, level: Level, zeros: int | None = None) -> torch.Tensor:
    """Keep the highest scores that the level's pattern allows.

    Args:
        scores: (out, in, *kernel), higher matters more, finite.
        level: unstructured zeros exactly `level.zeros(scores.numel())` weights; block4 zeros whole runs of 4
            input channels (the last run is shorter where in % 4 != 0); N:M keeps N in every M input channels
            for each output channel and kernel position.
        zeros: how many weights (unstructured) or runs (block4) go, where that isn't what the level says of the whole.
    Returns:
        (out, in, *kernel) bool, True = keep.
    """
    if level.pattern == "dense":
        return torch.ones_like(scores, dtype=torch.bool)
    if level.pattern == "unstructured":
        zeros = level.zeros(scores.numel()) if zeros is None else zeros
        return _keep_largest(scores.reshape(-1), scores.numel() - zeros).view(scores.shape)
    if level.pattern == "block4":
        grouped = _grouped(scores, 4, padding=0.0).sum(-1)  # (out, *kernel, groups)
        zeros = level.zeros(grouped.numel()) if zeros is None else zeros
        keep = _keep_largest(grouped.reshape(-1), grouped.numel() - zeros)
        return _ungrouped(keep.view(grouped.shape).unsqueeze(-1).expand(*grouped.shape, 4), scores)
    kept, size = level.group
    grouped = _grouped(scores, size, padding=-torch.inf)
    keep = torch.zeros_like(grouped, dtype=torch.bool)
    keep.scatter_(-1, grouped.topk(kept, dim=-1).indices, True)
    return _ungrouped(keep, scores)


def _keep_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """(n,) bool with exactly `count` True; of equal scores the earlier one is kept."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        threshold = scores.kthvalue(len(scores) - count + 1).values
        keep[scores > threshold] = True
        ties = torch.nonzero(scores == threshold).flatten()
        keep[ties[: count - int(keep.sum())]] = True
    return keep


def _grouped(scores: torch.Tensor, size: int, padding: float) -> torch.Tensor:
    """(out, in, *kernel) -> (out, *kernel, ceil(in / size), size)."""
    moved = scores.movedim(1, -1)
    padded = functional.pad(moved, (0, -moved.shape[-1] % size), value=padding)
    return padded.reshape(*padded.shape[:-1], -1, size)


def _ungrouped(keep: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    flat = keep.flatten(-2)[..., : scores.shape[1]]
    return flat.movedim(-1, 1).contiguous()
