"""The objective: the calibration loss of a compressed network, as it will be once its statistics are corrected."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch

from onnx_spdy.models import Suspended, fixed_batch
from onnx_spdy.pipeline.correct import LEAST_SAMPLES, BatchCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.loss import FittedLoss, Loss, LossError, fit_loss, numbers
from onnx_spdy.pipeline.network import BATCH_SIZE, DENSE_WEIGHTS, Keep, Network, Weights
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.pipeline.rows import Axes, sample_axes

LARGEST_BATCH = 64


class Objective:
    """The calibration loss of a network with other weights.

    Args:
        network: whose outputs with dense weights are the reference.
        samples: on which the loss is computed.
        loss: a name of LOSSES, a function of your own, one that was fitted already, or None for the one that fits the
            outputs (see `fit_loss`).
        corrected: whether each batch is corrected by its own statistics while it runs (see `BatchCorrection`), unless
            it is too small: what is deployed will be corrected, too, and profiles that are good without it aren't
            those that are good with it.
    Attributes:
        network, samples: as given.
        name: of the loss.
        loss: as it was fitted to the dense outputs of these samples.
        batches: the samples in batches; the first few make a small set of samples, more of them a larger one.
        stages: numbers of samples, each about twice the one before, up to all; each is a whole number of batches.

    On CPUs with bfloat16 instructions both networks run in bfloat16, which takes half the time; the loss itself
    is computed in float32.
    """

    def __init__(
        self, network: Network, samples: Samples, loss: str | Loss | FittedLoss | None = None, *, corrected: bool = True
    ) -> None:
        self.network, self.samples = network, samples
        self._bfloat16 = network.bfloat16
        if fixed_batch(network.model) is None:
            sizes = growing_batches(len(samples))
            self.batches = [
                samples.take(slice(end - size, end)) for size, end in zip(sizes, np.cumsum(sizes), strict=True)
            ]
        else:
            self.batches = network.batches(samples)
        self.stages = stages(np.cumsum([len(batch) for batch in self.batches]).tolist())
        paddings = [Padding(batch.samples_first) for batch in self.batches]
        self._correction = BatchCorrection(network, paddings) if corrected else None
        self._reference: dict[int, dict[str, torch.Tensor]] = {}  # of the batches that were asked for
        if isinstance(loss, FittedLoss):
            self.loss = loss
        else:
            references = [self._dense(number) for number in range(len(self.batches))]
            self.loss = fit_loss(loss, references, numbers(samples.target), self._axes())
        self.name = self.loss.name
        self.of_batch(0)  # refuses a loss that doesn't fit before any work is done

    def __call__(self, weights: Weights) -> float:
        """Mean loss of the network with these weights over all samples.

        Raises:
            LossError: the loss is not a finite number.
        """
        return self.mean([self.of_batch(number, weights) for number in range(len(self.batches))])

    def _dense(self, number: int) -> dict[str, torch.Tensor]:
        """The dense network's outputs for a batch."""
        if number not in self._reference:
            with self._correction.remember(number) if self._correction else nullcontext():
                self._reference[number] = self._outputs(self.batches[number])
        return self._reference[number]

    def _axes(self) -> Axes:
        batch = self.batches[0]
        turned = self._outputs(batch.take(np.arange(len(batch))[::-1]))
        return sample_axes(self._dense(0), turned, len(batch))

    def mean(self, losses: Sequence[float]) -> float:
        """Mean loss over the samples of the first batches, from the loss of each."""
        sizes = [len(batch) for batch in self.batches[: len(losses)]]
        return float(np.dot(losses, sizes) / sum(sizes))

    def of_batch(
        self,
        number: int,
        weights: Weights = DENSE_WEIGHTS,
        start: Suspended | None = None,
        keep: Keep | None = None,
        keep_before: Sequence[int] = (),
    ) -> float:
        """Mean loss over one batch; for the other arguments see `TorchGraph.run`.

        Raises:
            LossError: the loss is not a finite number.
        """
        batch = self.batches[number]
        target, reference = numbers(batch.target), self._dense(number)
        correction = self._correction if len(batch) >= LEAST_SAMPLES else None
        with correction.apply(number, weights) if correction else nullcontext():
            outputs = self._outputs(batch, weights, start, keep, keep_before)
        loss = float(self.loss(outputs, reference, target))
        if not np.isfinite(loss):
            raise LossError(f"loss {self.name!r} is {loss} on the calibration data; check the network and the loss")
        return loss

    def _outputs(
        self,
        batch: Samples,
        weights: Weights = DENSE_WEIGHTS,
        start: Suspended | None = None,
        keep: Keep | None = None,
        keep_before: Sequence[int] = (),
    ) -> dict[str, torch.Tensor]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            outputs = self.network.run(batch, weights, start, keep, keep_before)
        return {name: v.float() if v.is_floating_point() else v for name, v in outputs.items()}


def growing_batches(count: int) -> list[int]:
    """Sizes of batches whose running sum meets BATCH_SIZE, twice that, four times that, ... and ends at `count`."""
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        size = max(BATCH_SIZE, min(sum(sizes), LARGEST_BATCH))
        sizes.append(size if left - size >= LEAST_SAMPLES else left)
    return sizes


def stages(ends: Sequence[int]) -> tuple[int, ...]:
    """Of these running sums the first from BATCH_SIZE on, each next one at least twice as large, and the last.

    >>> stages([32, 64, 128, 192, 256, 300])
    (32, 64, 128, 256, 300)
    """
    found: list[int] = []
    for end in ends:
        if end >= (2 * found[-1] if found else BATCH_SIZE):
            found.append(end)
    return (*found, ends[-1]) if not found or found[-1] != ends[-1] else tuple(found)
