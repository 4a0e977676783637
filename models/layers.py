"""The layers of a graph that can be pruned, and why the others can't."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import onnx
from onnx import TensorProto

from onnx_spdy.models.graph import FLOATS, OPTIMISER_DOMAINS, inner_graphs, node_names

Array = TypeVar("Array", bound=Any)  # a NumPy array or a PyTorch tensor

# Too small to gain anything: a sparse kernel's bookkeeping costs more than so few multiplications.
MINIMUM_WEIGHTS = 256

PRUNED_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
CONVERSIONS = frozenset(
    {"Cast", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Slice", "Squeeze", "Transpose",
     "Unsqueeze"}
)  # fmt: skip
MOVES = CONVERSIONS - {"DequantizeLinear", "QuantizeLinear"}
# Operators of any domain that hold weights too, and why these aren't pruned.
OTHER_OPERATORS = {
    **dict.fromkeys(("LSTM", "GRU", "RNN"), "recurrent layers aren't pruned"),
    "Einsum": "weights of an Einsum aren't pruned: write it as a MatMul",
    "DeformConv": "deformable convolutions aren't pruned",
    **dict.fromkeys(
        (
            "QLinearConv",
            "QLinearMatMul",
            "QGemm",
            "ConvInteger",
            "MatMulInteger",
            "MatMulIntegerToFloat",
            "MatMulNBits",
        ),
        "its weights are quantised: prune the network before it is quantised",
    ),
}
OPTIMISED = "an operator that ONNX Runtime's optimiser writes: prune before optimising, that is the original file"


@dataclass(frozen=True)
class Layer:
    """A node that multiplies its input by a weight.

    Attributes:
        name: the node's name.
        op: Conv, Gemm, MatMul, ConvTranspose; or another operator with weights, which is always skipped.
        weight: name of the weight initializer.
        bias: name of the initializer that is added for each output channel and used nowhere else, or None.
        output: name of the node's output tensor (before a separate Add of the bias).
        shape: (out, in, *kernel); () where the weight isn't stored in the graph.
        transposed: the weight is stored as (in, out).
        skip: why the layer can't be pruned, in words; None if it can.
        more_uses: (node, its output) of the later nodes that multiply by the same weight in the same way: they are
            pruned with this one. Each of them is a layer too, which is skipped.
    """

    name: str
    op: str
    weight: str
    bias: str | None
    output: str
    shape: tuple[int, ...]
    transposed: bool
    skip: str | None
    more_uses: tuple[tuple[str, str], ...] = ()

    @property
    def prunable(self) -> bool:
        return self.skip is None

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all nodes that multiply by the weight, in graph order."""
        return (self.name, *(name for name, _ in self.more_uses))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output of each of them."""
        return (self.output, *(output for _, output in self.more_uses))


def find_layers(model: onnx.ModelProto, *, minimum_weights: int = MINIMUM_WEIGHTS) -> list[Layer]:
    """Every node that multiplies by weights, in graph order; those that can't be pruned say why.

    Args:
        model: any graph; names are those of `node_names`.
        minimum_weights: layers with fewer weights are skipped.
    """
    usage = _Usage(model)
    layers = []
    for node, name in zip(model.graph.node, node_names(model.graph), strict=True):
        if node.op_type in PRUNED_OPERATORS and node.domain in ("", "ai.onnx"):
            layers.append(_layer(node, name, usage, minimum_weights))
        elif (reason := _reason_for_other(node)) and (weight := _largest_stored(node, usage)):
            layers.append(Layer(name, node.op_type, weight, None, node.output[0], (), False, reason))
        for graph in inner_graphs(node):
            layers += _inside(graph, name, node.op_type, usage.stored)
    return layers


def _inside(graph: onnx.GraphProto, owner: str, control: str, outside: Mapping[str, TensorProto]) -> Iterator[Layer]:
    """The layers of a graph inside a node."""
    stored = {**outside, **{tensor.name: tensor for tensor in graph.initializer}}
    for node, name in zip(graph.node, node_names(graph), strict=True):
        if node.op_type in PRUNED_OPERATORS and len(node.input) > 1 and node.input[1] in stored:
            reason = f"inside control flow ({control})"
            yield Layer(f"{owner}/{name}", node.op_type, node.input[1], None, node.output[0], (), False, reason)
        for inner in inner_graphs(node):
            yield from _inside(inner, f"{owner}/{name}", node.op_type, stored)


def to_canonical(layer: Layer, array: Array) -> Array:
    """The stored weight as (out, in, *kernel), for NumPy arrays and PyTorch tensors; a view where it is transposed."""
    return array.T if layer.transposed else array


def from_canonical(layer: Layer, array: Array) -> Array:
    """The exact inverse of `to_canonical`: (out, in, *kernel) -> the stored order."""
    return array.T if layer.transposed else array


class _Usage:
    """Who stores and who reads each tensor of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.stored: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.reads: Counter[str] = Counter()
        self.producers = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[tuple[str, onnx.NodeProto]]] = {}  # (name, node) of the graph itself
        _count_reads(graph, self.reads)
        for node, name in zip(graph.node, node_names(graph), strict=True):
            for value in dict.fromkeys(node.input):
                self.readers.setdefault(value, []).append((name, node))
        self.interface = {value.name for value in (*graph.input, *graph.output)}

    def adding(self, value: str) -> onnx.NodeProto | None:
        """The Add that reads a value, if its first reader is one."""
        node = next((node for _, node in self.readers.get(value, [])), None)
        return node if node is not None and node.op_type == "Add" else None


def _count_reads(graph: onnx.GraphProto, reads: Counter[str]) -> None:
    for node in graph.node:
        reads.update(node.input)
        for inner in inner_graphs(node):
            _count_reads(inner, reads)
            reads.update(value.name for value in inner.output)


def _layer(node: onnx.NodeProto, name: str, usage: _Usage, minimum_weights: int) -> Layer:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    position = _weight_position(node, usage.stored)
    weight = node.input[position]
    stored = usage.stored.get(weight)
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attributes.get("transB", 0))
    shape = tuple(stored.dims) if stored is not None else ()
    if node.op_type == "ConvTranspose":
        shape = (*shape[1::-1], *shape[2:])  # stored as (in, out, *kernel)
    elif transposed:
        shape = shape[::-1] if len(shape) == 2 else shape
    transposed = transposed and len(shape) == 2
    skip = _reason_to_skip(node, name, position, attributes, usage, minimum_weights)
    bias = _bias(node, shape, usage)
    more = () if skip else tuple((other, use.output[0]) for other, use in usage.readers[weight][1:])
    return Layer(name, node.op_type, weight, bias, node.output[0], shape, transposed, skip, more)


def _reason_for_other(node: onnx.NodeProto) -> str | None:
    """Why an operator that isn't one of those that are pruned is none, if it may hold weights."""
    return OTHER_OPERATORS.get(node.op_type) or (OPTIMISED if node.domain.startswith(OPTIMISER_DOMAINS) else None)


def _largest_stored(node: onnx.NodeProto, usage: _Usage) -> str | None:
    """The stored tensor with most values that the node reads; None if it reads none with more than one dimension."""
    stored = [usage.stored[name] for name in node.input if name in usage.stored]
    matrices = [tensor for tensor in stored if len(tensor.dims) > 1]
    return max(matrices, key=lambda tensor: prod(tensor.dims)).name if matrices else None


def _weight_position(node: onnx.NodeProto, stored: Mapping[str, TensorProto]) -> int:
    left = node.op_type in ("MatMul", "Gemm") and node.input[0] in stored and node.input[1] not in stored
    return 0 if left else 1


def _reason_to_skip(
    node: onnx.NodeProto, name: str, position: int, attributes: Mapping[str, Any], usage: _Usage, minimum_weights: int
) -> str | None:
    weight = node.input[position]
    stored = usage.stored.get(weight)
    if node.op_type == "ConvTranspose":
        return "transposed convolutions aren't pruned"
    if stored is None:
        return _reason_for_computed(weight, usage)
    if weight in usage.interface:
        return f"its weight '{weight}' is also an input or output of the graph"
    if stored.data_type not in FLOATS:
        return f"its weight has element type {TensorProto.DataType.Name(stored.data_type)}, not a floating one"
    if position == 0:
        return f"its constant '{weight}' is the left operand"
    if node.op_type == "MatMul" and len(stored.dims) != 2:
        return f"its weight has {len(stored.dims)} dimensions, not 2"
    if node.op_type == "Gemm" and attributes.get("transA", 0):
        return "its input is transposed (transA=1)"
    uses = usage.readers[weight]
    if usage.reads[weight] > len(uses) or any(_way(use, weight) != _way(node, weight) for _, use in uses):
        return f"its weight '{weight}' is shared by {usage.reads[weight]} uses of different kinds"
    groups = attributes.get("group", 1)
    if groups > 1:
        kind = "depthwise" if stored.dims[1] == 1 else "grouped"
        return f"{kind} convolution ({groups} groups)"
    if prod(stored.dims) < minimum_weights:
        return f"only {prod(stored.dims)} weights (fewer than {minimum_weights})"
    if uses[0][0] != name:
        return f"its weight '{weight}' is that of '{uses[0][0]}' and pruned there"
    return None


def _way(node: onnx.NodeProto, weight: str) -> tuple[Any, ...]:
    """How a node multiplies by a weight: nodes that do it in one way are one layer that runs several times."""
    attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    return node.domain, node.op_type, attributes, [k for k, name in enumerate(node.input) if name == weight]


def _reason_for_computed(value: str, usage: _Usage) -> str:
    """Follow the value back through nodes that only convert or move numbers."""
    steps = []
    while value in usage.producers and usage.producers[value].op_type in CONVERSIONS:
        steps.append(usage.producers[value].op_type)
        value = usage.producers[value].input[0]
    others = [f"'{name}' ({node.op_type})" for name, node in usage.readers.get(value, []) if node.op_type == "Gather"]
    if value in usage.stored and others and set(steps) <= MOVES:
        return f"its weight is the embedding '{value}' that {others[0]} reads too (tied): untie them before the export"
    if value in usage.stored:
        return f"its weight is computed from '{value}' by {', '.join(reversed(steps))}: prune before that is added"
    return "a product of two computed values: it has no weights"


def _bias(node: onnx.NodeProto, shape: tuple[int, ...], usage: _Usage) -> str | None:
    """The initializer of one value for each output that this layer alone adds to its result."""
    output = node.output[0]
    if node.op_type == "Gemm" and any(item.name == "beta" and item.f != 1 for item in node.attribute):
        return None  # it is added scaled
    if node.op_type != "MatMul":
        name = node.input[2] if len(node.input) > 2 else ""
    elif usage.reads[output] == 1 and output not in usage.interface and (add := usage.adding(output)) is not None:
        name = add.input[1] if add.input[0] == output else add.input[0]
    else:
        return None
    stored = usage.stored.get(name)
    if stored is None or usage.reads[name] != 1 or name in usage.interface:
        return None
    return name if tuple(stored.dims) == shape[:1] else None
