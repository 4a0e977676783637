"""Grids: the numbers that an 8-bit tensor can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_SCALE = float(np.finfo(np.float32).tiny) * 2**16  # of a tensor that is always zero: any will do


@dataclass(frozen=True)
class Grid:
    """`scale * (q - zero)` for the integers q of a type.

    Attributes:
        scale: float32, () for the tensor, or one for each index of `axis`.
        zero: zero point, the same for all.
        signed: int8, or uint8.
        axis: of the tensor; None where one scale serves all of it.
    """

    scale: np.ndarray
    zero: int
    signed: bool
    axis: int | None = None

    @property
    def dtype(self) -> type[np.signedinteger] | type[np.unsignedinteger]:
        return np.int8 if self.signed else np.uint8

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest q."""
        return (-128, 127) if self.signed else (0, 255)

    @property
    def zeros(self) -> np.ndarray:
        """The zero point in the shape of the scale."""
        return np.full(self.scale.shape, self.zero, self.dtype)


def grid_between(low: np.ndarray, high: np.ndarray, *, signed: bool, symmetric: bool, axis: int | None = None) -> Grid:
    """The grid of an activation that lies between two numbers, and always holds 0 exactly.

    Args:
        low, high: () or (channels,).
        signed: int8, or uint8.
        symmetric: zero point 0 (in uint8 for what is never negative only).
        axis: where the channels are.
    """
    low, high = np.minimum(low, 0).astype(np.float64), np.maximum(high, 0).astype(np.float64)
    if symmetric:
        steps = 127 if signed else 255
        scale, zero = np.maximum(high, -low if signed else 0) / steps, 0
    else:
        scale = (high - low) / 255
        zero = round(float(-low / np.maximum(scale, LEAST_SCALE))) - (128 if signed else 0)
    return Grid(np.asarray(np.maximum(scale, LEAST_SCALE), np.float32), zero, signed, axis)
