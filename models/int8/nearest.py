"""Weights rounded to the nearest integer: what is there without calibration samples."""

from __future__ import annotations

import numpy as np

from onnx_spdy.models.int8.write import IntegerWeight

LARGEST = 127  # symmetric: -128 has no counterpart
LEAST_SCALE = 1e-30  # of a channel without weights


def nearest(values: np.ndarray, axis: int) -> IntegerWeight:
    """A stored weight in integers, with the scale of each channel that holds its largest value.

    Args:
        values: as the file stores them.
        axis: on which the output channels lie.
    """
    others = tuple(number for number in range(values.ndim) if number != axis)
    scale = np.maximum(np.abs(values).max(axis=others) / LARGEST, LEAST_SCALE).astype(np.float32)
    steps = np.round(values / np.expand_dims(scale, others))
    return IntegerWeight(np.clip(steps, -LARGEST, LARGEST).astype(np.int8), scale)
