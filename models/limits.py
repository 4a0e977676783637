"""What would take all memory or time, or end the process, is found before anything runs: memory by the shapes that
follow from the graph itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import onnx
from onnx import TensorProto, numpy_helper

from onnx_spdy.models.graph import ModelError, inner_graphs, node_names, outline_of
from onnx_spdy.models.stored import stored_bytes

# For one sample. No single activation of a network that runs on this side of a data centre is as large.
LARGEST_TENSOR_BYTES = 2**31
LARGEST_STEPS = 10**6  # of a loop that nothing but its number of steps ends


def check_limits(model: onnx.ModelProto, name: str) -> None:
    """Raise ModelError for a tensor that is known to be huge for one sample, a loop without an end, or a stride of 0.

    Huge is over 2 GiB, and larger than every weight: one that is only transposed, say, is no sample's.

    Sizes that are open count as 1, and a shape that can't be inferred isn't looked at. What the file claims about sizes
    is no help: it may contradict what its nodes make. `name` stands for the model in the message.
    """
    for graph in _graphs(model.graph):
        _check_loops(graph, name)
    _check_strides((*model.graph.node, *(node for function in model.functions for node in function.node)), name)
    outline = outline_of(model)
    for graph in _graphs(outline.graph):
        graph.ClearField("value_info")
        for value in graph.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(outline, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return  # ONNX Runtime says what is wrong with it
    limit = max(LARGEST_TENSOR_BYTES, *map(stored_bytes, model.graph.initializer), 0)
    for graph in _graphs(inferred):
        for value in (*graph.input, *graph.value_info, *graph.output):
            _check_size(value, limit, name)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _graphs(inner)


def _check_size(value: onnx.ValueInfoProto, limit: int, name: str) -> None:
    kind = value.type.tensor_type
    shape = [max(dim.dim_value, 1) for dim in kind.shape.dim]
    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    except KeyError:
        width = 1
    if width * prod(shape) > limit:
        raise ModelError(
            f"{name}: tensor '{value.name}' of shape {shape} takes {width * prod(shape) / 2**30:.1f} GiB for one "
            f"sample, more than {limit / 2**30:.3g}: export the model with smaller inputs"
        )


def _check_loops(graph: onnx.GraphProto, name: str) -> None:
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    for node, node_name in zip(graph.node, node_names(graph), strict=True):
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            numbers[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Loop" and _ends_by_number(node):
            steps = _number(numbers.get(next(iter(node.input), "")))
            if steps is not None and steps > LARGEST_STEPS:
                raise ModelError(f"{name}: the loop '{node_name}' runs {steps} times, more than {LARGEST_STEPS}")


def _check_strides(nodes: Iterable[onnx.NodeProto], name: str) -> None:
    """Shape inference divides by them, in onnx before 1.22 and its copy in ONNX Runtime: 0 ends the process there."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name == "strides" and 0 in attribute.ints and node.domain in ("", "ai.onnx"):
                raise ModelError(f"{name}: the {node.op_type} '{node.name}' has a stride of 0: export the model again")
        for graph in inner_graphs(node):
            _check_strides(graph.node, name)


def _ends_by_number(node: onnx.NodeProto) -> bool:
    """Whether the condition that the body gives on is the one that it was given, or a constant."""
    (body, *_) = (*inner_graphs(node), onnx.GraphProto())
    if len(body.input) < 2 or not body.output:
        return False
    producers = {output: inner for inner in body.node for output in inner.output}
    value = body.output[0].name
    while value in producers and producers[value].op_type == "Identity":
        value = producers[value].input[0]
    constant = value in producers and producers[value].op_type == "Constant"
    return constant or value not in producers


def _number(tensor: TensorProto | None) -> int | None:
    if tensor is None or prod(tensor.dims) != 1 or tensor.data_type not in (TensorProto.INT64, TensorProto.INT32):
        return None
    return int(numpy_helper.to_array(tensor).reshape(()))
