"""What an operator is: a function that reads a node once and returns the function that computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from onnx_spdy.models.graph import UnsupportedOperator, captured_names, inner_graphs
from onnx_spdy.models.stored import is_mapped, values_of

Compute = Callable[..., Any]

TORCH_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True)
class Node:
    """An ONNX node with its attributes as Python values (tensors stay messages, graphs become bodies that can be run).

    `captured` names what the graphs inside the node read from outside; these are its last inputs too.
    """

    op: str
    name: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    captured: tuple[str, ...] = ()

    def get(self, attribute: str, default: Any = None) -> Any:
        return self.attributes.get(attribute, default)

    def has_input(self, position: int) -> bool:
        return position < len(self.inputs) and self.inputs[position] != ""

    def unsupported(self, reason: str) -> UnsupportedOperator:
        return UnsupportedOperator(f"{self.op} (node '{self.name}'): {reason}")


@dataclass(frozen=True)
class Operator:
    """How TorchGraph computes one kind of node.

    Attributes:
        build: called once for each node; returns the function from the node's input tensors (None where an optional
            one is left out) to its output tensor, or to a tuple of them where the node has several.
        host: positions of inputs that are read as Python numbers (shapes, axes, bounds): they stay on the CPU.
        statistics: positions of floating inputs that are no parameters (running mean and variance).
    """

    build: Callable[[Node], Compute]
    host: frozenset[int] = frozenset()
    statistics: frozenset[int] = frozenset()


def simple(function: Compute) -> Operator:
    """An operator without attributes."""
    return Operator(lambda node: function)


def read_node(proto: onnx.NodeProto, name: str, opset: int) -> Node:
    """Raises UnsupportedOperator for the explicit broadcasting of opsets before 7."""
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        attributes[attribute.name] = _text(value) if isinstance(value, bytes) else value
    if attributes.get("broadcast"):
        raise UnsupportedOperator(f"{proto.op_type} (node '{name}'): broadcasting as before opset 7")
    captured = tuple(dict.fromkeys(name for graph in inner_graphs(proto) for name in captured_names(graph)))
    return Node(proto.op_type, name, opset, (*proto.input, *captured), tuple(proto.output), attributes, captured)


def _text(value: bytes) -> str:
    return value.decode(errors="replace")  # a damaged mode is then an unknown one


def read_tensor(proto: TensorProto) -> Tensor:
    """A tensor with its own copy of the data; that of a mapped one is read when it is used, and copied when changed.

    Raises:
        UnsupportedOperator: an element type that PyTorch doesn't have (text, 4-bit numbers, ...).
    """
    if proto.data_type not in TORCH_DTYPES:
        kind = TensorProto.DataType.Name(proto.data_type)
        raise UnsupportedOperator(f"tensor '{proto.name}' has element type {kind}, which can't be run in PyTorch")
    array = values_of(proto)
    if proto.data_type == TensorProto.BFLOAT16:  # NumPy and PyTorch have no common type for it
        array = array.view(np.int16)
    tensor = torch.from_numpy(array if is_mapped(proto) else np.array(array, order="C"))
    return tensor.view(torch.bfloat16) if proto.data_type == TensorProto.BFLOAT16 else tensor


def trimmed(node: Node, results: tuple[Tensor, ...]) -> Any:
    """As many results as the node has outputs; one alone isn't wrapped in a tuple."""
    return results[0] if len(node.outputs) == 1 else results[: len(node.outputs)]
