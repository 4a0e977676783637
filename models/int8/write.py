"""Write a network in int8 as standard ONNX: QuantizeLinear and DequantizeLinear around what is quantised (QDQ).

The graph stays what it was, plus these nodes: node names, inputs and outputs are the same, and so is the order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_spdy.models import surgery
from onnx_spdy.models.int8.grid import Grid
from onnx_spdy.models.int8.place import Placement

WRITTEN = re.compile(r"_(de)?quantized(_\d+)?$")


@dataclass(frozen=True)
class IntegerWeight:
    """A weight on its grid.

    Attributes:
        values: int8, in the stored shape.
        scale: float32 (out,).
    """

    values: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Integers:
    """All the numbers that a network in int8 has.

    Attributes:
        activations: tensor -> its grid.
        weights: initializer -> its integers.
        int32_bias: whether biases are stored in the scale of the products.
    """

    activations: Mapping[str, Grid]
    weights: Mapping[str, IntegerWeight]
    int32_bias: bool = False


def write_int8(model: onnx.ModelProto, placement: Placement, integers: Integers) -> onnx.ModelProto:
    """A copy of the model that computes in int8.

    Args:
        model: in float32; left as it is.
        placement: of this model.
        integers: a grid for every point of the placement, integers for every weight.
    """
    written = onnx.ModelProto()
    written.CopyFrom(model)
    with surgery.edit(written) as graph:
        _Writer(graph, placement, integers).write()
    return written


def in_float(names: Iterable[str], known: Collection[str]) -> tuple[str, ...]:
    """The tensors of the network in floating point that tensors of the one in int8 stand for, each once.

    Args:
        names: of the one in int8.
        known: all those of the one in floating point.
    """
    plain = (name if name in known else WRITTEN.sub("", name) for name in names)
    return tuple(dict.fromkeys(name for name in plain if name in known))


class _Writer:
    """One graph as it is written."""

    def __init__(self, graph: gs.Graph, placement: Placement, integers: Integers) -> None:
        self._graph, self._placement, self._integers = graph, placement, integers
        self._nodes = {node.name: node for node in graph.nodes}
        self._tensors = graph.tensors()
        self._axes = {weight.name: weight.axis for weight in placement.weights}
        self._before: dict[str, list[gs.Node]] = {}  # node -> those that are put before it
        self._after: dict[str, list[gs.Node]] = {}  # node that makes a tensor, or "" for an input -> those after it

    def write(self) -> None:
        for weight in self._placement.weights:
            self._write_weight(weight.name, weight.axis, weight.nodes)
        if self._integers.int32_bias:
            for bias, (tensor, name) in self._placement.biases.items():
                self._write_bias(bias, tensor, name)
        for tensor, readers in self._placement.points.items():
            self._write_point(tensor, readers)
        nodes = [*self._after.get("", [])]
        for node in self._graph.nodes:
            nodes += [*self._before.get(node.name, []), node, *self._after.get(node.name, [])]
        self._graph.nodes = nodes

    def _constant(self, name: str, values: np.ndarray) -> gs.Constant:
        number, unique = 0, name
        while unique in self._tensors:
            number += 1
            unique = f"{name}_{number}"
        self._tensors[unique] = constant = gs.Constant(unique, values)
        return constant

    def _variable(self, name: str) -> gs.Variable:
        number, unique = 0, name
        while unique in self._tensors:
            number += 1
            unique = f"{name}_{number}"
        self._tensors[unique] = variable = gs.Variable(unique, np.float32)
        return variable

    def _write_weight(self, name: str, axis: int, readers: tuple[str, ...]) -> None:
        integer = self._integers.weights[name]
        result = self._dequantize(name, self._constant(f"{name}_int8", integer.values), integer.scale, np.int8, axis)
        first = next(node.name for node in self._graph.nodes if node.name in readers)
        self._before.setdefault(first, []).append(result.inputs[0])
        for reader in readers:
            self._nodes[reader].inputs[1] = result

    def _write_bias(self, name: str, tensor: str, weight: str) -> None:
        readers = [node for node in self._graph.nodes if node.inputs[2:3] and node.inputs[2].name == name]
        if len(readers) != 1 or self._integers.activations[tensor].axis is not None:
            return  # it has no one scale
        bias = self._tensors[name]
        scale = self._integers.activations[tensor].scale * self._integers.weights[weight].scale
        integers = np.clip(np.round(bias.values.astype(np.float64) / scale), -(2**31), 2**31 - 1).astype(np.int32)
        result = self._dequantize(name, self._constant(f"{name}_int32", integers), scale, np.int32, 0)
        self._before.setdefault(readers[0].name, []).append(result.inputs[0])
        readers[0].inputs[2] = result

    def _dequantize(self, name: str, integers: gs.Tensor, scale: np.ndarray, dtype: type, axis: int) -> gs.Variable:
        result = self._variable(f"{name}_dequantized")
        inputs = [integers, self._constant(f"{name}_scale", scale.astype(np.float32)),
                  self._constant(f"{name}_zero", np.zeros(scale.shape, dtype))]  # fmt: skip
        gs.Node("DequantizeLinear", f"{name}_dequantize", {"axis": axis}, inputs, [result])
        return result

    def _write_point(self, name: str, readers: tuple[tuple[str, int], ...]) -> None:
        tensor, grid = self._tensors[name], self._integers.activations[name]
        scale, zero = self._constant(f"{name}_scale", grid.scale), self._constant(f"{name}_zero", grid.zeros)
        integers, result = self._variable(f"{name}_quantized"), self._variable(f"{name}_dequantized")
        integers.dtype = grid.dtype
        axis = {} if grid.axis is None else {"axis": grid.axis}
        quantize = gs.Node("QuantizeLinear", f"{name}_quantize", dict(axis), [tensor, scale, zero], [integers])
        back = gs.Node("DequantizeLinear", f"{name}_dequantize", dict(axis), [integers, scale, zero], [result])
        for reader, number in readers:
            self._nodes[reader].inputs[number] = result
        maker = tensor.inputs[0].name if tensor.inputs else ""
        self._after.setdefault(maker, []).extend([quantize, back])
