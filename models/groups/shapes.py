"""The shape of every value of a graph, with numbers for the dimensions that are open."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_spdy.models.graph import graph_inputs, outline_of

# A prime, so that a Reshape that mixes the batch with other axes can't be taken for one that doesn't.
OPEN_BATCH = 13
# A multiple of all usual strides and patches; a length of a sequence as well.
OPEN_SIZE = 224
# Computing a size may open the way for inference, which gives other sizes; real networks settle after three rounds.
LARGEST_ROUNDS = 8
# Not inferred by all versions of onnx; what more they make isn't looked at.
SAME_SHAPE = frozenset({"GroupNormalization", "RMSNormalization"})
LARGEST_NUMBERS = 4096  # of a value that is computed here: a shape, positions, a mask of them
# With which graphs compute sizes, and what has the size that they computed.
COMPUTED = frozenset(
    {"Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather",
     "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
     "Range", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Slice", "Split", "Sqrt", "Squeeze",
     "Sub", "Tile", "Transpose", "Unsqueeze", "Where"}
)  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def all_shapes(model: onnx.ModelProto) -> Shapes:
    """The shapes of values as far as they can be found out; those of stored tensors too.

    The same open dimension has the same number everywhere, so the shapes are those of one possible run. Where a shape
    depends on numbers that the graph computes from other shapes, these are computed.
    """
    outline = outline_of(model)
    outline.graph.ClearField("value_info")
    for value in outline.graph.output:  # exporters write sizes of the traced example there
        value.type.tensor_type.ClearField("shape")
    _close(outline)
    _simplify(outline)
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in outline.graph.initializer if _is_here(tensor)}
    found: Shapes = {}
    for _ in range(LARGEST_ROUNDS):
        before = len(found)
        found = _inferred(outline) | {name: value.shape for name, value in known.items()}
        _compute(outline, found, known)
        if len(found) == before:
            break
    return found | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _is_here(tensor: TensorProto) -> bool:
    return tensor.data_location != TensorProto.EXTERNAL and bool(np.prod(tensor.dims) <= LARGEST_NUMBERS)


def _close(model: onnx.ModelProto) -> None:
    """Give each open dimension of an input a number."""
    numbers: dict[str, int] = {}
    for value in graph_inputs(model):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value <= 0:
                size = OPEN_SIZE if axis else OPEN_BATCH
                dim.dim_value = numbers.setdefault(dim.dim_param, size) if dim.dim_param else size


def _inferred(model: onnx.ModelProto) -> Shapes:
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shape = value.type.tensor_type.shape
        known = value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape")
        if known and all(dim.HasField("dim_value") for dim in shape.dim):
            found[value.name] = tuple(dim.dim_value for dim in shape.dim)
    return found


def _simplify(model: onnx.ModelProto) -> None:
    """Operators that inference doesn't know in all versions, by one with the same shape."""
    for node in model.graph.node:
        if node.op_type in SAME_SHAPE:
            simple = onnx.helper.make_node("Identity", node.input[:1], node.output[:1], node.name)
            node.CopyFrom(simple)


def _compute(model: onnx.ModelProto, shapes: Shapes, known: dict[str, np.ndarray]) -> None:
    """Values that follow from known ones become stored ones, in the place of the nodes that compute them."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    left = []
    for node in model.graph.node:
        values = list(_values(node, opset, shapes, known))
        if not values:
            left.append(node)
        for name, value in values:
            known[name] = value
            shapes.setdefault(name, value.shape)
            model.graph.initializer.add().CopyFrom(numpy_helper.from_array(value, name))
    if len(left) < len(model.graph.node):
        nodes = onnx.GraphProto(node=left)
        model.graph.ClearField("node")
        model.graph.MergeFrom(nodes)


def _values(
    node: onnx.NodeProto, opset: int, shapes: Shapes, known: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """(output, its value) of a node whose inputs are known."""
    if node.op_type == "Shape" and node.input[0] in shapes:
        attributes = {one.name: one.i for one in node.attribute}
        sizes = shapes[node.input[0]][attributes.get("start", 0) : attributes.get("end")]
        yield node.output[0], np.array(sizes, np.int64)
    elif node.op_type in COMPUTED and node.input and all(name in known for name in node.input if name):
        if any(np.prod(shapes.get(name, ())) > LARGEST_NUMBERS for name in node.output):
            return
        try:
            results = ReferenceEvaluator(node, opsets={"": opset}).run(
                None, {name: known[name] for name in node.input if name}
            )
        except Exception:  # it raises anything; the shape stays unknown then
            return
        if all(isinstance(one, np.ndarray | np.generic) and np.size(one) <= LARGEST_NUMBERS for one in results):
            yield from ((name, np.asarray(one)) for name, one in zip(node.output, results, strict=True))
