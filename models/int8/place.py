"""Placement: which layers of a graph can compute in int8, and which tensors are quantised for that.

Layers are convolutions and products with a stored weight. What stands between them is in int8 too where nothing is
lost by it: additions, concatenations and pools whose result is quantised anyway, and operators that only move or pick
values. A tensor is quantised once, where it is made, for all that read it in int8; others read it as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import onnx
from onnx import TensorProto, numpy_helper

from onnx_spdy.models.graph import ModelError, captured_names, inner_graphs, node_names, opset_of, outline_of
from onnx_spdy.models.int8.form import Form
from onnx_spdy.runtimes.errors import OnnxSpdyError

# Values that come out are among those that went in, so the grid stays the same.
MOVES = frozenset(
    {"MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Identity", "Split", "DepthToSpace",
     "SpaceToDepth", "Expand", "Pad"}
)  # fmt: skip
CLIPS = frozenset({"Relu", "Clip"})  # which engines fuse into the convolution before them
TWO = frozenset({"Add", "MatMul", "Mul"})  # operators of two operands; of Concat all are data, of others the first
OPSET = 13  # from which on scales may be those of channels


class NothingToQuantise(OnnxSpdyError, ValueError):
    """No layer of the network can compute in int8."""


@dataclass(frozen=True)
class Weight:
    """A stored weight in int8.

    Attributes:
        name: the initializer.
        axis: of the stored tensor, on which the output channels lie.
        nodes: that multiply by it.
    """

    name: str
    axis: int
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Apart:
    """Some readers of a layer's result, which must not be dequantised by one scale for them.

    Attributes:
        readers: (node, number of its input).
        axis: of the result, on which its channels lie; counted from the end where it is negative.
        channels: how many there are.
    """

    readers: tuple[tuple[str, int], ...]
    axis: int
    channels: int


@dataclass(frozen=True)
class Placement:
    """What is quantised in a graph.

    Attributes:
        points: tensor -> (node, number of its input) that read it as it is quantised: who computes in int8, and of a
            layer's result that the engine wants quantised everybody.
        weights: of the layers in int8, in graph order.
        biases: initializer of a bias -> (the layer's input tensor, its weight): the scale of its integers.
        apart: tensor -> its readers that need it dequantised in another way: layers in floating point whose weights
            the engine would round too, for it takes them for layers in int8 otherwise.
        depthwise: tensors that only depthwise convolutions read.
        skipped: name of a layer that stays in floating point -> why.
    """

    points: Mapping[str, tuple[tuple[str, int], ...]]
    weights: tuple[Weight, ...]
    biases: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    apart: Mapping[str, Apart] = field(default_factory=dict)
    depthwise: frozenset[str] = frozenset()
    skipped: Mapping[str, str] = field(default_factory=dict)

    def by_channel(self, form: Form) -> frozenset[str]:
        """The tensors that have a scale for each channel in this form."""
        return self.depthwise if form.per_channel else frozenset()


def find_placement(model: onnx.ModelProto, form: Form, layers: Collection[str] | None = None) -> Placement:
    """What of a graph is quantised.

    Args:
        model: in float32, of opset 13 or later, with named nodes.
        form: of the engine.
        layers: names of the nodes with weights that shall compute in int8; None for all that can.
    Raises:
        ModelError: the graph's opset is older.
        NothingToQuantise: no layer can; the message says why for the first few.
    """
    found = Placing(model, form, layers).placement
    if not found.weights:
        reasons = "; ".join(f"{name}: {why}" for name, why in [*found.skipped.items()][:3])
        raise NothingToQuantise(f"no layer of the network can compute in int8 ({reasons or 'it has none'})")
    return found


class Placing:
    """One search through a graph; see `find_placement`."""

    def __init__(self, model: onnx.ModelProto, form: Form, layers: Collection[str] | None) -> None:
        if (version := opset_of(model)) < OPSET:
            raise ModelError(f"the graph has opset {version}; int8 weights need opset {OPSET} or later")
        self._form, self._layers = form, layers
        self._nodes = dict(zip(node_names(model.graph), model.graph.node, strict=True))
        self._outputs = {value.name for value in model.graph.output}
        inner = [graph for node in model.graph.node for graph in inner_graphs(node)]
        self._leaving = self._outputs | {name for graph in inner for name in captured_names(graph)}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constant = {n.output[0] for n in model.graph.node if n.op_type == "Constant"} | self._stored.keys()
        self._maker = {out: name for name, node in self._nodes.items() for out in node.output if out}
        self._readers: dict[str, list[tuple[str, int]]] = {}
        for name, node in self._nodes.items():
            for number, value in enumerate(node.input):
                self._readers.setdefault(value, []).append((name, number))
        self._floats = _floats(model)
        self._skipped: dict[str, str] = {}
        self._weights: dict[str, int] = {}  # node -> axis of its weight's output channels
        self._wanted: dict[str, bool] = {}
        for name, node in self._nodes.items():
            self._look_at(name, node)
        for node in reversed(model.graph.node):  # each after those that read it, so that no question goes deep
            for output in node.output:
                self._is_wanted(output)

    @cached_property
    def placement(self) -> Placement:
        points: dict[str, list[tuple[str, int]]] = {}
        for name in self._nodes:
            for number in self._int8_inputs(name):
                source = self._source(self._nodes[name].input[number])
                points.setdefault(source, [])
        for tensor in points:
            points[tensor] = [(name, number) for name, number in self._readers[tensor] if self._takes(name, number)]
        apart: dict[str, Apart] = {}
        for name, axis in self._weights.items() if self._form.outputs else ():
            if (result := self._result(name)) is not None:
                points[result] = self._readers[result]
                node = self._nodes[name]
                channels = self._stored[node.input[1]].dims[axis]
                some = tuple(reader for reader in points[result] if self._would_be_rounded(*reader))
                if some and channels > 1:  # of one channel both ways are the same
                    apart[result] = Apart(some, -1 if node.op_type == "MatMul" else 1, channels)
        weights: dict[str, Weight] = {}
        biases, depthwise = {}, set()
        for name, axis in self._weights.items():
            node = self._nodes[name]
            before = weights.get(node.input[1], Weight(node.input[1], axis, ()))
            weights[node.input[1]] = Weight(node.input[1], axis, (*before.nodes, name))
            if len(node.input) > 2 and self._has_bias(node, axis):
                biases[node.input[2]] = (self._source(node.input[0]), node.input[1])
        for tensor in points:
            readers = {name for name, _ in points[tensor]}
            if readers and all(self._is_depthwise(name) for name in readers):
                depthwise.add(tensor)
        return Placement(
            {tensor: tuple(readers) for tensor, readers in points.items()}, tuple(weights.values()), biases,
            apart, frozenset(depthwise), self._skipped,
        )  # fmt: skip

    def _look_at(self, name: str, node: onnx.NodeProto) -> None:
        """Take a layer, or note why not."""
        if node.op_type not in ("Conv", "Gemm", "MatMul", "ConvTranspose") or len(node.input) < 2:
            return
        weight = self._stored.get(node.input[1])
        if weight is None:
            return
        if self._layers is not None and name not in self._layers:
            return
        if reason := self._reason(node, weight):
            self._skipped[name] = reason
            return
        self._weights[name] = _output_axis(node)

    def _reason(self, node: onnx.NodeProto, weight: TensorProto) -> str | None:
        """Why a layer can't compute in int8."""
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type == "ConvTranspose":
            return "transposed convolutions stay in floating point"
        if weight.data_type != TensorProto.FLOAT:
            return f"its weight is {TensorProto.DataType.Name(weight.data_type)}, not float32"
        if node.op_type == "Gemm" and (attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0):
            return "its input is transposed or scaled"
        if node.op_type == "MatMul" and len(weight.dims) != 2:
            return f"its weight has {len(weight.dims)} dimensions, not 2"
        if node.input[0] in self._constant:
            return "its input is stored"
        if node.input[0] not in self._floats:
            return "its input isn't float32"
        others = [(self._nodes[name], number) for name, number in self._readers[weight.name]]
        if any(other.op_type != node.op_type or number != 1 for other, number in others):
            return "its weight is read by another kind of node too"
        if any(_output_axis(other) != _output_axis(node) for other, _ in others):
            return "its weight is read both as it is and transposed"
        if weight.name in self._outputs:
            return "its weight is an output of the graph"
        return None

    def _has_bias(self, node: onnx.NodeProto, axis: int) -> bool:
        """Whether the third input is one stored value for each output channel."""
        bias, weight = self._stored.get(node.input[2]), self._stored[node.input[1]]
        return bias is not None and bias.data_type == TensorProto.FLOAT and [*bias.dims] == [weight.dims[axis]]

    def _moves(self, name: str) -> bool:
        """Whether a node only moves or picks values; padding with anything but 0 puts other values in."""
        node = self._nodes[name]
        if node.op_type != "Pad":
            return node.op_type in MOVES
        filled = node.input[2] if len(node.input) > 2 else ""
        return not filled or (filled in self._stored and not numpy_helper.to_array(self._stored[filled]).any())

    def _is_depthwise(self, name: str) -> bool:
        node = self._nodes[name]
        group = next((one.i for one in node.attribute if one.name == "group"), 1)
        return name in self._weights and group > 1 and self._stored[node.input[1]].dims[1] == 1

    def _data(self, node: onnx.NodeProto) -> list[int]:
        """Numbers of the inputs that are activations."""
        count = len(node.input) if node.op_type == "Concat" else 2 if node.op_type in TWO else 1
        numbers = range(min(count, len(node.input)))
        return [number for number in numbers if node.input[number] and node.input[number] not in self._constant]

    def _int8_inputs(self, name: str) -> list[int]:
        """Numbers of the inputs that a node reads in int8, as it computes with them."""
        node = self._nodes[name]
        if name in self._weights:
            return [0]
        if self._is_product(name) or self._is_int8_between(name):
            return self._data(node)
        return []

    def _is_product(self, name: str) -> bool:
        node = self._nodes[name]
        return (
            self._form.products and node.op_type == "MatMul" and self._layers is None and len(self._data(node)) == 2
            and all(value in self._floats and not self._is_softmax(value) for value in node.input)
        )  # fmt: skip

    def _is_softmax(self, tensor: str) -> bool:
        """Whether a softmax makes a tensor, before what only moves it."""
        maker = self._maker.get(tensor)
        while maker is not None and self._moves(maker):
            maker = self._maker.get(self._nodes[maker].input[0])
        return maker is not None and self._nodes[maker].op_type == "Softmax"

    def _is_int8_between(self, name: str) -> bool:
        """Whether an operator between layers is in int8: its result is quantised, and so is some of what goes in."""
        node = self._nodes[name]
        data = self._data(node)
        fits = (
            node.op_type in self._form.between and len(data) == len(node.input)
            and all(node.input[number] in self._floats for number in data)
        )  # fmt: skip
        return fits and self._is_wanted(node.output[0]) and bool(self._makers(name))

    def _makers(self, name: str) -> frozenset[str]:
        """The layers in int8 that made some of it; through what only moves or clips, and other such nodes."""
        seen, left = set[str](), [name]
        while left:
            node = self._nodes[left.pop()]
            for number in self._data(node):
                maker = self._maker.get(node.input[number])
                if maker is None or maker in seen:
                    continue
                seen.add(maker)
                if maker not in self._weights and (
                    self._moves(maker) or self._nodes[maker].op_type in CLIPS | self._form.between
                ):
                    left.append(maker)
        return frozenset(seen & self._weights.keys())

    def _is_wanted(self, tensor: str) -> bool:
        """Whether all that reads a tensor, behind what only moves or clips, reads it in int8."""
        if tensor not in self._wanted:
            self._wanted[tensor] = False  # a circle can't be in a graph
            readers = self._readers.get(tensor, [])
            self._wanted[tensor] = (
                bool(readers) and tensor not in self._leaving and all(self._reads(*reader) for reader in readers)
            )
        return self._wanted[tensor]

    def _reads(self, name: str, number: int) -> bool:
        node = self._nodes[name]
        if (self._moves(name) or node.op_type in CLIPS) and number == 0:
            return all(self._is_wanted(output) for output in node.output if output)
        return number in self._int8_inputs(name)

    def _takes(self, name: str, number: int) -> bool:
        """Whether a node reads an input in int8, or hands it on to nothing but what does."""
        node = self._nodes[name]
        if self._moves(name) and number == 0:
            moved = [reader for output in node.output for reader in self._readers.get(output, [])]
            leaves = any(output in self._leaving for output in node.output)
            return bool(moved) and not leaves and all(self._takes(*reader) for reader in moved)
        return number in self._int8_inputs(name)

    def _would_be_rounded(self, name: str, number: int) -> bool:
        """Whether a node, or one behind it that it only moves values for, is a layer in floating point.

        ONNX Runtime (WeightBiasQuantization, seen in 1.32) rounds the stored weight of every Conv, ConvTranspose and
        Gemm whose input is dequantised by one scale, to 8 bits by one scale, whatever the file says.
        """
        node = self._nodes[name]
        if number == 0 and self._moves(name):
            behind = [reader for output in node.output for reader in self._readers.get(output, [])]
            return any(self._would_be_rounded(*reader) for reader in behind)
        is_layer = node.op_type in ("Conv", "ConvTranspose", "Gemm") and node.input[1] in self._stored
        return is_layer and number == 0 and name not in self._weights

    def _source(self, tensor: str) -> str:
        """Where a tensor that is read in int8 is quantised: before what only moves it, if nobody else reads that."""
        while (maker := self._maker.get(tensor)) is not None and self._moves(maker):
            node = self._nodes[maker]
            before = node.input[0]
            if before not in self._floats or before in self._constant or not self._takes(maker, 0):
                break
            tensor = before
        return tensor

    def _result(self, name: str) -> str | None:
        """What a layer makes, behind what is fused into it; None where that leaves the graph."""
        tensor = self._nodes[name].output[0]
        readers = self._readers.get(tensor, [])
        if tensor not in self._leaving and len(readers) == 1 and self._nodes[readers[0][0]].op_type in CLIPS:
            tensor = self._nodes[readers[0][0]].output[0]
        return tensor if tensor not in self._leaving and tensor in self._readers else None


def _output_axis(node: onnx.NodeProto) -> int:
    """Of the stored weight, on which the layer's output channels lie."""
    return 0 if node.op_type == "Conv" or any(one.name == "transB" and one.i for one in node.attribute) else 1


def _floats(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors that are float32."""
    inferred = onnx.shape_inference.infer_shapes(outline_of(model)).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
