"""Levels of precision: networks in which some layers compute in int8, and the others in floating point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_spdy.models import Prepared, save_model
from onnx_spdy.models.int8.place import CLIPS
from onnx_spdy.pipeline.latency.equations import Fit, Trial
from onnx_spdy.pipeline.latency.fit_precisions import Wiring, fit_precisions
from onnx_spdy.pipeline.latency.in_int8 import InInt8
from onnx_spdy.pipeline.latency.kind import Profile
from onnx_spdy.pipeline.latency.places import Places
from onnx_spdy.pipeline.latency.sampling import DENSE_EVERY, NETWORKS, predecessors
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.site import find_sites
from onnx_spdy.runtimes import LayerTime

SHARES = (0.25, 0.5, 0.75)  # of the layers, in int8


class Precisions:
    """Each layer is dense or in int8; see `Kind`."""

    def __init__(self, network: Prepared, levels: Sequence[Level], in_int8: InInt8) -> None:
        self._network, self._levels, self._in_int8 = network, tuple(levels), in_int8
        layers = [site.layers[0] for site in find_sites(network, levels)]
        self._nodes = [layer.nodes for layer in layers]
        self._row_of = {output: row for row, layer in enumerate(layers) for output in layer.outputs}
        clipped = {node.output[0]: node.input[0] for node in network.proto.graph.node if node.op_type in CLIPS}
        self._wiring = Wiring(
            places=replace(Places.of(network.proto.graph, ()), fused=clipped),
            tensors=in_int8.tensors({name: row for row, nodes in enumerate(self._nodes) for name in nodes}),
            predecessor=predecessors(network.proto.graph, layers)[0],
        )
        self.kernels: tuple[tuple[str, ...], ...] = ()
        self.names = tuple(layer.name for layer in layers)

    def look(self, rows: Sequence[LayerTime], profile: Profile, dense: Path) -> bool:
        """The names of both kernels of each layer."""
        path, _ = self.network([1] * len(self.names), 0, dense, dense.with_name("int8.onnx"))
        self.kernels = tuple(zip(self._names_in(rows), self._names_in(profile(path, {}, 0)), strict=True))
        return True

    def _names_in(self, rows: Sequence[LayerTime]) -> list[str]:
        names = ["none of its own"] * len(self.names)
        for row in rows:
            for layer in self.works_on(row):
                names[layer] = row.kernel
        return names

    def works_on(self, row: LayerTime) -> tuple[int, ...]:
        """Indices of the layers in a row."""
        return tuple(dict.fromkeys(self._row_of[name] for name in row.outputs if name in self._row_of))

    def plan(self, rng: np.random.Generator) -> np.ndarray:
        """(networks, layers) level indices of the networks to measure: the dense one and the one in int8 among them."""
        plan = np.zeros((NETWORKS, len(self.names)), np.int64)
        for number in range(NETWORKS):
            turn = number % DENSE_EVERY
            share = 1.0 if turn == 1 else SHARES[turn % len(SHARES)] if turn else 0.0
            plan[number] = rng.permutation(len(self.names)) < round(share * len(self.names))
        return plan

    def network(self, choice: Sequence[int], seed: int, dense: Path, own: Path) -> tuple[Path, dict[str, float]]:
        """A file with some layers in int8, or the dense one."""
        chosen = [nodes for nodes, level in zip(self._nodes, choice, strict=True) if level]
        if not chosen:
            return dense, {}
        layers = None if len(chosen) == len(self._nodes) else {name for nodes in chosen for name in nodes}
        save_model(self._in_int8.written(self._network.proto, layers), own)
        return own, {}

    def fit(self, trials: Sequence[Trial], dense_seconds: float) -> Fit:
        """See `fit_precisions`."""
        return fit_precisions(trials, self._wiring, dense_seconds)
