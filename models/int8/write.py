"""Write a network in int8 as standard ONNX: QuantizeLinear and DequantizeLinear around what is quantised (QDQ).

The graph stays what it was, plus these nodes: node names, inputs and outputs are the same, and so is the order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_spdy.models import surgery
from onnx_spdy.models.int8.grid import Grid
from onnx_spdy.models.int8.place import Placement, Weight

LARGEST_BIAS = 2**31 - 1
LEAST_SCALE = float(np.finfo(np.float32).tiny)
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
        self._names = {*self._nodes, *self._tensors}  # and those inside of nodes, which must not be hidden
        self._names |= {name for one in graph.subgraphs(recursive=True) for name in one.tensors()}
        self._axes = {weight.name: weight.axis for weight in placement.weights}
        self._own: dict[str, IntegerWeight] = {}  # layer -> its weight, where that isn't what others have
        self._biases = self._int32_biases() if integers.int32_bias else {}
        self._before: dict[str, list[gs.Node]] = {}  # node -> those that are put before it
        self._after: dict[str | None, list[gs.Node]] = {}  # node that makes a tensor, None for an input -> those after

    def write(self) -> None:
        for bias, (step, name, reader) in self._biases.items():
            values = self._tensors[bias].values
            beside = _beside(self._integers.weights[name], self._axes[name], step * LARGEST_BIAS, values)
            if beside is not self._integers.weights[name]:
                self._own[reader.name] = beside
        for weight in self._placement.weights:
            if shared := [name for name in weight.nodes if name not in self._own]:
                self._write_weight(weight, self._integers.weights[weight.name], shared)
            for name in weight.nodes:
                if name in self._own:
                    self._write_weight(weight, self._own[name], [name])
        for bias, (step, name, reader) in self._biases.items():
            self._write_bias(bias, step, self._own.get(reader.name, self._integers.weights[name]), reader)
        for tensor, readers in self._placement.points.items():
            self._write_point(tensor, readers)
        nodes = [*self._after.get(None, [])]
        for node in self._graph.nodes:
            nodes += [*self._before.get(node.name, []), node, *self._after.get(node.name, [])]
        self._graph.nodes = nodes

    def _int32_biases(self) -> dict[str, tuple[float, str, gs.Node]]:
        """Bias -> the step of the layer's input, its weight, and the layer; of those whose input has one scale."""
        readers: dict[str, list[gs.Node]] = {}
        for node in self._graph.nodes:
            for tensor in node.inputs[2:3]:
                readers.setdefault(tensor.name, []).append(node)
        found = {}
        for bias, (tensor, weight) in self._placement.biases.items():
            grid = self._integers.activations[tensor]
            if len(readers[bias]) == 1 and grid.axis is None:
                found[bias] = float(grid.scale), weight, readers[bias][0]
        return found

    def _unique(self, name: str) -> str:
        number, unique = 0, name
        while unique in self._names:
            number += 1
            unique = f"{name}_{number}"
        self._names.add(unique)
        return unique

    def _constant(self, name: str, values: np.ndarray) -> gs.Constant:
        return gs.Constant(self._unique(name), values)

    def _variable(self, name: str) -> gs.Variable:
        return gs.Variable(self._unique(name), np.float32)

    def _write_weight(self, weight: Weight, integer: IntegerWeight, readers: Collection[str]) -> None:
        values = self._constant(f"{weight.name}_int8", integer.values)
        result = self._dequantize(weight.name, values, integer.scale, np.int8, weight.axis)
        first = next(node.name for node in self._graph.nodes if node.name in readers)
        self._before.setdefault(first, []).append(result.inputs[0])
        for reader in readers:
            self._nodes[reader].inputs[1] = result

    def _write_bias(self, name: str, step: float, weight: IntegerWeight, reader: gs.Node) -> None:
        scale = np.maximum(step * weight.scale.astype(np.float64), LEAST_SCALE)
        integers = np.round(self._tensors[name].values.astype(np.float64) / scale)
        integers = np.clip(integers, -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
        result = self._dequantize(name, self._constant(f"{name}_int32", integers), scale, np.int32, 0)
        self._before.setdefault(reader.name, []).append(result.inputs[0])
        reader.inputs[2] = result

    def _dequantize(self, name: str, integers: gs.Tensor, scale: np.ndarray, dtype: type, axis: int) -> gs.Variable:
        result = self._variable(f"{name}_dequantized")
        inputs = [integers, self._constant(f"{name}_scale", scale.astype(np.float32)),
                  self._constant(f"{name}_zero", np.zeros(scale.shape, dtype))]  # fmt: skip
        gs.Node("DequantizeLinear", self._unique(f"{name}_dequantize"), {"axis": axis}, inputs, [result])
        return result

    def _write_point(self, name: str, readers: tuple[tuple[str, int], ...]) -> None:
        tensor, grid = self._tensors[name], self._integers.activations[name]
        steps, integers = self._steps(name, grid), self._variable(f"{name}_quantized")
        integers.dtype = grid.dtype
        own = self._unique(f"{name}_quantize")
        nodes = [gs.Node("QuantizeLinear", own, _axis_of(grid), [tensor, *steps], [integers])]
        apart = self._placement.apart.get(name)
        if together := [reader for reader in readers if apart is None or reader not in apart.readers]:
            nodes.append(self._read_back(name, integers, grid, steps, together))
        if apart:
            # The same numbers by the same scale, once for each channel: engines then leave the readers' weights alone.
            by_channel = replace(grid, scale=np.full(apart.channels, grid.scale, np.float32), axis=apart.axis)
            steps = self._steps(name, by_channel)
            nodes.append(self._read_back(name, integers, by_channel, steps, apart.readers))
        maker = tensor.inputs[0].name if tensor.inputs else None
        self._after.setdefault(maker, []).extend(nodes)

    def _steps(self, name: str, grid: Grid) -> list[gs.Constant]:
        """The scale and the zero point."""
        return [self._constant(f"{name}_scale", grid.scale), self._constant(f"{name}_zero", grid.zeros)]

    def _read_back(
        self,
        name: str,
        integers: gs.Variable,
        grid: Grid,
        steps: Collection[gs.Constant],
        readers: Iterable[tuple[str, int]],
    ) -> gs.Node:
        """The node that makes numbers of integers for these readers."""
        result, own = self._variable(f"{name}_dequantized"), self._unique(f"{name}_dequantize")
        for reader, number in readers:
            self._nodes[reader].inputs[number] = result
        return gs.Node("DequantizeLinear", own, _axis_of(grid), [integers, *steps], [result])


def _axis_of(grid: Grid) -> dict[str, int]:
    """The nodes' attribute."""
    return {} if grid.axis is None else {"axis": grid.axis}


def _beside(weight: IntegerWeight, axis: int, largest: float, bias: np.ndarray) -> IntegerWeight:
    """A weight on a grid so coarse that the bias of each channel fits into 32 bits beside it.

    It is coarser only where the weights hardly count: one step of the bias is 2^-31 of it there.

    Args:
        largest: bias that fits where the scale is 1.
        bias: (out,)
    """
    least = np.nextafter((np.abs(bias.astype(np.float64)) / largest).astype(np.float32), np.float32(np.inf))
    if (scale := np.maximum(weight.scale, least)).tolist() == weight.scale.tolist():
        return weight
    others = tuple(number for number in range(weight.values.ndim) if number != axis)
    values = np.round(weight.values * np.expand_dims(weight.scale / scale, others)).astype(np.int8)
    return replace(weight, values=values, scale=scale)
