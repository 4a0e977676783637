"""A mixed network as it was measured: what a latency table is fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx_spdy.runtimes import LayerTime, median_ratio


@dataclass(frozen=True)
class Observation:
    """One network as it was measured.

    Attributes:
        choice: (layers,) level indices.
        rows: the engine's profile of it.
        dense, network: seconds of the dense network and of this one, in turns.
        foreign_cores: that other programs kept busy meanwhile; None if that isn't known.
        predicted: what the model said of `network` / `dense` before; None if there was none yet.
    """

    choice: tuple[int, ...]
    rows: tuple[LayerTime, ...]
    dense: tuple[float, ...]
    network: tuple[float, ...]
    foreign_cores: float | None
    predicted: float | None

    @property
    def relative(self) -> float:
        """Seconds of the network / those of the dense one."""
        return median_ratio(self.network, self.dense)[0]

    @property
    def noise(self) -> float:
        """Relative standard error of `relative`."""
        return median_ratio(self.network, self.dense)[1]

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Observation:
        rows = tuple(LayerTime(**{**row, "outputs": tuple(row["outputs"])}) for row in document["rows"])
        tuples = {name: tuple(document[name]) for name in ("choice", "dense", "network")}
        return cls(**{**document, **tuples, "rows": rows})
