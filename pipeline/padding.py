"""Padding: positions of a sequence that an attention mask rules out don't count.

A batch of sentences is filled up with padding, often to several times its own length. What a network computes there
reaches no output that anyone reads, so it must not decide which weights stay: it is left out of Hessians, statistics
and losses. The mask is an input of the network, (samples, positions), 1 for tokens and 0 for padding, as Hugging Face's
models and BERT's own have it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

MASKS = ("attention_mask", "input_mask")  # what names of such inputs end in


class Padding:
    """The padding of one batch.

    Args:
        inputs: input name -> (samples, ...).
    """

    def __init__(self, inputs: Mapping[str, np.ndarray]) -> None:
        masks = [array for name, array in inputs.items() if name.lower().endswith(MASKS) and array.ndim == 2]
        self._real = [torch.from_numpy(array != 0) for array in masks if _has_padding(array)]

    def real_rows(self, values: torch.Tensor) -> torch.Tensor:
        """(samples, positions, ..., channels) -> (n, channels), without those of padding; other values as they are."""
        mask = self._mask(values)
        return values if mask is None else values[mask.to(values.device)].flatten(0, -2)

    def zeroed(self, values: torch.Tensor) -> torch.Tensor:
        """(samples, positions, ..., channels) with zeros at padding; other values as they are."""
        mask = self._mask(values)
        return values if mask is None else values * mask.view(*mask.shape, *[1] * (values.ndim - 2)).to(values)

    def _mask(self, values: torch.Tensor) -> torch.Tensor | None:
        """(samples, positions) bool of the first mask that fits; two axes alone may be (samples, classes)."""
        fitting = (mask for mask in self._real if values.ndim > 2 and mask.shape == values.shape[:2])
        return next(fitting, None)


def _has_padding(mask: np.ndarray) -> bool:
    return bool(np.isin(mask, (0, 1)).all()) and not mask.all() and bool(mask.any())
