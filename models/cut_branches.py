"""Take a residual branch out of a graph: what it adds without any unit is one constant, and often not even that."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_spdy.models.graph import captured_names, inner_graphs, names_read, node_names
from onnx_spdy.models.groups import Branch

CHANNELS_SECOND = ("Conv", "ConvTranspose")
IDEMPOTENT = ("Abs", "Ceil", "Clip", "Floor", "Identity", "Relu", "Round", "Sign")


def cut_branches(model: onnx.ModelProto, branches: Iterable[Branch]) -> None:
    """Take branches out, in place.

    Their consumers give their biases then, or nothing. That is added to the bias of what makes the other operand of the
    sum, where nothing else reads that; else the addition stays, with a stored operand. An activation that follows is
    gone too where it was applied to that operand already.

    Args:
        branches: of groups of the graph.
    """
    cutting = _Cutting(model)
    for branch in branches:
        cutting.cut(branch)
    cutting.write()


class _Cutting:
    """One graph, while branches are taken out."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._graph = model, model.graph
        self._nodes = dict(zip(node_names(model.graph), model.graph.node, strict=True))
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        inner = (one for node in model.graph.node for one in inner_graphs(node))
        self._leaving = {value.name for value in model.graph.output} | {
            name for graph in inner for name in captured_names(graph)
        }

    def cut(self, branch: Branch) -> None:
        constants = self._constants(branch)
        gone = set(branch.gone)
        for name in [name for name, node in self._nodes.items() if gone.issuperset(filter(None, node.output))]:
            del self._nodes[name]
        for name in branch.sums:
            if name in self._nodes:  # else it was inside of another branch
                self._without(name, constants)

    def _constants(self, branch: Branch) -> dict[str, np.ndarray]:
        """Tensor -> its value, of those that go into the sums."""
        ends = (self._nodes[name] for name in branch.ends if name in self._nodes)
        found = {node.output[0]: self._alone(node) for node in ends}
        for node in self._nodes.values():
            name = node.output[0]
            if name in branch.gone and name not in found and any(one in found for one in node.input):
                found[name] = self._computed(node, found)
        return found

    def _alone(self, node: NodeProto) -> np.ndarray:
        """What a layer gives where its input counts for nothing: its bias, so that it is broadcast."""
        weight = self._value(node.input[1])
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        channels = weight.shape[0 if node.op_type == "Conv" or transposed else 1]
        if len(node.input) > 2 and node.input[2]:
            bias = np.broadcast_to(self._value(node.input[2]).reshape(-1), (channels,))
        else:
            bias = np.zeros(channels, weight.dtype)
        return bias.reshape(-1, *[1] * (weight.ndim - 2)) if node.op_type in CHANNELS_SECOND else bias

    def _computed(self, node: NodeProto, found: dict[str, np.ndarray]) -> np.ndarray:
        inputs = {name: found[name] if name in found else self._value(name) for name in node.input if name}
        given = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in inputs.items()
        ]
        graph = helper.make_graph([node], "node", given, [onnx.ValueInfoProto(name=node.output[0])])
        alone = helper.make_model(graph, opset_imports=[*self._model.opset_import])
        (value,) = ReferenceEvaluator(alone).run([node.output[0]], inputs)
        return np.asarray(value)

    def _value(self, name: str) -> np.ndarray:
        if name in self._stored:
            return numpy_helper.to_array(self._stored[name])
        maker = next(node for node in self._nodes.values() if name in node.output)
        if maker.op_type == "Constant":
            return numpy_helper.to_array(maker.attribute[0].t)
        return self._computed(maker, {one: self._value(one) for one in maker.input if one})

    def _without(self, name: str, constants: dict[str, np.ndarray]) -> None:
        """An addition of a constant, which goes where another node can add that."""
        node = self._nodes[name]
        (number,) = [number for number, value in enumerate(node.input) if value in constants]
        added, other = constants[node.input[number]], node.input[1 - number]
        free = node.output[0] not in self._leaving
        if free and (not added.any() or self._add_before(other, added)):
            self._pass(name, other)
        else:
            self._keep(node.input[number], added)

    def _pass(self, name: str, other: str) -> None:
        """Take a node out: what reads its result reads another tensor, and what was done to that isn't done again."""
        node = self._nodes.pop(name)
        readers = {name: one for name, one in self._nodes.items() if node.output[0] in one.input}
        for reader in readers.values():
            reader.input[:] = [other if value == node.output[0] else value for value in reader.input]
        maker = next((one for one in self._nodes.values() if other in one.output), None)
        for name, reader in readers.items():
            if maker is None or reader.op_type not in IDEMPOTENT or reader.op_type != maker.op_type:
                continue
            if _options(reader) == _options(maker) and reader.output[0] not in self._leaving:
                self._pass(name, other)

    def _add_before(self, name: str, added: np.ndarray) -> bool:
        """Let what makes a tensor add a constant too; whether it can."""
        if name in self._leaving or self._reads(name) != 1:
            return False
        maker = next((node for node in self._nodes.values() if name in node.output), None)
        if maker is None:
            return False
        if maker.op_type == "Add":
            stored = [number for number, value in enumerate(maker.input) if value in self._stored]
            if len(stored) == 1:
                return self._add_to(maker, stored[0], added)
            return any(self._add_before(value, added) for value in maker.input if value not in self._stored)
        if maker.op_type in CHANNELS_SECOND:
            flat = added.size == prod(added.shape[:1]) and added.ndim > 1
            channels = self._stored[maker.input[1]].dims if maker.input[1] in self._stored else ()
            if not flat or not channels:
                return False
            if len(maker.input) < 3 or not maker.input[2]:
                bias = f"{maker.output[0]}/bias"
                self._keep(bias, added.reshape(-1))
                maker.input[:] = [*maker.input[:2], bias]
                return True
            return self._add_to(maker, 2, added.reshape(-1))
        if maker.op_type == "LayerNormalization" and len(maker.input) > 2 and name == maker.output[0]:
            return self._add_to(maker, 2, added)
        return False

    def _add_to(self, node: NodeProto, number: int, added: np.ndarray) -> bool:
        """Add to a stored input, where it keeps its shape and nobody else reads it."""
        name = node.input[number]
        if name not in self._stored or self._reads(name) != 1 or name in self._leaving:
            return False
        before = numpy_helper.to_array(self._stored[name])
        if np.broadcast_shapes(before.shape, added.shape) != before.shape:
            return False
        self._stored[name].CopyFrom(numpy_helper.from_array((before + added).astype(before.dtype), name))
        return True

    def _keep(self, name: str, value: np.ndarray) -> None:
        self._stored[name] = self._graph.initializer.add()
        self._stored[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))

    def _reads(self, name: str) -> int:
        return sum(value == name for node in self._nodes.values() for value in node.input)

    def write(self) -> None:
        """Only the nodes that are left, and what they read."""
        nodes = onnx.GraphProto(node=self._nodes.values())
        self._graph.ClearField("node")
        self._graph.MergeFrom(nodes)
        made = {name for node in self._graph.node for name in node.output}
        _keep_only(self._graph.initializer, {*names_read(self._graph)})
        _keep_only(self._graph.value_info, made)


def _options(node: NodeProto) -> list[object]:
    """What besides its first input says what a node computes."""
    return [*node.input[1:], *sorted(one.SerializeToString() for one in node.attribute)]


def _keep_only(field, names: Iterable[str]) -> None:  # a repeated field of messages with names
    for number in reversed(range(len(field))):
        if field[number].name not in names:
            del field[number]
