"""Small changes to a graph that engines need, each for its own reason. They change the model that they are given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models.graph import node_names, outline_of


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a unique name, because layers, profiles and reports refer to nodes by name."""
    for node, name in zip(model.graph.node, node_names(model.graph), strict=True):
        node.name = name


def pool_instead_of_mean(model: onnx.ModelProto) -> None:
    """A mean over all spatial axes becomes GlobalAveragePool.

    PyTorch's exporter writes `AdaptiveAvgPool2d(1)` as ReduceMean over two axes; DeepSparse runs a graph with such a
    node wholly without optimisation ("reduce only supports 1 axis"). Ranks come from shape inference; where one is
    unknown the node stays.
    """
    ranks = {name: len(shape) for name, shape in inferred_shapes(model).items()}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type == "ReduceMean" and _is_spatial(node, ranks, constants):
            nodes += _pooling(node)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    _drop_unused_initializers(model, before=constants)


def restore_names(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Convolutions into which a BatchNormalization, Mul or Add was folded get their names back.

    Folding makes a new node and new weights, named after the output. The user knows the layer by the name of the
    PyTorch parameter, so node and initializers take the names of those they replace, unless these still exist.
    """
    producers = {output: node for node in original.graph.node for output in node.output}
    originals = dict(zip((node.output[0] for node in original.graph.node), node_names(original.graph), strict=True))
    known = {tensor.name for tensor in original.graph.initializer}
    taken = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] in known:
            continue
        folded = _convolution_behind(node.output[0], producers)
        if folded is None or folded.op_type != node.op_type or folded.input[0] != node.input[0]:
            continue
        node.name = originals[folded.output[0]]
        for position in range(1, min(len(node.input), len(folded.input))):
            old, new = node.input[position], folded.input[position]
            if old in taken and old not in known and new in known and new not in taken:
                _rename_initializer(model, old, new)
                taken.add(new)


def _convolution_behind(output: str, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    node = producers.get(output)
    while node is not None and node.op_type in ("BatchNormalization", "Mul", "Add"):
        node = producers.get(node.input[0])
    return node


def _rename_initializer(model: onnx.ModelProto, old: str, new: str) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == old:
            tensor.name = new
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def inferred_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Value -> its sizes where shape inference finds out how many axes it has; None for a size that isn't known."""
    graph = onnx.shape_inference.infer_shapes(outline_of(model)).graph
    return {
        value.name: tuple(axis.dim_value or None for axis in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _is_spatial(node: onnx.NodeProto, ranks: Mapping[str, int], constants: Mapping[str, TensorProto]) -> bool:
    rank = ranks.get(node.input[0], 0)
    axes = _attribute(node, "axes")
    if len(node.input) > 1:
        tensor = constants.get(node.input[1])
        axes = None if tensor is None else numpy_helper.to_array(tensor).tolist()
    # With one spatial axis (rank 3) the mean is over one axis only, which every engine knows.
    return rank >= 4 and axes is not None and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _pooling(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    source, output = node.input[0], node.output[0]
    if _attribute(node, "keepdims") in (None, 1):
        return [helper.make_node("GlobalAveragePool", [source], [output], node.name)]
    pooled = f"{output}_pooled"
    return [
        helper.make_node("GlobalAveragePool", [source], [pooled], node.name),
        helper.make_node("Flatten", [pooled], [output], f"{node.name}_flatten", axis=1),
    ]


def _attribute(node: onnx.NodeProto, name: str):
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), None)


def _drop_unused_initializers(model: onnx.ModelProto, before: Mapping[str, TensorProto]) -> None:
    reads = Counter(name for node in model.graph.node for name in node.input)
    reads.update(value.name for value in model.graph.output)
    kept = [before[tensor.name] for tensor in model.graph.initializer if reads[tensor.name]]
    if len(kept) < len(model.graph.initializer):
        copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del model.graph.initializer[:]
        model.graph.initializer.extend(copies)
