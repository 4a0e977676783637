"""Optimal Brain Compression: exact greedy OBS. The yardstick of quality; cubic in the layer's width for every row.

The traces of all rows, merged, give the masks of all levels; a level's weights are the exact least-squares solution
on its mask. See elimination.py.

Source: Frantar & Alistarh, OBC (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onnx_spdy.pipeline.database.pruners.elimination import Units, eliminate, kept_columns, solutions
from onnx_spdy.pipeline.database.pruners.quadratic import damped, inflation, inverse
from onnx_spdy.pipeline.level import Level

DOUBLE_WIDTH = 1024  # layers up to this width are computed in float64, wider ones in float32
SINGLE_INFLATION = 1e3  # but where an input's [H^-1]_pp H_pp is above: it falls to 1, by differences, on the way down


def obc(weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level]) -> Iterator[torch.Tensor]:
    """See `Pruner`. Levels may come in any order: each depends on the dense weights alone."""
    return eliminated(weight, hessian, levels, panels=False)


def eliminated(
    weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level], *, panels: bool
) -> Iterator[torch.Tensor]:
    """Weights at each level from elimination traces; `panels` as for `eliminate`.

    Memory: the weights at all levels of one pattern, and `STATE_BYTES`.
    """
    curvature = damped(hessian)
    inverted = inverse(curvature)
    double = hessian.shape[0] <= DOUBLE_WIDTH or float(inflation(curvature, inverted).max()) > SINGLE_INFLATION
    precision = torch.float64 if double else torch.float32
    inverted, curvature = inverted.to(precision), curvature.to(precision)
    dense = weight.flatten(1).to(precision)
    found: dict[Level, torch.Tensor] = {}
    for pattern in dict.fromkeys(level.pattern for level in levels if level.pattern != "dense"):
        wanted = [level for level in dict.fromkeys(levels) if level.pattern == pattern]
        units = Units.of(weight.shape, wanted[0])
        order, losses = eliminate(dense, inverted, units, panels=panels)
        kept = kept_columns(order, losses, units, wanted)
        found.update(zip(wanted, solutions(dense, curvature, units, kept), strict=True))
    for level in levels:
        yield weight.clone() if level.pattern == "dense" else found[level].to(weight.dtype).view(weight.shape).clone()
