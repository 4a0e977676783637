"""A network that isn't there: times and losses by formulas, for any number of layers, so that searches can be compared
where a real network would take too long.

The formulas have what makes real ones hard: layers differ in size and in how much they hurt by orders of magnitude,
errors of the database tell little about that, layers hurt their neighbours, few samples tell less than many, and
kernels cost their neighbours time.
"""

from __future__ import annotations

import numpy as np

from onnx_spdy.pipeline.costs import NO_PREDECESSOR, Costs
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.search.methods import SearchProblem
from onnx_spdy.pipeline.solve_within import Limit

LEVELS = levels_for("unstructured")
STAGES = (32, 64, 128)
BATCH = 32


class SyntheticNetwork:
    """A chain of layers with skip connections.

    Args:
        layers: how many.
        seed: of its sizes and sensitivities.
        coupling: how much layers hurt each other; with 0 the loss is a sum over layers.
    Attributes:
        samples_run: samples that were run so far to score profiles.
        profiles: how many were scored.
    """

    def __init__(self, layers: int, seed: int = 0, coupling: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        sparsity = np.array([level.sparsity for level in LEVELS])
        self.layers, self.samples_run = layers, 0
        self._coupling = coupling
        self._weights = np.exp(rng.normal(0, 1, layers))  # of the layers' times
        density = np.maximum(1 - sparsity, 0.02)
        steep = rng.uniform(1.5, 3.5, (layers, 1))
        self.errors = 0.5 * (1 - density**0.2) ** steep * np.exp(rng.normal(0, 0.5, (layers, 1)))
        self.errors[:, 0] = 0
        self._sensitivity = np.exp(rng.normal(0, 1.2, layers))
        self._bend = rng.normal(1, 0.2, layers)  # how the loss grows with the database's error
        self._tilt = rng.normal(0, 0.3, (STAGES[-1] // BATCH, layers))  # what a batch thinks of the layers
        self._seen: dict[tuple[int, ...], int] = {}
        kernel = 0.15 + 1.1 * density  # a sparse kernel's time, of the dense one's
        seconds = self._weights[:, None] * np.where(sparsity == 0, 1.0, kernel) * 1e-3
        transition = seconds * np.where(sparsity == 0, 0.0, 0.05)
        predecessor = np.arange(layers) - 1
        # A shortcut that reads what two others read.
        predecessor[3::4] = np.maximum(predecessor[3::4] - 2, NO_PREDECESSOR)
        self.costs = Costs(seconds, transition, predecessor)

    @property
    def profiles(self) -> int:
        return len(self._seen)

    def loss(self, choice: np.ndarray, samples: int | None = None) -> float:
        """Mean loss of the first batches; what was asked before costs nothing."""
        batches = len(self._tilt) if samples is None else -(-samples // BATCH)
        key = tuple(np.asarray(choice).tolist())
        known = self._seen.get(key, 0)
        self.samples_run += max(0, batches - known) * BATCH
        self._seen[key] = max(known, batches)
        return float(np.mean([self._of(choice, tilt) for tilt in self._tilt[:batches]]))

    def true_loss(self, choice: np.ndarray) -> float:
        """What the loss would be on endless samples."""
        return self._of(choice, np.zeros(self.layers))

    def problem(self, speedup: float, seed: int = 0, sample_limit: int | None = None) -> SearchProblem:
        """The search for a speedup of these layers."""
        return SearchProblem(
            levels=LEVELS,
            errors=self.errors,
            limits=[Limit(self.costs, self.costs.total(np.zeros(self.layers, np.int64)) / speedup)],
            loss=self.loss,
            magnitudes=lambda layer: np.full((8, 8), 1 / self._weights[layer]),
            rng=np.random.default_rng(seed),
            stages=STAGES,
            samples_run=lambda: self.samples_run,
            sample_limit=sample_limit,
        )

    def _of(self, choice: np.ndarray, tilt: np.ndarray) -> float:
        own = self.errors[np.arange(self.layers), choice] ** self._bend * self._sensitivity * np.exp(tilt)
        together = np.sqrt(own[1:] * own[:-1]).sum()
        return float((own.sum() + self._coupling * together) / self.layers) ** (1 + 0.3 * self._coupling)
