"""Levels of zeros: which of them the engine runs in a sparse kernel, and networks that have them at random places.

Random zeros do, although the trained masks don't exist yet: an engine's time depends on where they are only weakly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnx_spdy.models import Prepared, save_model
from onnx_spdy.pipeline.latency.equations import Fit, Trial
from onnx_spdy.pipeline.latency.fit_zeros import fit_zeros
from onnx_spdy.pipeline.latency.kind import Profile
from onnx_spdy.pipeline.latency.sampling import columns_of, imposed, plan_networks, predecessors
from onnx_spdy.pipeline.level import Level
from onnx_spdy.runtimes import LayerTime, reason_in

_SPARSITY = re.compile(r"-\d+(\.\d+)?%$")


class Zeros:
    """Each prunable layer gets zeros; see `Kind`."""

    def __init__(self, network: Prepared, levels: Sequence[Level]) -> None:
        self._network, self._levels, self._layers = network, tuple(levels), network.prunable
        self._predecessor, self._source_of = predecessors(network.proto.graph, self._layers)
        self._row_of = {output: row for row, layer in enumerate(self._layers) for output in layer.outputs}
        self._sparse = np.zeros((len(self._layers), len(levels)), bool)
        self.kernels: tuple[tuple[str, ...], ...] = ()
        self.names = tuple(layer.name for layer in self._layers)

    def look(self, rows: Sequence[LayerTime], profile: Profile, dense: Path) -> bool:
        """For each layer and level whether the engine takes a sparse kernel, and its name.

        Where a layer changes to a sparse kernel is found by halving, for all layers at once.
        """
        _, dense_names = self._kernels_in(rows)
        kernels = [[name] * len(self._levels) for name in dense_names]
        for columns in columns_of(self._levels).values():
            first_sparse, names = self._first_sparse(columns, profile, dense)
            self._sparse[:, columns] = np.arange(len(columns)) >= first_sparse[:, None]
            for own, first, name in zip(kernels, first_sparse, names, strict=True):
                # The name at the highest level tells why a layer isn't sparse at any, where the engine gives a reason.
                for column in columns[0 if reason_in(name) else first :]:
                    own[column] = name
        self.kernels = tuple(map(tuple, kernels))
        return bool(self._sparse.any())

    def _first_sparse(self, columns: Sequence[int], profile: Profile, dense: Path) -> tuple[np.ndarray, list[str]]:
        """For each layer from which of a pattern's levels on it is in a sparse kernel, len(columns) where it never is;
        and the names of the kernels at the last of them."""
        last = len(columns) - 1
        is_sparse, names = self._kernels_at(columns[last], profile, dense)
        last_dense, first_sparse = np.full(len(names), -1), np.where(is_sparse, last, last + 1)
        level = 0  # most likely all of them
        while (between := np.flatnonzero(is_sparse & (first_sparse - last_dense > 1))).size:
            kinds, _ = self._kernels_at(columns[level], profile, dense)
            first_sparse = np.where(kinds, np.minimum(first_sparse, level), first_sparse)
            last_dense = np.where(~kinds & (level < first_sparse), np.maximum(last_dense, level), last_dense)
            between = np.flatnonzero(is_sparse & (first_sparse - last_dense > 1))
            level = int(last_dense[between[0]] + first_sparse[between[0]]) // 2 if between.size else level
        return first_sparse, names

    def _kernels_at(self, level: int, profile: Profile, dense: Path) -> tuple[np.ndarray, list[str]]:
        """(layers,) bool whether each layer runs in a sparse kernel when all are at this level, and their names."""
        path, zeros = self.network([level] * len(self._layers), level, dense, dense.with_name("kernels.onnx"))
        return self._kernels_in(profile(path, zeros, level))

    def _kernels_in(self, rows: Sequence[LayerTime]) -> tuple[np.ndarray, list[str]]:
        sparse, names = np.zeros(len(self._layers), bool), ["none of its own"] * len(self._layers)
        for one in rows:
            for row in self.works_on(one):
                sparse[row] |= one.sparse
                names[row] = _SPARSITY.sub("", one.kernel)
        return sparse, names

    def works_on(self, row: LayerTime) -> tuple[int, ...]:
        """Indices of the layers in a row."""
        return tuple(dict.fromkeys(self._row_of[name] for name in row.outputs if name in self._row_of))

    def plan(self, rng: np.random.Generator) -> np.ndarray:
        """(networks, layers) level indices of the networks to measure."""
        return plan_networks(self._sparse, self._levels, rng)

    def network(self, choice: Sequence[int], seed: int, dense: Path, own: Path) -> tuple[Path, dict[str, float]]:
        """Unstructured zeros are drawn where the engine is; other patterns are files of their own."""
        levels = {layer: self._levels[index] for layer, index in zip(self._layers, choice, strict=True)}
        zeros = {layer.weight: level.sparsity for layer, level in levels.items() if level.pattern == "unstructured"}
        others = {layer: level for layer, level in levels.items() if level.pattern not in ("unstructured", "dense")}
        if not others:
            return dense, zeros
        save_model(imposed(self._network.proto, others, np.random.default_rng(seed)), own)
        return own, zeros

    def fit(self, trials: Sequence[Trial], dense_seconds: float) -> Fit:
        """See `fit_zeros`."""
        return fit_zeros(
            trials, self._row_of, self._predecessor, self._source_of, self._levels, self._sparse, dense_seconds
        )
