"""Magnitude pruning: the smallest weights go, the others stay as they are. The yardstick, not the method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.mask import select_mask


def magnitude(weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level]) -> Iterator[torch.Tensor]:
    """See `Pruner`; the Hessian isn't used."""
    for level in levels:
        yield torch.where(select_mask(weight.abs(), level), weight, 0.0)
