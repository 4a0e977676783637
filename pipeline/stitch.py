"""Stitching: put a profile's weights from the database into the network, and score profiles that way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnx_spdy.pipeline.database import LayerDatabase
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.network import Network, Objective


class Stitcher:
    """Keeps the network at one profile; only the layers whose level changes are loaded.

    Args:
        network: left at the dense weights to begin with.
        database: made for this network.
    """

    def __init__(self, network: Network, database: LayerDatabase) -> None:
        self.network, self.database = network, database
        self.reset()

    def reset(self) -> None:
        """Every layer dense."""
        self.network.reset()
        self._levels: list[Level] = [DENSE] * len(self.network.layers)
        self._edits = self.network.edits

    def stitch(self, levels: Sequence[Level]) -> None:
        """Bring each prunable layer, in graph order, to its level."""
        if self.network.edits != self._edits:  # somebody else changed weights since
            self.reset()
        for number, (layer, level) in enumerate(zip(self.network.layers, levels, strict=True)):
            if level != self._levels[number]:
                self.network.set(layer.weight, self.database.weight(self.network, layer, level))
                self._levels[number] = level
        self._edits = self.network.edits


class ProfileLoss:
    """The calibration loss of the network stitched to a profile. A profile that comes again isn't evaluated again."""

    def __init__(self, stitcher: Stitcher, objective: Objective) -> None:
        self._stitcher, self._objective = stitcher, objective
        self._seen: dict[bytes, float] = {}

    def __call__(self, choice: np.ndarray) -> float:
        """Loss of a choice, (layers,) index into the database's levels."""
        key = np.asarray(choice, np.int64).tobytes()
        if key not in self._seen:
            levels = self._stitcher.database.levels
            self._stitcher.stitch([levels[index] for index in choice])
            self._seen[key] = self._objective()
        return self._seen[key]

    @property
    def evaluations(self) -> int:
        """How often the network was really run over the calibration samples."""
        return len(self._seen)
