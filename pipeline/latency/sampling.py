"""Which networks a latency table is measured on: their levels, what of them feeds what, and their random zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch

from onnx_spdy.models import Layer, from_canonical, write_weights
from onnx_spdy.pipeline.costs import NO_PREDECESSOR
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.mask import select_mask
from onnx_spdy.runtimes import zero_randomly

NETWORKS = 24  # of random levels
MORE_PATTERNS = 12  # networks more for each further pattern
DENSE_EVERY = 8  # one of so many is the dense network
FEW_DENSE, MANY_DENSE = 0.3, 0.6  # shares of the layers, in networks that have dense ones: low targets leave many
MOST_AWAITED = 4  # layers with skip connections: the solver's work doubles with each


def plan_networks(sparse: np.ndarray, levels: Sequence[Level], rng: np.random.Generator) -> np.ndarray:
    """(networks, layers) level indices: random ones from several ranges, and now and then the dense network.

    Each layer's levels are spread evenly over the networks of a range, and so are the patterns. Where no level has a
    sparse kernel, only the dense network is left: the others would take the same time.
    """
    if not sparse.any():
        return np.zeros((NETWORKS // DENSE_EVERY, len(sparse)), np.int64)
    patterns = [np.array(columns) for columns in columns_of(levels).values()]
    plan = np.zeros((NETWORKS + MORE_PATTERNS * (len(patterns) - 1), len(sparse)), np.int64)
    mixed = np.flatnonzero(np.arange(len(plan)) % DENSE_EVERY)
    ranges = [(0.0, 1.0, FEW_DENSE), (0.0, 0.5, 0.0), (0.0, 1.0, MANY_DENSE), (0.5, 1.0, 0.0)]
    for number, (lowest, end, dense_share) in enumerate(ranges):
        networks = mixed[number::4]
        for layer in range(len(sparse)):
            place = (rng.permutation(len(networks)) + rng.random(len(networks))) / len(networks)  # in [0, 1)
            place = lowest + place * (end - lowest)
            dense = rng.permutation(len(networks)) < dense_share * len(networks)
            turn = rng.permutation(len(networks)) % len(patterns)
            of_patterns = [columns[(place * len(columns)).astype(np.int64)] for columns in patterns]
            plan[networks, layer] = np.where(dense, 0, np.choose(turn, of_patterns))
    return plan


def columns_of(levels: Sequence[Level]) -> dict[str, list[int]]:
    """Of each pattern but that of the first level the indices of its levels, from lowest to highest sparsity."""
    found: dict[str, list[int]] = {}
    for column in sorted(range(1, len(levels)), key=lambda one: levels[one].sparsity):
        found.setdefault(levels[column].pattern, []).append(column)
    return found


def predecessors(graph: onnx.GraphProto, layers: Sequence[Layer]) -> tuple[np.ndarray, dict[str, int]]:
    """Which layer each tensor comes from, by the first input that is computed, through everything between.

    Returns:
        (layers,) index of the layer that each one reads from, or NO_PREDECESSOR; and the same for every tensor that a
        node makes. Layers that would have more than MOST_AWAITED others waiting for them at once have none.
    """
    number_of = {output: number for number, layer in enumerate(layers) for output in layer.outputs}
    source: dict[str, int] = {}
    predecessor = np.full(len(layers), NO_PREDECESSOR)
    for node in graph.node:
        read = next((number_of.get(name, source[name]) for name in node.input if name in source), NO_PREDECESSOR)
        for name in node.output:
            source[name] = read
            if name in number_of and name == layers[number_of[name]].output:  # of several uses the first counts
                predecessor[number_of[name]] = source[name]
    for number in range(len(layers)):
        awaited = {int(one) for one in predecessor[number + 1 :] if NO_PREDECESSOR < one <= number}
        for one in sorted(awaited)[: max(0, len(awaited) - MOST_AWAITED)]:
            predecessor[number + 1 :][predecessor[number + 1 :] == one] = NO_PREDECESSOR
    return predecessor, source


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
    zero_randomly(written.graph, unstructured, int(rng.integers(2**32)))
    return written
