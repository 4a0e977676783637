"""Weights on their grid: a scale for each output channel, and rounding that makes good its own errors.

Columns are rounded one after the other; what that changes in the layer's output is made good by the columns after it,
as far as the inputs are correlated. Zeros stay zeros.

Source: Frantar et al., GPTQ (ICLR 2023), Algorithm 1; the scale by least squares on the layer's output with a diagonal
Hessian.
"""

from __future__ import annotations

import numpy as np
import torch

from onnx_spdy.models.int8.nearest import LARGEST, LEAST_SCALE
from onnx_spdy.models.int8.write import IntegerWeight
from onnx_spdy.pipeline.database.pruners.quadratic import cholesky, damped, inverse

SHRINKS = torch.linspace(1.0, 0.6, 21)  # of the scale that holds a channel's largest weight
BLOCK = 128  # columns whose errors go to the columns after them together


def integer_weight(values: np.ndarray, axis: int, hessian: torch.Tensor | None) -> IntegerWeight:
    """A stored weight in integers.

    Args:
        values: as the file stores them.
        axis: on which the output channels lie.
        hessian: of the layer; see `rounded`.
    """
    turned = torch.from_numpy(values.copy()).transpose(0, axis)  # (out, ...)
    integers, scale = rounded(turned.flatten(1), hessian)
    return IntegerWeight(integers.view(turned.shape).transpose(0, axis).contiguous().numpy(), scale.numpy())


def rounded(weight: torch.Tensor, hessian: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of a weight, and their scales.

    Args:
        weight: (out, d) float32.
        hessian: (d, d), the mean of x x^T over the layer's inputs; None where it isn't known: to the nearest then.
    Returns:
        (out, d) int8 in [-127, 127], and (out,) float32.
    """
    weight = weight.float()
    power = hessian.diagonal().float() if hessian is not None else torch.ones(weight.shape[1])
    scale = _scales(weight, power)
    if hessian is None:
        return _nearest(weight, scale.unsqueeze(1)).to(torch.int8), scale
    factor = cholesky(inverse(damped(hessian)), upper=True).float()  # (d, d), U with U^T U = H^-1
    return _swept(weight.clone(), scale, factor), scale


def _nearest(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).round_().clamp_(-LARGEST, LARGEST)


def _scales(weight: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """(out,) the scale with the least error in the output, where inputs are taken for uncorrelated.

    Args:
        power: (d,) mean squares of the inputs.
    """
    whole = weight.abs().amax(1).clamp_min(LEAST_SCALE) / LARGEST
    errors = torch.stack(
        [
            ((weight - _nearest(weight, s.unsqueeze(1)) * s.unsqueeze(1)).square() * power).sum(1)
            for s in (whole * shrink for shrink in SHRINKS)
        ]
    )  # (shrinks, out)
    return whole * SHRINKS[errors.argmin(0)]


def _swept(weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(out, d) int8; `weight` is used up."""
    zero = weight == 0
    integers = torch.empty(weight.shape, dtype=torch.int8)
    columns = weight.shape[1]
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block, errors = weight[:, begin:end], torch.empty(len(weight), end - begin)
        for column in range(end - begin):
            number = begin + column
            whole = _nearest(block[:, column], scale).masked_fill_(zero[:, number], 0.0)
            error = (block[:, column] - whole * scale) / factor[number, number]
            block[:, column:] -= error.unsqueeze(1) * factor[number, number:end]
            integers[:, number], errors[:, column] = whole.to(torch.int8), error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return integers
