"""Deploy: write the stitched weights into the dense file's own graph, and prove that nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from onnx_spdy.models import (
    Prepared,
    changed_initializers,
    differences,
    find_layers,
    narrowed,
    node_names,
    save_model,
    to_canonical,
)
from onnx_spdy.models.graph import FLOATS, check_model, data_file
from onnx_spdy.models.stored import has_mapped, values_of
from onnx_spdy.models.write_back import moved_to, writing
from onnx_spdy.pipeline.level import DENSE, Level, only_zeros
from onnx_spdy.pipeline.mask import level_violation
from onnx_spdy.pipeline.network import InNumPy, PrunedNetwork
from onnx_spdy.pipeline.widths import touched
from onnx_spdy.runtimes.errors import OnnxSpdyError

QDQ = ("QuantizeLinear", "DequantizeLinear")


class DeployError(OnnxSpdyError, ValueError):
    """The written network is not what the profile says."""


def deploy(
    dense: Prepared, pruned: PrunedNetwork, path: Path, measured: onnx.ModelProto | None = None
) -> onnx.ModelProto:
    """Write a pruned network; in int8 where it has that.

    Args:
        dense: the prepared dense network.
        pruned: what it differs in.
        path: where the file is written.
        measured: the network whose speed this one shall have, so whose zeros; None where it is measured afterwards.
    Returns:
        The pruned network.
    Raises:
        DeployError: something else than the pruned layers' parameters would change, or zeros are missing.
    """
    if has_mapped(pruned.base.proto):
        return _deploy_mapped(dense, pruned, path, measured)
    written = pruned.in_float()
    if pruned.widths or not only_zeros(pruned.levels.values()):
        check_narrow(dense, pruned, written)
    else:
        check_deployed(dense, written, pruned.levels, trained_whole=pruned.trained_whole)
    if measured is not None:
        check_zeros_kept(measured, written)
    if pruned.int8 is not None:
        check_int8(written, pruned.int8.proto)
        written = pruned.int8.proto
    save_model(written, path)
    return written


def _deploy_mapped(
    dense: Prepared, pruned: PrunedNetwork, path: Path, measured: onnx.ModelProto | None
) -> onnx.ModelProto:
    """The same layer by layer: what is checked is the file that then takes its place."""
    assert pruned.int8 is None and not pruned.widths
    with writing(pruned.base.proto, InNumPy(pruned.weights), path) as written:
        check_deployed(dense, written, pruned.levels)
        if measured is not None:
            check_zeros_kept(measured, written)
    return moved_to(written, data_file(path))


def check_deployed(
    dense: Prepared, pruned: onnx.ModelProto, levels: Mapping[str, Level], *, trained_whole: bool = False
) -> None:
    """Compare a pruned network with its dense original and its profile.

    Args:
        trained_whole: whether layers that the profile doesn't prune may have changed too.
    Raises:
        DeployError: the first thing that isn't as the profile says.
    """
    if found := differences(dense.proto, pruned):
        raise DeployError(f"the pruned graph differs from the dense one: {found[0]}")
    layers = {layer.name: layer for layer in dense.prunable}
    pruned_to = {name: level for name, level in levels.items() if level != DENSE}
    # Where precisions are mixed, layers have a level that can't be pruned.
    if unknown := (set(levels) - {layer.name for layer in dense.layers}) | (set(pruned_to) - set(layers)):
        raise DeployError(
            f"the profile names layer {min(unknown)!r}, which the network doesn't have; use its own profile"
        )
    changeable = {name for layer in layers.values() if layer.name in pruned_to for name in (layer.weight, layer.bias)}
    if trained_whole:
        changeable |= _of_layers(dense)
    if surplus := set(changed_initializers(dense.proto, pruned)) - changeable:
        raise DeployError(f"initializer {min(surplus)!r} changed, but the profile prunes no layer that it belongs to")
    arrays = {tensor.name: tensor for tensor in pruned.graph.initializer}
    for name, level in pruned_to.items():
        layer = layers[name]
        weight = to_canonical(layer, values_of(arrays[layer.weight]))
        if problem := level_violation(weight, level):
            raise DeployError(f"layer {name!r} is not {level}: {problem}")


def check_narrow(dense: Prepared, pruned: PrunedNetwork, written: onnx.ModelProto) -> None:
    """Compare a network from which units were cut out with its dense original.

    Raises:
        DeployError: the first thing that isn't as the widths say.
    """
    if found := differences(pruned.base.proto, written):
        raise DeployError(f"the narrow graph differs from the one that was cut out: {found[0]}")
    plain = narrowed(dense, pruned.widths)
    if _nodes(plain.graph) != _nodes(written.graph):
        raise DeployError("the narrow graph has other nodes than the dense one has at these widths")
    expected = {tensor.name: list(tensor.dims) for tensor in plain.graph.initializer}
    changeable = {*changed_initializers(dense.proto, plain)}
    changeable |= {name for layer in touched(dense, pruned.widths) for name in (layer.weight, layer.bias) if name}
    if pruned.trained_whole or len(plain.graph.node) < len(dense.proto.graph.node):  # all make up for a branch
        changeable |= _of_layers(dense)
    weights = {tensor.name: tensor for tensor in written.graph.initializer if tensor.data_type in FLOATS}
    for name, tensor in weights.items():
        if list(tensor.dims) != expected.get(name):
            raise DeployError(f"{name!r} has shape {list(tensor.dims)}, by its groups' widths {expected.get(name)}")
    if surplus := set(changed_initializers(dense.proto, written)) & set(weights) - changeable:
        raise DeployError(f"initializer {min(surplus)!r} changed, but belongs to no group that is narrower")


def _of_layers(network: Prepared) -> set[str]:
    """Initializers of the weights and biases of all layers."""
    return {name for layer in network.layers for name in (layer.weight, layer.bias) if name is not None}


def _nodes(graph: onnx.GraphProto) -> list[tuple[str, str]]:
    return [(name, node.op_type) for name, node in zip(node_names(graph), graph.node, strict=True)]


def check_int8(before: onnx.ModelProto, written: onnx.ModelProto) -> None:
    """Compare a network in int8 with the one in floating point: only nodes that quantise are new.

    Raises:
        DeployError: the first thing that isn't so.
    """
    kept = [node for node in _nodes(written.graph) if node[1] not in QDQ]
    if kept != [node for node in _nodes(before.graph) if node[1] not in QDQ]:
        raise DeployError("the graph in int8 has other nodes than the one in floating point")
    for ends in ("input", "output"):
        if [*map(str, getattr(before.graph, ends))] != [*map(str, getattr(written.graph, ends))]:
            raise DeployError(f"the graph in int8 has other {ends}s than the one in floating point")
    check_model(written, "the graph in int8")


def check_zeros_kept(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """A network whose weights were trained has every zero of the one that was measured, so it is as fast.

    Raises:
        DeployError: a zero of a prunable layer's weight got lost.
    """
    stored = {tensor.name: tensor for tensor in after.graph.initializer}
    weights = {layer.weight for layer in find_layers(before) if layer.prunable}
    for tensor in before.graph.initializer:
        if tensor.name in weights:
            zero = values_of(tensor) == 0
            if lost := int(np.count_nonzero(values_of(stored[tensor.name])[zero])):
                raise DeployError(f"{lost} zeros of {tensor.name!r} are zero no longer")
