"""Widths: from a network in which units count for nothing to the same network without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnx_spdy.models import Layer, Prepared, narrowed, node_names, removed_indices
from onnx_spdy.models.agreement import Reference
from onnx_spdy.models.graph import FLOATS
from onnx_spdy.models.stored import values_of
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import PrunedNetwork

ENDS = ("input", "output")
COMPARED_SAMPLES = 64  # more than a batch that a graph may fix; two of them are run where it is open
Widths = Mapping[str, tuple[int, ...]]  # group -> units that stay, ascending


def cut_out(pruned: PrunedNetwork, widths: Widths, samples: Samples | None = None) -> PrunedNetwork:
    """The network without the units for which its layers' weights are zero; ONNX Runtime tells that it is the same.

    Args:
        pruned: of whole width.
        widths: group -> units that stay, ascending.
        samples: on which both are compared; None for random inputs.
    Raises:
        ModelError: the result is no valid model, or gives other outputs; that is a bug.
    """
    masked = pruned.in_float()
    narrow = Prepared(narrowed(Prepared(masked), widths))
    examples = samples.take(slice(0, COMPARED_SAMPLES)).inputs if samples else None
    with Reference(masked, examples=examples) as reference:
        reference.check(narrow.proto, "the narrower model", "cutting units out")
    return replace(pruned, base=narrow, weights={}, widths=dict(widths))


def trained_and_compared(whole: Prepared, pruned: PrunedNetwork) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The layers that repair trains in a narrow network, and those whose outputs it compares with the dense ones.

    Trained are those that lost something, and compared those that took in units which are missing. Where a branch is
    gone all that is left makes up for it: all layers are trained, and compared those that take in units of any group;
    but for outputs with the branch's bias.
    """
    plain = narrowed(whole, pruned.widths)
    if len(plain.graph.node) == len(whole.proto.graph.node):
        return touched(whole, pruned.widths), pruned.layers
    before, after = ({tensor.name: tensor for tensor in one.graph.initializer} for one in (whole.proto, plain))
    inputs, inputs_left = (
        {name: len(node.input) for name, node in zip(node_names(one), one.node, strict=True)}
        for one in (whole.proto.graph, plain.graph)
    )
    left = tuple(layer for layer in whole.layers if layer.name in inputs_left and layer.shape)
    kept = kept_outputs(whole, pruned.widths)

    def gives_the_same(layer: Layer) -> bool:
        if layer.op == "MatMul":  # whose bias another node adds
            return True
        if layer.bias is None:
            return inputs_left[layer.name] == inputs[layer.name]
        values = values_of(before[layer.bias])[kept.get(layer.weight, slice(None))]
        return np.array_equal(values, values_of(after[layer.bias]))

    consumers = {name for group in whole.groups if group.prunable for name in group.consumers}
    return left, tuple(layer for layer in left if layer.name in consumers and gives_the_same(layer))


def touched(whole: Prepared, widths: Widths) -> tuple[Layer, ...]:
    """The layers of the network before that lost inputs, outputs or channels, in graph order; some may be gone."""
    stored = {axis.initializer for group in whole.groups if group.name in widths for axis in group.axes}
    return tuple(layer for layer in whole.layers if layer.weight in stored)


def kept_outputs(whole: Prepared, widths: Widths) -> dict[str, np.ndarray]:
    """The output channels that stay, ascending, of each layer that lost some.

    Args:
        whole: the network before.
        widths: group -> units that stay.
    Returns:
        initializer of a layer's weight -> (channels,).
    """
    removed = {name: indices for (name, _), indices in removed_indices(whole, widths, "out").items()}
    return {
        layer.weight: np.setdiff1d(np.arange(layer.shape[0]), removed[layer.weight])
        for layer in whole.layers
        if layer.weight in removed and layer.shape
    }


def is_narrower(model: onnx.ModelProto, whole: onnx.ModelProto) -> bool:
    """Whether a model is another one with fewer units: with no other nodes, inputs or outputs, and smaller weights."""
    nodes, known = ([(node.op_type, *node.output) for node in one.graph.node] for one in (model, whole))
    left = iter(known)
    if not all(node in left for node in nodes):  # in the same order
        return False
    if any([*map(str, getattr(model.graph, name))] != [*map(str, getattr(whole.graph, name))] for name in ENDS):
        return False
    sizes = {tensor.name: tuple(tensor.dims) for tensor in whole.graph.initializer}
    pairs = [
        (tuple(tensor.dims), sizes[tensor.name])
        for tensor in model.graph.initializer
        if tensor.name in sizes and tensor.data_type in FLOATS
    ]
    fits = all(len(a) == len(b) and all(x <= y for x, y in zip(a, b, strict=True)) for a, b in pairs)
    return fits and (len(nodes) < len(known) or any(a != b for a, b in pairs))
