"""The nodes and stored tensors of a graph, or of one inside it, as TorchGraph computes with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx
import torch
from torch import Tensor

from onnx_spdy.models.graph import OPTIMISER_DOMAINS, UnsupportedOperator, inner_graphs, node_names
from onnx_spdy.models.operators import OPERATORS, Node, read_node, read_tensor
from onnx_spdy.models.operators.operator import Compute

OWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


def read_nodes(graph: onnx.GraphProto, opset: int) -> list[tuple[Node, Compute]]:
    """Each node but constants, with the function that computes it.

    Raises:
        UnsupportedOperator: one for everything that can't be run, also in the graphs inside nodes.
    """
    read: list[tuple[Node, Compute]] = []
    missing: dict[str, str] = {}
    for op, name in _without_function(graph):
        missing.setdefault(op, name)
    problems: list[str] = []
    optimised = {op: name for op, name in missing.items() if op.startswith(OPTIMISER_DOMAINS)}
    if optimised:
        problems.append(
            f"{_listed(optimised)}: operators that ONNX Runtime's optimiser writes; prune before optimising, that is "
            "give the original file, and optimise the pruned one"
        )
    if missing.keys() - optimised.keys():
        others = _listed({op: name for op, name in missing.items() if op not in optimised})
        problems.append(f"no function for {others}; add one to a file in models/operators/ and to its OPERATORS")
    for proto, name in zip(graph.node, node_names(graph), strict=True):
        if proto.op_type == "Constant" or any(True for _ in _without_function_in(proto, name)):
            continue
        try:
            node = _with_bodies(read_node(proto, name, opset))
            read.append((node, OPERATORS[proto.op_type].build(node)))
        except UnsupportedOperator as exc:
            problems.append(str(exc))
    if problems:
        raise UnsupportedOperator("; ".join(problems))
    return read


def _listed(nodes: Mapping[str, str]) -> str:
    return ", ".join(f"{op} (node '{name}')" for op, name in sorted(nodes.items()))


def read_tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Initializers, and the values of Constant nodes under the names of their outputs."""
    stored = {proto.name: read_tensor(proto) for proto in graph.initializer}
    for proto in graph.node:
        if proto.op_type == "Constant" and proto.domain in OWN_DOMAINS:
            stored[proto.output[0]] = _constant(proto)
    return stored


def _without_function(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    for proto, name in zip(graph.node, node_names(graph), strict=True):
        yield from _without_function_in(proto, name)


def _without_function_in(proto: onnx.NodeProto, name: str) -> Iterator[tuple[str, str]]:
    """(operator, node's name) of a node, or of nodes in the graphs inside it, that no function computes."""
    if proto.domain not in OWN_DOMAINS:
        yield f"{proto.domain}.{proto.op_type}", name
    elif proto.op_type not in OPERATORS and proto.op_type != "Constant":
        yield proto.op_type, name
    for graph in inner_graphs(proto):
        yield from _without_function(graph)


def _constant(proto: onnx.NodeProto) -> Tensor:
    attribute = proto.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return read_tensor(value)
    if attribute.name in ("value_float", "value_floats"):
        return torch.tensor(value, dtype=torch.float32)
    if attribute.name in ("value_int", "value_ints"):
        return torch.tensor(value, dtype=torch.int64)
    raise UnsupportedOperator(f"Constant (node '{proto.name}'): no function for its attribute '{attribute.name}'")


class _Body:
    """A graph inside a node, with its own constants (see `operators.control.Body`)."""

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        self.inputs = tuple(value.name for value in graph.input)
        self.outputs = tuple(graph.output)
        self._stored = read_tensors(graph)
        self._steps = [(inner, OPERATORS[inner.op].host, run) for inner, run in read_nodes(graph, opset)]

    def __call__(self, inputs: Sequence[Tensor], outside: Mapping[str, Tensor]) -> list[Tensor]:
        values = {**self._stored, **outside, **dict(zip(self.inputs, inputs, strict=True))}
        for node, host, compute in self._steps:
            arguments = [values[name] if name else None for name in node.inputs]
            results = compute(*_placed(arguments, host))
            values.update(zip(node.outputs, [results] if len(node.outputs) == 1 else results, strict=True))
        return [values[value.name] for value in self.outputs]


def _with_bodies(node: Node) -> Node:
    """The node with what runs them in the place of the graphs inside it."""
    bodies = {
        name: _Body(value, node.opset) for name, value in node.attributes.items() if isinstance(value, onnx.GraphProto)
    }
    return replace(node, attributes=node.attributes | bodies) if bodies else node


def _placed(arguments: Sequence[Any], host: Collection[int]) -> list[Any]:
    """Numbers about shapes on the CPU, all other tensors where the network is."""
    tensors = {k: x for k, x in enumerate(arguments) if isinstance(x, Tensor)}
    where = next((x.device for k, x in tensors.items() if k not in host and x.device.type != "cpu"), None)
    moved = {k: x.cpu() if k in host else x if where is None else x.to(where) for k, x in tensors.items()}
    return [moved.get(k, x) for k, x in enumerate(arguments)]
