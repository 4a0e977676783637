"""The latency table: seconds of every layer at every level, measured in the runtime that will run the network.

For each level the network with every prunable layer at that level (random masks: an engine's time depends on
where zeros are only weakly, and the trained masks don't exist yet) is profiled by the engine itself. Rounds
go through the levels in a new random order, so that drift of the machine hits all levels alike, and the
rounds' median is taken.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from onnx_spdy.models import Layer, find_layers, from_canonical, model_sha256, save_model, write_weights
from onnx_spdy.pipeline.artifact import read_json, write_json
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.mask import select_mask
from onnx_spdy.runtimes import Environment, LayerTime, Measurement, Runtime, measure_interleaved, zero_randomly

VERSION = 1
ROUNDS = 2  # neighbouring levels are pooled by `monotone`, so a cell rests on more than its own rounds
ITERATIONS = 4
WARMUP = 1
DENSE_ROUNDS = 15

Progress = Callable[[int, int], None]


class NoSpeedup(ValueError):
    """The runtime can't run this network faster, whatever is pruned."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of layers x levels in one environment.

    Attributes:
        layers: names of the prunable layers in graph order.
        levels: dense first, then from lowest to highest sparsity.
        seconds: (layers, levels), cleaned: see `monotone`.
        measured_seconds: (layers, levels), median over the rounds, as measured.
        spread: (layers, levels), relative range between the rounds' quartiles.
        sparse: (layers, levels) bool, whether the engine used a sparse kernel.
        kernels: (layers, levels), the engine's name of the kernel.
        base_seconds: what no pruning can remove: everything outside these layers.
        others: (kernel, outputs, seconds) of the rows outside these layers in the dense network.
        dense: the whole dense network, end to end.
        fallback: which part of the dense network the engine doesn't optimise and why, or None.
        environment: in which all of it was measured.
        model_sha256: of the network.
    """

    layers: tuple[str, ...]
    levels: tuple[Level, ...]
    seconds: np.ndarray
    measured_seconds: np.ndarray
    spread: np.ndarray
    sparse: np.ndarray
    kernels: tuple[tuple[str, ...], ...]
    base_seconds: float
    others: tuple[tuple[str, str, float], ...]
    dense: Measurement
    fallback: str | None
    environment: Environment
    model_sha256: str

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), levels) seconds of these layers, in their order."""
        return self.seconds[[self.layers.index(name) for name in names]]

    def predict(self, choice: Sequence[int]) -> float:
        """Seconds of the whole network with these level indices, (layers,)."""
        return self.base_seconds + float(self.seconds[np.arange(len(self.layers)), np.asarray(choice)].sum())

    @property
    def dense_seconds(self) -> float:
        """Seconds of the dense network by the table: what predicted speedups are relative to."""
        return self.predict([0] * len(self.layers))

    @property
    def highest_speedup(self) -> float:
        """The speedup with the fastest level of every layer."""
        return self.dense_seconds / (self.base_seconds + float(self.seconds.min(axis=1).sum()))

    def budget(self, speedup: float) -> float:
        """Seconds that all these layers together may take for a speedup of the whole network.

        Raises:
            NoSpeedup: more than the table allows; the message gives the highest reachable speedup.
        """
        budget = self.dense_seconds / speedup - self.base_seconds
        if speedup > self.highest_speedup:
            raise NoSpeedup(
                f"a speedup of {speedup:g} can't be reached in {self.environment.runtime} at batch "
                f"{self.environment.batch}: the highest reachable is {self.highest_speedup:.2f} by the latency table; "
                "lower --speedup or raise --batch"
            )
        return budget

    def save(self, path: Path) -> None:
        """Write latency.json."""
        arrays = {name: getattr(self, name).tolist() for name in ("seconds", "measured_seconds", "spread", "sparse")}
        content = {
            **self.__dict__, **arrays, "levels": [*map(str, self.levels)],
            "dense": self.dense.to_json(), "environment": self.environment.to_json(),
        }  # fmt: skip
        write_json(path, "latency", VERSION, content)

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """The table in a file.

        Raises:
            ArtifactError: missing, damaged or of another version.
        """
        content: dict[str, Any] = {name: value for name, value in read_json(path, "latency", VERSION).items()}
        for name in ("seconds", "measured_seconds", "spread"):
            content[name] = np.array(content[name], np.float64)
        return cls(
            **{name: content[name] for name in ("seconds", "measured_seconds", "spread", "base_seconds", "fallback")},
            layers=tuple(content["layers"]),
            levels=tuple(Level.parse(text) for text in content["levels"]),
            sparse=np.array(content["sparse"], bool),
            kernels=tuple(tuple(row) for row in content["kernels"]),
            others=tuple((kernel, outputs, seconds) for kernel, outputs, seconds in content["others"]),
            dense=Measurement.from_json(content["dense"]),
            environment=Environment.from_json(content["environment"]),
            model_sha256=content["model_sha256"],
        )


def measure_latency(
    model: onnx.ModelProto,
    runtime: Runtime,
    levels: Sequence[Level],
    *,
    batch: int,
    threads: int | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    rounds: int = ROUNDS,
    rng: np.random.Generator,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure every prunable layer at every level.

    Args:
        model: the prepared dense network.
        runtime: the one that will run it.
        levels: dense first.
        batch, threads, inputs: as in `Runtime.open`.
        rounds: profiles of each level; a cell is their median.
        rng: draws the masks and the order of the levels.
        progress: called with (profiles done, profiles).
    Raises:
        NoSpeedup: the engine falls back for every prunable layer.
        RuntimeFailure: the engine is missing, refuses the network, crashes or hangs.
    """
    layers = [layer for layer in find_layers(model) if layer.prunable]
    profiles: dict[int, list[list[LayerTime]]] = {index: [] for index in range(len(levels))}
    with tempfile.TemporaryDirectory(prefix="onnx-spdy-") as folder:
        path = Path(folder) / "dense.onnx"
        save_model(model, path)
        with runtime.open(path, batch=batch, threads=threads, inputs=inputs) as session:
            dense = measure_interleaved({"dense": session}, rounds=DENSE_ROUNDS)["dense"]
            environment, fallback = session.environment, session.fallback
        order = [int(index) for _ in range(rounds) for index in rng.permutation(len(levels))]
        for done, index in enumerate(order):
            file = path
            zeros: dict[str, float] = {}
            if levels[index].pattern == "unstructured":  # drawn where the engine is: the network travels once
                zeros = {layer.weight: levels[index].sparsity for layer in layers}
            elif levels[index] != DENSE:
                file = Path(folder) / "level.onnx"
                save_model(imposed(model, {layer: levels[index] for layer in layers}, rng), file)
            profile = runtime.layer_seconds(
                file, batch=batch, threads=threads, inputs=inputs, iterations=ITERATIONS, warmup=WARMUP,
                zeros=zeros, seed=_seed(rng),
            )  # fmt: skip
            profiles[index].append(profile)
            if progress:
                progress(done + 1, len(order))
    return _tabulate(layers, levels, profiles, dense, fallback, environment, model_sha256(model))


def imposed(model: onnx.ModelProto, levels: Mapping[Layer, Level], rng: np.random.Generator) -> onnx.ModelProto:
    """A copy of the network in which each of these layers has random zeros in the pattern of its level."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {}
    for layer, level in levels.items():
        if level.pattern not in ("dense", "unstructured"):
            values = onnx.numpy_helper.to_array(initializers[layer.weight])
            keep = select_mask(torch.from_numpy(rng.random(layer.shape, np.float32)), level)
            weights[layer.weight] = np.where(from_canonical(layer, keep.numpy()), values, 0)
    written = write_weights(model, {name: array.astype(np.float32, copy=False) for name, array in weights.items()})
    unstructured = {layer.weight: level.sparsity for layer, level in levels.items() if level.pattern == "unstructured"}
    zero_randomly(written.graph, unstructured, _seed(rng))
    return written


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**32))


def _tabulate(
    layers: Sequence[Layer],
    levels: Sequence[Level],
    profiles: Mapping[int, list[list[LayerTime]]],
    dense: Measurement,
    fallback: str | None,
    environment: Environment,
    sha256: str,
) -> LatencyTable:
    by_output = {layer.output: row for row, layer in enumerate(layers)}
    shares = np.array([np.prod(layer.shape) for layer in layers], np.float64)
    rounds = min(len(found) for found in profiles.values())
    cells = np.zeros((rounds, len(layers), len(levels)))
    sparse = np.zeros((len(layers), len(levels)), bool)
    kernels = [["none of its own"] * len(levels) for _ in layers]
    rest = []
    for index, found in profiles.items():
        for number, profile in enumerate(found[:rounds]):
            rest.append(0.0)
            for time in profile:
                rows = [by_output[name] for name in time.outputs if name in by_output]
                if not rows:
                    rest[-1] += time.seconds
                for row in rows:  # an engine that merges layers gets each its share by weights
                    cells[number, row, index] += time.seconds * shares[row] / shares[rows].sum()
                    sparse[row, index], kernels[row][index] = time.sparse, time.kernel
    if not cells[:, :, 0].any():
        raise NoSpeedup(
            f"{environment.runtime} runs no prunable layer of this network by itself, so pruning can't help: "
            f"{fallback or 'its profile names none of them'}"
        )
    measured = np.median(cells, axis=0)
    low, high = np.quantile(cells, [0.25, 0.75], axis=0)
    return LatencyTable(
        layers=tuple(layer.name for layer in layers),
        levels=tuple(levels),
        seconds=monotone(measured, sparse),
        measured_seconds=measured,
        spread=np.divide(high - low, measured, out=np.zeros_like(measured), where=measured > 0),
        sparse=sparse,
        kernels=tuple(map(tuple, kernels)),
        base_seconds=float(np.median(rest)),
        others=tuple(
            (time.kernel, ", ".join(time.outputs), time.seconds)
            for time in profiles[0][0]
            if not any(name in by_output for name in time.outputs)
        ),
        dense=dense,
        fallback=fallback,
        environment=environment,
        model_sha256=sha256,
    )


def monotone(seconds: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    """Clean a table by what must hold: with the same kind of kernel, more zeros are not slower.

    Each run of neighbouring levels that uses sparse kernels is replaced by the nearest non-increasing
    sequence in least squares (pool adjacent violators); a run with dense kernels by its median. So
    a cell that was measured too fast by luck is pulled back by its neighbours instead of being chosen for it.

    Args:
        seconds: (layers, levels) as measured, from lowest to highest sparsity.
        sparse: (layers, levels) bool, whether the kernel was a sparse one.
    Returns:
        (layers, levels).
    """
    cleaned = seconds.copy()
    for row, kinds in zip(cleaned, sparse, strict=True):
        edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1), len(kinds)]
        for start, stop in itertools.pairwise(edges):
            row[start:stop] = _non_increasing(row[start:stop]) if kinds[start] else np.median(row[start:stop])
    return cleaned


def _non_increasing(values: np.ndarray) -> np.ndarray:
    """The least-squares non-increasing fit (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # (mean, length)
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return np.concatenate([np.full(length, mean) for mean, length in blocks])
