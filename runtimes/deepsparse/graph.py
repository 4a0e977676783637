"""What DeepSparse knows only in other words: nodes of its copy of a graph, replaced by what means the same.

DeepSparse reads opset 19 but has the kernels of its time: LayerNormalization as one node, and GELU with its half
multiplied first, both leave its optimised part, and every piece of the network that is cut off there is copied twice.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.logger import G_LOGGER

from ..base import ModelRefused, one_line

AXES_AS_INPUT = 18  # of ReduceMean, from this opset on


def decompose_unsupported(model: onnx.ModelProto) -> None:
    """Write LayerNormalization as its formula, and x * (0.5 * (1 + erf)) as (x * (1 + erf)) * 0.5, in place.

    Raises:
        ModelRefused: graphsurgeon can't read the graph.
    """
    with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):  # it prints
        try:
            graph = gs.import_onnx(model)
            old = list(zip(graph.nodes, model.graph.node, strict=True))
            known = graph.tensors()
            _write_norms(graph)
            _halve_last(graph)
        except Exception as exc:  # it expects graphs without a fault, and checks little
            reason = one_line(f"{type(exc).__name__}: {exc}")
            raise ModelRefused(f"this graph can't be brought into the form that deepsparse knows: {reason}") from exc
        # Only what is new is written: an export of everything would copy the weights that a graph inside a node reads
        # into it, where no zeros are drawn in them.
        messages = {id(node): message for node, message in old}
        nodes = [_written(node, messages.get(id(node))) for node in graph.nodes]
        constants = [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]
        new = [OnnxExporter.export_tensor_proto(tensor) for tensor in constants if tensor.name not in known]
    model.graph.initializer.extend(new)
    kept = onnx.GraphProto(node=nodes)  # copies, because the messages go with the list that they are in
    model.graph.ClearField("node")
    model.graph.MergeFrom(kept)


def _written(node: gs.Node, message: onnx.NodeProto | None) -> onnx.NodeProto:
    """A node's own message while it reads what it did; a new one otherwise."""
    if message is not None and list(message.input) == [tensor.name for tensor in node.inputs]:
        return message
    return OnnxExporter.export_node(node)


def _write_norms(graph: gs.Graph) -> None:
    """Replace each LayerNormalization over the last axis, whose mean and deviation nobody wants."""
    nodes: list[gs.Node] = []
    for node in graph.nodes:
        known = node.op == "LayerNormalization" and _is_float(node.inputs[1]) and node.attrs.get("axis", -1) == -1
        wanted = [tensor for tensor in node.outputs if not tensor.is_empty()]
        nodes += _formula(node, graph.opset) if known and len(wanted) == 1 and wanted[0] is node.outputs[0] else [node]
    graph.nodes = nodes


def _formula(norm: gs.Node, opset: int) -> list[gs.Node]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias."""
    output = norm.outputs[0]
    nodes: list[gs.Node] = []

    def constant(name: str, values: np.ndarray) -> gs.Constant:
        return gs.Constant(f"{output.name}/{name}", values)

    def make(op: str, inputs: list[gs.Tensor], to: str | gs.Tensor, attributes: dict | None = None) -> gs.Tensor:
        made = gs.Variable(f"{output.name}/{to}") if isinstance(to, str) else to
        nodes.append(gs.Node(op, f"{norm.name}/{len(nodes)}", attributes, inputs, [made]))
        return made

    def mean(value: gs.Tensor, to: str) -> gs.Tensor:
        if opset >= AXES_AS_INPUT:
            return make("ReduceMean", [value, constant(f"{to}/axes", np.array([-1]))], to)
        return make("ReduceMean", [value], to, {"axes": [-1]})

    epsilon = np.array(norm.attrs.get("epsilon", 1e-5), np.float32)
    x, scale, *bias = norm.inputs
    norm.inputs.clear()
    norm.outputs.clear()
    centred = make("Sub", [x, mean(x, "mean")], "centred")
    squared = make("Pow", [centred, constant("two", np.array(2, np.float32))], "squared")
    sum_ = make("Add", [mean(squared, "variance"), constant("epsilon", epsilon)], "sum")
    normal = make("Div", [centred, make("Sqrt", [sum_], "deviation")], "normal")
    if not bias or bias[0].is_empty():
        make("Mul", [normal, scale], output)
    else:
        make("Add", [make("Mul", [normal, scale], "scaled"), bias[0]], output)
    return nodes


def _halve_last(graph: gs.Graph) -> None:
    """x * (0.5 * sum) with sum = 1 + erf(x / sqrt 2) becomes (x * sum) * 0.5: halving is exact, nothing changes."""
    for node in graph.nodes:
        half = _made_by("Mul", node.inputs) if node.op == "Mul" else None
        constant = half and next((tensor for tensor in half.inputs if _is_half(tensor)), None)
        if half is None or constant is None or not _is_read_once(half.outputs[0], graph):
            continue
        x = next((tensor for tensor in node.inputs if tensor is not half.outputs[0]), None)
        total = _made_by("Add", half.inputs)
        erf = total and _made_by("Erf", total.inputs)
        scaled = erf and erf.inputs[0].inputs
        if total is None or x is None or not scaled or all(tensor is not x for tensor in scaled[0].inputs):
            continue
        half.inputs, node.inputs = [x, total.outputs[0]], [half.outputs[0], constant]


def _made_by(op: str, tensors: Iterable[gs.Tensor]) -> gs.Node | None:
    makers = (tensor.inputs[0] for tensor in tensors if tensor.inputs)
    return next((node for node in makers if node.op == op), None)


def _is_read_once(tensor: gs.Tensor, graph: gs.Graph) -> bool:
    return len(tensor.outputs) == 1 and all(output is not tensor for output in graph.outputs)


def _is_float(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32


def _is_half(tensor: gs.Tensor) -> bool:
    return _is_float(tensor) and not tensor.shape and tensor.values == 0.5
