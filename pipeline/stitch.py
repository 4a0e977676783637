"""Stitching: put a profile's weights from the database into the network; correct statistics where that is better."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch

from onnx_spdy.pipeline.artifact import check_same
from onnx_spdy.pipeline.correct import NotCorrected, StatisticsCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.layer_database import LayerDatabase
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.loss import Loss, LossError
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.profile import Profile

CORRECTED = "mean and variance of each pruned layer's output channels"
JUDGED_SAMPLES = 128
WEIGHTS_BYTES = 512 << 20  # unpacked weights that are kept for the next profile


class Stitcher:
    """Keeps the network at one profile; only the layers whose level changes are loaded.

    Args:
        network: left at the dense weights to begin with.
        database: made for this network.
    """

    def __init__(self, network: Network, database: LayerDatabase) -> None:
        self.network, self.database = network, database
        self._unpacked: OrderedDict[tuple[int, Level], torch.Tensor] = OrderedDict()  # last used last
        self._unpacked_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Every layer dense."""
        self.network.reset()
        self._levels: list[Level] = [DENSE] * len(self.network.layers)
        self._edits = self.network.edits

    def stitch(self, levels: Sequence[Level]) -> bool:
        """Bring each prunable layer, in graph order, to its level; whether nobody else had changed weights since."""
        undisturbed = self.network.edits == self._edits
        if not undisturbed:
            self.reset()
        for number, (layer, level) in enumerate(zip(self.network.layers, levels, strict=True)):
            if level != self._levels[number]:
                self.network.set(layer.weight, self._weight(number, level))
                self._levels[number] = level
        self._edits = self.network.edits
        return undisturbed

    def _weight(self, number: int, level: Level) -> torch.Tensor:
        key = number, level
        if key in self._unpacked:
            self._unpacked.move_to_end(key)
            return self._unpacked[key]
        weight = self.database.weight(self.network, self.network.layers[number], level)
        if level != DENSE:  # the network has that one itself
            self._unpacked[key] = weight
            self._unpacked_bytes += weight.nbytes
            while self._unpacked_bytes > WEIGHTS_BYTES:
                self._unpacked_bytes -= self._unpacked.popitem(last=False)[1].nbytes
        return weight


class CorrectedStitcher:
    """Brings the network to profiles, corrected where that is better.

    Networks without normalisation of their own lose much without the correction, others gain nothing from it (ResNet-18
    at 3x: top-1 58 without, 80 with it; MiniLM at 87 % sparsity: Spearman 90.1 and 89.7), so the loss decides, of the
    last `JUDGED_SAMPLES` calibration samples.

    Args:
        network, database: what the profiles are for.
        samples: calibration samples for the correction of statistics, or None for none.
        loss: see `Objective`.
    Attributes:
        corrected: what was corrected at the last profile, in words, or why nothing was.
    """

    def __init__(
        self, network: Network, database: LayerDatabase, samples: Samples | None, loss: str | Loss | None = None
    ) -> None:
        self._network, self._database = network, database
        self._correction: StatisticsCorrection | None = None
        self.corrected = "not applied: no data was given"
        if samples is not None:
            try:
                self._correction = StatisticsCorrection(network, samples)
                judged = samples.take(slice(-max(JUDGED_SAMPLES, network.batch_size(1)), None))
                self._judge = Objective(network, judged, loss, corrected=False)
            except NotCorrected as exc:
                self.corrected = f"not applied: {exc}"

    def stitch(self, profile: Profile) -> None:
        """Bring the network to the profile.

        Raises:
            ArtifactError: the profile belongs to another network.
        """
        network = self._network
        check_same(
            self._database.folder,
            {
                "model_sha256": (profile.made_from["model_sha256"], network.sha256),
                "layers": ([*profile.levels], [layer.name for layer in network.layers]),
            },
        )
        levels = [profile.levels[layer.name] for layer in network.layers]
        stitcher = Stitcher(network, self._database)
        stitcher.stitch(levels)
        if self._correction:
            plain = self._loss()
            self._correction.apply(
                [layer for layer, level in zip(network.layers, levels, strict=True) if level != DENSE]
            )
            better = self._loss() <= plain
            if not better:
                stitcher.stitch(levels)
            self.corrected = CORRECTED if better else "not applied: the calibration loss is lower without it"

    def _loss(self) -> float:
        try:
            return self._judge()
        except LossError:  # of a network that is pruned beyond use; the correction may bring it back
            return math.inf
