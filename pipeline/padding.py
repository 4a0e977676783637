"""Padding: positions of a sequence that an attention mask rules out don't count.

A batch of sentences is filled up with padding, often to several times its own length. What a network computes there
reaches no output that anyone reads, so it must not decide which weights stay: it is left out of Hessians, statistics
and losses, whatever stands there, NaN too. The mask is an input of the network: (samples, positions), 1 for tokens and
0 for padding, as Hugging Face's models and BERT's own have it; or a mask that is added to attention scores,
(samples, ..., positions), with 0 at tokens and -inf or a very low number at padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from onnx_spdy.pipeline.user_data import MASK_NAME

LOWEST_SCORE = -1e3  # what is added to attention scores and is lower forbids; -1e4 and the smallest float are usual


class Padding:
    """The padding of one batch.

    Args:
        inputs: input name -> (samples, ...).
    """

    def __init__(self, inputs: Mapping[str, np.ndarray]) -> None:
        found = (tokens(name, array) for name, array in inputs.items())
        self._real = [torch.from_numpy(mask) for mask in found if mask is not None and mask.any() and not mask.all()]

    def real_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(..., channels) -> (n, channels), without those of padding; other values as they are."""
        real = self._real_in(values)
        if real is None or real.shape[-1] != 1:  # positions where the channels should be
            return values
        return values[real[..., 0].expand(values.shape[:-1])]

    def zeroed(self, values: torch.Tensor) -> torch.Tensor:
        """The same values with zeros at padding; other values as they are."""
        real = self._real_in(values)
        return values if real is None else torch.where(real, values, torch.zeros_like(values))

    def _real_in(self, values: torch.Tensor) -> torch.Tensor | None:
        """Where values don't belong to padding: bool, broadcasts to `values`; of the first mask that fits."""
        found = (_aligned(mask.to(values.device), values) for mask in self._real)
        return next((real for real in found if real is not None), None)


def _aligned(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """A mask (samples, positions) with axes of size 1 for the others of `values`, or None where it doesn't fit.

    Of the usual layouts: (samples, positions, ...), (samples, heads, positions, ...), (samples, channels, positions),
    (positions, samples, ...), (samples * positions, ...), (samples * heads, positions, ...).
    """
    samples, positions = mask.shape
    shape, rank = tuple(values.shape), values.ndim
    if rank == 2 and shape == (samples, positions):
        return mask if _spoils(mask, values) else None
    if rank >= 2 and shape[0] == samples * positions and shape[:2] != (samples, positions) and shape[1] != positions:
        return mask.flatten().view(-1, *[1] * (rank - 1))
    if rank < 3:
        return None
    if shape[:2] == (positions, samples) and positions != samples:
        return mask.T.reshape(positions, samples, *[1] * (rank - 2))
    if shape[0] != samples:
        if shape[1] != positions or shape[0] % samples:
            return None
        return mask.repeat_interleave(shape[0] // samples, 0).view(shape[0], positions, *[1] * (rank - 2))
    if rank > 3 and shape[2] == positions:  # also where there are as many heads as positions
        return mask.view(samples, 1, positions, *[1] * (rank - 3))
    if shape[1] == positions:
        return mask.view(samples, positions, *[1] * (rank - 2))
    if rank == 3 and shape[2] == positions and _spoils(mask, values.movedim(2, 1)):
        return mask.view(samples, 1, positions)
    return None


def _spoils(mask: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether padding alone isn't finite in (samples, positions, ...); else the axis may be one of classes."""
    return bool(values[mask].isfinite().all()) and not bool(values[~mask].isfinite().all())


def tokens(name: str, array: np.ndarray) -> np.ndarray | None:
    """(samples, positions) bool of an input that is a mask, true at tokens; None of any other input."""
    if array.ndim < 2:
        return None
    if MASK_NAME.search(name) and np.isin(array, (0, 1)).all():
        allowed = array != 0
    elif array.dtype.kind == "f" and ("mask" in name.lower() or np.isneginf(array).any()):
        allowed = array > LOWEST_SCORE
        if not (array[allowed] == 0).all():
            return None
    else:
        return None
    return allowed.any(axis=tuple(range(1, array.ndim - 1)))  # a position that nothing may look at is padding
