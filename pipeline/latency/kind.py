"""What a latency table needs to know of its levels.

There is one class for each kind: `zeros.Zeros`, `widths.Widths` and `precisions.Precisions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from onnx_spdy.pipeline.latency.equations import Fit, Trial
from onnx_spdy.runtimes import LayerTime

Profile = Callable[[Path, dict[str, float], int], list[LayerTime]]  # of one run: (file, zeros, seed) -> rows


class Kind(Protocol):
    """What levels do to a network, and what that does to its time."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sites."""

    @property
    def kernels(self) -> tuple[tuple[str, ...], ...]:
        """(sites, levels) the engine's names of its kernels, known after `look`."""

    def look(self, rows: Sequence[LayerTime], profile: Profile, dense: Path) -> bool:
        """Ask the engine what it has kernels for; whether some level can change the network's time.

        Args:
            rows: a profile of the dense network.
            profile: of other networks.
            dense: the network's file, beside which others may be written.
        """

    def works_on(self, row: LayerTime) -> tuple[int, ...]:
        """Indices of the sites whose weights or units a row of the engine's profile works with."""

    def plan(self, rng: np.random.Generator) -> np.ndarray:
        """(networks, sites) level indices of the networks to measure."""

    def network(self, choice: Sequence[int], seed: int, dense: Path, own: Path) -> tuple[Path, dict[str, float]]:
        """A file with the network at these levels, and the zeros to draw in it where the engine is.

        Args:
            choice: (sites,) level indices.
            seed: of what is random in the file.
            dense: the dense network's file, which is enough where the zeros make all the difference: it travels once.
            own: where it is written otherwise.
        """

    def fit(self, trials: Sequence[Trial], dense_seconds: float) -> Fit:
        """The model of what was measured."""
