"""Widths: from a network in which units count for nothing to the same network without them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnx_spdy.models import Layer, Prepared, narrowed, removed_indices
from onnx_spdy.models.agreement import Reference
from onnx_spdy.models.graph import FLOATS
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


def touched(whole: Prepared, widths: Widths) -> tuple[Layer, ...]:
    """The layers of the network before that lost inputs, outputs or channels, in graph order."""
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
    """Whether a model is another one with fewer units: the same nodes, inputs and outputs, and smaller weights."""
    graphs = (model.graph, whole.graph)
    if len({tuple((node.op_type, *node.output) for node in graph.node) for graph in graphs}) > 1:
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
    return fits and any(a != b for a, b in pairs)
