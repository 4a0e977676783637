"""Masks: which weights a level keeps, given how much each one matters; and whether weights are what a level says."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from onnx_spdy.pipeline.level import BLOCKS, Level


def select_mask(scores: torch.Tensor, level: Level, zeros: int | None = None) -> torch.Tensor:
    """Keep the highest scores that the level's pattern allows.

    Args:
        scores: (out, in, *kernel), higher matters more, finite.
        level: unstructured zeros exactly `level.zeros(scores.numel())` weights; blocks go as a whole (the last one
            of an axis is smaller where its length isn't a multiple); N:M keeps N in every M input channels for each
            output channel and kernel position.
        zeros: how many weights (unstructured) or blocks go, where that isn't what the level says of the whole.
    Returns:
        (out, in, *kernel) bool, True = keep.
    """
    if level.pattern == "dense":
        return torch.ones_like(scores, dtype=torch.bool)
    if not level.is_n_of_m:
        blocks = _blocked(scores, level, padding=0.0).sum((1, 3))  # (blocks of outputs, of inputs, *kernel)
        zeros = level.zeros(blocks.numel()) if zeros is None else zeros
        keep = _keep_largest(blocks.reshape(-1), blocks.numel() - zeros).view(blocks.shape)
        outputs, inputs = level.block
        whole = keep.repeat_interleave(outputs, 0).repeat_interleave(inputs, 1)
        return whole[: scores.shape[0], : scores.shape[1]].contiguous()
    kept, size = level.group
    grouped = _grouped(scores, size, padding=-torch.inf)
    keep = torch.zeros_like(grouped, dtype=torch.bool)
    keep.scatter_(-1, grouped.topk(kept, dim=-1).indices, True)
    return _ungrouped(keep, scores)


def level_violation(weight: np.ndarray | torch.Tensor, level: Level) -> str | None:
    """What is wrong with weights (out, in, *kernel) that claim a level; None when nothing is."""
    zero = torch.as_tensor(np.asarray(weight) == 0)
    if level.pattern in BLOCKS:
        empty = _blocked(zero, level, padding=True).all(1).all(2)
        found, promised = int(empty.sum()), level.zeros(empty.numel())
        what = "weights" if level.block == (1, 1) else "blocks"
        return f"{found} of {empty.numel()} {what} are zero, it promises {promised}" if found < promised else None
    if level.is_n_of_m:
        kept, size = level.group
        most = int((~_grouped(zero, size, padding=True)).sum(-1).max())
        return f"{most} non-zeros in a group of {size} input channels" if most > kept else None
    return None


def comes_in_blocks(weight: np.ndarray, pattern: str) -> bool:
    """Whether all zeros of weights (out, in, *kernel) come in whole blocks of a pattern of `BLOCKS`."""
    outputs, inputs = BLOCKS[pattern]
    zero = weight == 0
    first = zero[::outputs, ::inputs]
    alike = first.repeat(outputs, 0)[: len(zero)].repeat(inputs, 1)[:, : zero.shape[1]]
    return bool((zero == alike).all())


def _keep_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """(n,) bool with exactly `count` True; of equal scores the earlier one is kept."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        threshold = scores.kthvalue(len(scores) - count + 1).values
        keep[scores > threshold] = True
        ties = torch.nonzero(scores == threshold).flatten()
        keep[ties[: count - int(keep.sum())]] = True
    return keep


def _blocked(scores: torch.Tensor, level: Level, padding: float | bool) -> torch.Tensor:
    """(out, in, *kernel) -> (blocks of outputs, their outputs, blocks of inputs, their inputs, *kernel)."""
    (outputs, inputs), (out, channels, *kernel) = level.block, scores.shape
    around = [(0, 0)] * len(kernel) + [(0, -channels % inputs), (0, -out % outputs)]
    padded = functional.pad(scores, [one for pair in around for one in pair], value=padding)
    return padded.reshape(-(-out // outputs), outputs, -(-channels // inputs), inputs, *kernel)


def _grouped(scores: torch.Tensor, size: int, padding: float | bool) -> torch.Tensor:
    """(out, in, *kernel) -> (out, *kernel, ceil(in / size), size)."""
    moved = scores.movedim(1, -1)
    padded = functional.pad(moved, (0, -moved.shape[-1] % size), value=padding)
    return padded.reshape(*padded.shape[:-1], -1, size)


def _ungrouped(keep: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    flat = keep.flatten(-2)[..., : scores.shape[1]]
    return flat.movedim(-1, 1).contiguous()
