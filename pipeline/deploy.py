"""Deploy: write the stitched weights into the dense file's own graph, and prove that nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from onnx_spdy.models import changed_initializers, differences, find_layers, save_model, to_canonical, write_weights
from onnx_spdy.pipeline.level import Level


class DeployError(ValueError):
    """The written network is not what the profile says."""


def deploy(
    dense: onnx.ModelProto, weights: Mapping[str, np.ndarray], levels: Mapping[str, Level], path: Path
) -> onnx.ModelProto:
    """Write the pruned network.

    Args:
        dense: the prepared dense network.
        weights: initializer name -> values, of every weight and bias that changed.
        levels: layer name -> level; layers that are not named stay dense.
        path: where the file is written.
    Returns:
        The pruned network.
    Raises:
        DeployError: something else than the pruned layers' parameters would change, or zeros are missing.
    """
    pruned = write_weights(dense, weights)
    check_deployed(dense, pruned, levels)
    save_model(pruned, path)
    return pruned


def check_deployed(dense: onnx.ModelProto, pruned: onnx.ModelProto, levels: Mapping[str, Level]) -> None:
    """Compare a pruned network with its dense original and its profile.

    Raises:
        DeployError: the first thing that isn't as the profile says.
    """
    if found := differences(dense, pruned):
        raise DeployError(f"the pruned graph differs from the dense one: {found[0]}")
    layers = {layer.name: layer for layer in find_layers(dense) if layer.prunable}
    if unknown := set(levels) - set(layers):
        raise DeployError(
            f"the profile names layer {min(unknown)!r}, which the network doesn't have; use its own profile"
        )
    changeable = {
        name
        for layer in layers.values()
        if levels.get(layer.name, None) not in (None, Level("dense", 0.0))
        for name in (layer.weight, layer.bias)
    }
    if surplus := set(changed_initializers(dense, pruned)) - changeable:
        raise DeployError(f"initializer {min(surplus)!r} changed, but the profile prunes no layer that it belongs to")
    arrays = {tensor.name: tensor for tensor in pruned.graph.initializer}
    for name, level in levels.items():
        layer = layers[name]
        weight = to_canonical(layer, onnx.numpy_helper.to_array(arrays[layer.weight]))
        if problem := level_violation(weight, level):
            raise DeployError(f"layer {name!r} is not {level}: {problem}")


def check_zeros_kept(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """A network whose weights were trained has every zero of the one that was measured, so it is as fast.

    Raises:
        DeployError: a zero of a prunable layer's weight got lost.
    """
    stored = {tensor.name: tensor for tensor in after.graph.initializer}
    weights = {layer.weight for layer in find_layers(before) if layer.prunable}
    for tensor in before.graph.initializer:
        if tensor.name in weights:
            zero = onnx.numpy_helper.to_array(tensor) == 0
            if lost := int(np.count_nonzero(onnx.numpy_helper.to_array(stored[tensor.name])[zero])):
                raise DeployError(f"{lost} zeros of {tensor.name!r} are zero no longer")


def level_violation(weight: np.ndarray, level: Level) -> str | None:
    """What is wrong with weights (out, in, *kernel) that claim a level; None when nothing is."""
    zeros, count = int((weight == 0).sum()), weight.size
    if level.pattern == "unstructured" and zeros < level.zeros(count):
        return f"{zeros} of {count} weights are zero, it promises {level.zeros(count)}"
    if level.pattern == "block4":
        groups = _groups(weight, 4)
        empty = int((groups == 0).all(axis=-1).sum())
        promised = level.zeros(groups.size // 4)
        return f"{empty} blocks are zero, it promises {promised}" if empty < promised else None
    if level.is_n_of_m:
        kept, size = level.group
        most = int((_groups(weight, size) != 0).sum(axis=-1).max())
        return f"{most} non-zeros in a group of {size} input channels" if most > kept else None
    return None


def _groups(weight: np.ndarray, size: int) -> np.ndarray:
    """(out, in, *kernel) -> (..., size): runs of consecutive input channels, padded with zeros."""
    moved = np.moveaxis(weight, 1, -1)
    padding = [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % size)]
    padded = np.pad(moved, padding)
    return padded.reshape(*padded.shape[:-1], -1, size)
