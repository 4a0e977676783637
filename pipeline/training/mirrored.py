"""Mirrored images: what few images show once more.

A training that has seen each image several times begins to learn them by heart. Of a mirrored one it has no label, and
needs none: the dense network says what it sees there, whatever that is, once for the whole training.
"""

from __future__ import annotations

import numpy as np

from onnx_spdy.pipeline.data import Samples

COLOURS = 3
SMALLEST = 16  # positions along height and width; less is a map of features, more likely than not


class WithMirrored(Samples):
    """Images, and behind them the same again, mirrored from left to right, without labels."""

    def __len__(self) -> int:
        return 2 * super().__len__()

    def take(self, index: slice | np.ndarray) -> Samples:
        """The samples at `index`: all as they are, or all mirrored."""
        count = len(self) // 2
        numbers = np.arange(2 * count)[index]
        one = Samples(self.inputs, self.target, self.axes).take(numbers % count)
        if not len(numbers) or numbers.min() < count:
            assert not len(numbers) or numbers.max() < count
            return one
        return Samples({name: np.ascontiguousarray(images[..., ::-1]) for name, images in one.inputs.items()})


def with_mirrored(samples: Samples) -> WithMirrored | None:
    """The samples and their mirror images; None where they aren't images.

    Args:
        samples: images are (samples, 3, height, width) in floating point.
    """
    arrays = samples.inputs.values()
    if any(samples.axes.get(name, 0) != 0 for name in samples.inputs):
        return None
    if not all(one.ndim == 4 and one.dtype.kind == "f" and one.shape[1] == COLOURS for one in arrays):
        return None
    if min(min(one.shape[2:]) for one in arrays) < SMALLEST:
        return None
    return WithMirrored(samples.inputs, samples.target, samples.axes)
