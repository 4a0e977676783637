"""Squared error of each channel of an output, relative to how much the dense network's channel varies.

One norm for a whole output lets what is large drown what is small: a detector's boxes go to 640 pixels, its scores
to 1. So each channel is measured by its own variance over samples and positions, and all channels count alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

CONSTANT = 1e-6  # a channel whose variance is a smaller part of its mean square is constant: its size is its scale
LEAST_SHARE = 1e-3  # of the largest variance among scores in 0..1, or of the median one for a channel of zeros
LARGEST_FILL = -1e4  # a lowest value that is at most this, and repeated, stands for "masked"
NOTHING = 1e-20


@dataclass(frozen=True)
class ChannelScale:
    """How one output is compared.

    Attributes:
        axis: of its channels, or None where all its values are one channel.
        variance: (channels,) float32, by which squared errors are divided.
        fill: the finite value that stands for masked entries, or None.
    """

    axis: int | None
    variance: torch.Tensor
    fill: float | None

    @classmethod
    def of(cls, references: Sequence[torch.Tensor], samples_axis: int = 0) -> ChannelScale:
        """From what the dense network gives for all batches, with samples on this axis."""
        candidates = _candidate_axes([tuple(value.shape) for value in references], samples_axis)
        references = [value for value in references if value.numel()]
        fill = _fill(references)
        moments = [(axis, _Moments.of(references, axis, fill)) for axis in candidates]
        axis, found = max(moments, key=lambda one: one[1].spread)  # the first of equal ones
        return cls(axis, found.scale(), fill)

    def error(self, output: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        """Mean over channels of squared error / variance; entries that are masked in both are left out."""
        difference = torch.where(_same_mask(output, dense, self.fill), 0.0, output.float() - dense.float())
        squared = _rows(difference.square(), self.axis)  # (rows, channels)
        counts = _counted(_rows(dense.float(), self.axis), self.fill).sum(0).clamp_min(1)
        return (squared.sum(0) / counts / self.variance.to(squared.device)).mean()


@dataclass(frozen=True)
class _Moments:
    """(channels,) each, over all counted entries of some batches, in float64."""

    mean: torch.Tensor
    variance: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor

    @classmethod
    def of(cls, references: Sequence[torch.Tensor], axis: int | None, fill: float | None) -> _Moments:
        count = mean = squares = lowest = highest = torch.zeros((), dtype=torch.float64)
        for number, value in enumerate(references):
            rows = _rows(value.detach().double(), axis)
            kept = _counted(rows, fill)
            new = kept.sum(0).double()
            here = torch.where(kept, rows, 0.0).sum(0) / new.clamp_min(1)
            apart = torch.where(kept, rows - here, 0.0).square().sum(0)
            low = torch.where(kept, rows, torch.inf).amin(0)
            high = torch.where(kept, rows, -torch.inf).amax(0)
            if not number:
                count, mean, squares, lowest, highest = new, here, apart, low, high
                continue
            both = (count + new).clamp_min(1)  # Chan, Golub & LeVeque (1979): moments of two parts together
            squares = squares + apart + (here - mean).square() * count * new / both
            mean, count = mean + (here - mean) * new / both, count + new
            lowest, highest = torch.minimum(lowest, low), torch.maximum(highest, high)
        return cls(mean, squares / count.clamp_min(1), lowest, highest)

    @property
    def mean_square(self) -> torch.Tensor:
        return self.mean.square() + self.variance

    @property
    def spread(self) -> float:
        """How much the channels differ in size, by the logarithm; the axis where they differ more has the channels."""
        sizes = self.mean_square
        if len(sizes) < 2 or not float(sizes.max()) > 0:
            return 0.0
        return float(sizes.clamp_min(1e-12 * float(sizes.max())).log().std())

    def scale(self) -> torch.Tensor:
        """What squared errors are divided by.

        A constant channel counts by its size. Scores (all values in 0..1) have a scale by nature: one that hardly
        varies, of a class that no sample shows, must not count a thousand times as much as the others.
        """
        scale = torch.where(self.variance > CONSTANT * self.mean_square, self.variance, self.mean_square)
        scores = (self.lowest >= 0) & (self.highest <= 1)
        if bool(scores.any()):
            least = LEAST_SHARE * self.variance[scores].max()
            scale = torch.where(scores, scale.clamp_min(least), scale)
        positive = scale[scale > 0]
        least = LEAST_SHARE * positive.median() if len(positive) else torch.tensor(NOTHING)
        return torch.where(scale > 0, scale, least).clamp_min(NOTHING).float()


def channel_scales(
    references: Sequence[Mapping[str, torch.Tensor]], axes: Mapping[str, int] | None = None
) -> dict[str, ChannelScale]:
    """The scale of each floating-point output, from what the dense network gives for all batches.

    One that is empty in all of them (nothing was found) has none.

    Args:
        axes: output -> the axis on which its samples lie; by default the first.
    """
    axes = axes or {}
    names = [name for name, value in references[0].items() if value.is_floating_point()]
    values = {name: [outputs[name] for outputs in references] for name in names}
    found = {name: some for name, some in values.items() if any(one.numel() for one in some)}
    return {name: ChannelScale.of(some, axes.get(name, 0)) for name, some in found.items()}


def masked_alike(output: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Entries that are the same infinity in both networks: masked, so that they say nothing."""
    return dense.isinf() & (output == dense)


def _same_mask(output: torch.Tensor, dense: torch.Tensor, fill: float | None) -> torch.Tensor:
    same = masked_alike(output, dense)
    return same if fill is None else same | ((dense == fill) & (output == fill))


def _fill(references: Sequence[torch.Tensor]) -> float | None:
    """The lowest finite value where it is so low and so often repeated that it stands for a mask."""
    finite = [value[value.isfinite()] for value in references]
    lowest = min((float(values.min()) for values in finite if values.numel()), default=0.0)
    if lowest > LARGEST_FILL or sum(int((values == lowest).sum()) for values in finite) < 2:
        return None
    return lowest


def _candidate_axes(shapes: Sequence[tuple[int, ...]], samples_axis: int) -> list[int | None]:
    """Beside the samples the first axis and the last one, where they have one size in all batches."""
    others = [axis for axis in range(len(shapes[0])) if axis != samples_axis]
    axes = dict.fromkeys((*others[:1], *others[-1:]))
    fitting: list[int | None] = [axis for axis in axes if len({shape[axis] for shape in shapes}) == 1]
    return fitting or [None]


def _rows(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """(rows, channels)"""
    return values.reshape(-1, 1) if axis is None else values.movedim(axis, -1).flatten(0, -2)


def _counted(rows: torch.Tensor, fill: float | None) -> torch.Tensor:
    """(rows, channels) bool: finite, not masked, and not in a row of zeros, as padding leaves it."""
    kept = rows.isfinite() & (rows != 0).any(1, keepdim=True)
    return kept if fill is None else kept & (rows != fill)
