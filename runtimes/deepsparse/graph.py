"""What DeepSparse knows only in other words: nodes of its copy of a graph, replaced by what means the same.

DeepSparse reads opset 19 but has the kernels of its time: LayerNormalization as one node, and GELU with its half
multiplied first, both leave its optimised part, and every piece of the network that is cut off there is copied twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..model_file import walk_graphs

AXES_AS_INPUT = 18  # of ReduceMean, from this opset on


def decompose_unsupported(model: onnx.ModelProto) -> None:
    """Write LayerNormalization as its formula, and x * (0.5 * (1 + erf)) as (x * (1 + erf)) * 0.5, in place."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph = model.graph
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "LayerNormalization" and node.input[1] in floats and _over_last_axis(node):
            nodes += _formula(node, opset, graph)
        else:
            nodes.append(node)
    reads = Counter(name for part in walk_graphs(graph) for node in part.node for name in node.input)
    reads.update(value.name for part in walk_graphs(graph) for value in part.output)
    _halve_last(nodes, reads, {name for name, tensor in floats.items() if _is(tensor, 0.5)})
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _over_last_axis(node: onnx.NodeProto) -> bool:
    """Over the last axis, and only the normalised values are wanted."""
    return _attribute(node, "axis", -1) == -1 and [name for name in node.output if name] == [node.output[0]]


def _formula(node: onnx.NodeProto, opset: int, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias."""
    output = node.output[0]
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"{output}/{name}"))
        return f"{output}/{name}"

    def make(op: str, inputs: list[str], to: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [to], f"{node.name}/{len(nodes)}", **attributes))
        return to

    def mean(value: str, to: str) -> str:
        if opset >= AXES_AS_INPUT:
            return make("ReduceMean", [value, constant(f"{to}/axes", np.array([-1]))], f"{output}/{to}")
        return make("ReduceMean", [value], f"{output}/{to}", axes=[-1])

    epsilon = np.array(_attribute(node, "epsilon", 1e-5), np.float32)
    x, scale, *bias = node.input
    centred = make("Sub", [x, mean(x, "mean")], f"{output}/centred")
    squared = make("Pow", [centred, constant("two", np.array(2, np.float32))], f"{output}/squared")
    sum_ = make("Add", [mean(squared, "variance"), constant("epsilon", epsilon)], f"{output}/sum")
    normal = make("Div", [centred, make("Sqrt", [sum_], f"{output}/deviation")], f"{output}/normal")
    if not bias or not bias[0]:
        make("Mul", [normal, scale], output)
    else:
        make("Add", [make("Mul", [normal, scale], f"{output}/scaled"), bias[0]], output)
    return nodes


def _halve_last(nodes: list[onnx.NodeProto], reads: Mapping[str, int], halves: set[str]) -> None:
    """x * (0.5 * sum) with sum = 1 + erf(x / sqrt 2) becomes (x * sum) * 0.5: halving is exact, nothing changes."""
    makers = {output: node for node in nodes for output in node.output}

    def made_by(op: str, names: Iterable[str]) -> onnx.NodeProto | None:
        found = (makers.get(name) for name in names)
        return next((node for node in found if node is not None and node.op_type == op), None)

    for node in nodes:
        half = made_by("Mul", node.input) if node.op_type == "Mul" else None
        if half is None or reads[half.output[0]] != 1 or not halves.intersection(half.input):
            continue
        x = next((name for name in node.input if name != half.output[0]), "")
        total = made_by("Add", half.input)
        erf = total and made_by("Erf", total.input)
        scaled = erf and makers.get(erf.input[0])
        if total is None or scaled is None or x not in scaled.input:
            continue
        constant = next(name for name in half.input if name in halves)
        half.input[:], node.input[:] = [x, total.output[0]], [half.output[0], constant]


def _is(tensor: onnx.TensorProto, value: float) -> bool:
    return not tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT and numpy_helper.to_array(tensor) == value


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)
