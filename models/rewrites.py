"""Small changes to a graph that engines need, each for its own reason. They change the graph that they are given."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from onnx_spdy.models.graph import node_names, outline_of

CONVOLUTIONS = ("Conv", "ConvTranspose")
SHAPED = ("Expand", "Reshape")  # whose second input is the shape of their output


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a unique name, because layers, profiles and reports refer to nodes by name."""
    for node, name in zip(model.graph.node, node_names(model.graph), strict=True):
        node.name = name


def note_shapes(graph: gs.Graph, model: onnx.ModelProto) -> None:
    """Write into the graph of a model what shape inference finds out about it: sizes, None for one that isn't known."""
    try:
        inferred = onnx.shape_inference.infer_shapes(outline_of(model)).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return  # ONNX Runtime says what is wrong with it
    tensors = graph.tensors()
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = tensors.get(value.name)
        if isinstance(tensor, gs.Variable) and value.type.tensor_type.HasField("shape"):
            tensor.shape = [axis.dim_value or None for axis in value.type.tensor_type.shape.dim]


def made_by(op: str, tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor, if it is of that kind."""
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None


def pool_instead_of_mean(graph: gs.Graph) -> None:
    """A mean over all spatial axes becomes GlobalAveragePool.

    PyTorch's exporter writes `AdaptiveAvgPool2d(1)` as ReduceMean over two axes; DeepSparse runs a graph with such a
    node wholly without optimisation ("reduce only supports 1 axis"). Where a tensor's shape is unknown the node stays.
    """
    nodes = []
    for node in graph.nodes:
        nodes += _pooling(node) if node.op == "ReduceMean" and _is_spatial(node) else [node]
    graph.nodes = nodes


def _is_spatial(node: gs.Node) -> bool:
    rank = len(node.inputs[0].shape or ())
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1:
        axes = node.inputs[1].values.tolist() if isinstance(node.inputs[1], gs.Constant) else None
    # With one spatial axis (rank 3) the mean is over one axis only, which every engine knows.
    return rank >= 4 and axes is not None and sorted(axis % rank for axis in axes) == list(range(2, rank))


def _pooling(node: gs.Node) -> list[gs.Node]:
    source, output = node.inputs[0], node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    if node.attrs.get("keepdims", 1):
        return [gs.Node("GlobalAveragePool", node.name, inputs=[source], outputs=[output])]
    pooled = gs.Variable(f"{output.name}_pooled")
    return [
        gs.Node("GlobalAveragePool", node.name, inputs=[source], outputs=[pooled]),
        gs.Node("Flatten", f"{node.name}_flatten", {"axis": 1}, [pooled], [output]),
    ]


def own_shapes(graph: gs.Graph) -> None:
    """Each Reshape and Expand gets a computed shape of its own, where a size is written into it.

    Where the batch or the length of a sequence is open, all layers of a transformer read one shape, (batch, length,
    heads, -1), or (batch, heads, copies, length, width) where keys are repeated for several queries. So heads could
    only be removed from all of them together.
    """
    nodes = []
    for node in graph.nodes:
        made = made_by("Concat", node.inputs[1]) if node.op in SHAPED and len(node.inputs) > 1 else None
        if made is not None and node.inputs[1].outputs[0] is not node and _holds_sizes(node.inputs[1]):
            shape = gs.Variable(f"{node.outputs[0].name}_shape", made.outputs[0].dtype, made.outputs[0].shape)
            nodes.append(gs.Node("Concat", f"{node.name}_shape", dict(made.attrs), list(made.inputs), [shape]))
            node.inputs[1] = shape
        nodes.append(node)
    graph.nodes = nodes


def _holds_sizes(shape: gs.Tensor) -> bool:
    """Whether a Concat makes a shape for `SHAPED` only, some of whose numbers are stored sizes."""
    pieces = [one.values for one in shape.inputs[0].inputs if isinstance(one, gs.Constant)]
    return any((piece > 1).any() for piece in pieces) and all(
        reader.op in SHAPED and reader.inputs[1] is shape for reader in shape.outputs
    )


def restore_names(graph: gs.Graph, original: gs.Graph) -> None:
    """Convolutions into which a Pad, BatchNormalization, Mul or Add was folded get their names back.

    Folding makes a new node and new weights, named after the output. The user knows the layer by the name of the
    PyTorch parameter, so node and initializers take the names of those they replace, unless these still exist.
    """
    known, taken = original.tensors(), graph.tensors()
    for node in graph.nodes:
        folded = _convolution_behind(known.get(node.outputs[0].name)) if node.op in CONVOLUTIONS else None
        if folded is None or folded.op != node.op:
            continue
        pad = made_by("Pad", folded.inputs[0])
        if node.inputs[0].name not in (folded.inputs[0].name, pad.inputs[0].name if pad else None):
            continue
        node.name = folded.name
        for new, old in zip(node.inputs[1:], folded.inputs[1:], strict=False):  # a bias may be new
            both = isinstance(new, gs.Constant) and isinstance(old, gs.Constant)
            if both and new.name not in known and old.name not in taken:
                new.name = old.name
                taken[new.name] = new


def _convolution_behind(tensor: gs.Tensor | None) -> gs.Node | None:
    while tensor is not None and tensor.inputs:
        node = tensor.inputs[0]
        if node.op not in ("BatchNormalization", "Mul", "Add"):
            return node
        tensor = node.inputs[0]
    return None
