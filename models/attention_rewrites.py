"""Attention as PyTorch's exporter writes it, brought into the form that engines know. They change the model given.

The exporter takes `scaled_dot_product_attention` apart into more nodes than it needs. Engines that recognise attention
by its nodes (DeepSparse does) then run each of them alone, several times slower.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnx_spdy.models.rewrites import inferred_shapes

LAST_SWAPPED = (0, 2, 1)
LARGEST_CONSTANT = 1 << 20  # values; a mask may be that large, and weights aren't asked for


def transpose_keys_at_once(model: onnx.ModelProto) -> None:
    """Transpose, Reshape to three axes, Transpose, Reshape to four: one Transpose does it.

    Matches keys that are reshaped from (batch, heads, n, d) to (-1, n, d), have their last axes swapped and are
    reshaped to (batch, heads, d, n), whether the sizes are constants or computed.
    """
    graph, shapes = _Graph(model), inferred_shapes(model)
    for node in model.graph.node:
        if node.op_type != "Reshape" or (swap := graph.maker(node.input[0], "Transpose")) is None:
            continue
        flat = graph.maker(swap.input[0], "Reshape")
        if flat is None or _permutation(swap) != LAST_SWAPPED:
            continue
        shape = shapes.get(flat.input[0], ())
        if len(shape) == 4 and graph.are_swapped(flat, node, shape):
            source, order = flat.input[0], tuple(range(4))
            if split := graph.maker(source, "Transpose"):
                source, order = split.input[0], _permutation(split)
            swapped = [*order[:2], order[3], order[2]]
            node.CopyFrom(helper.make_node("Transpose", [source], [node.output[0]], node.name, perm=swapped))
    _drop_unread(model)


def drop_guards_against_nan(model: onnx.ModelProto) -> None:
    """Softmax -> IsNaN -> Where(0): the guard for rows whose scores are all minus infinity goes where they can't be.

    That is where nothing is added to the scores, or something that is finite: a constant, or a choice of constants.
    """
    graph = _Graph(model)
    unguarded = {}
    for node in model.graph.node:
        if node.op_type != "Where" or (test := graph.maker(node.input[0], "IsNaN")) is None:
            continue
        softmax = graph.maker(node.input[2], "Softmax")
        zero = graph.constants.get(node.input[1])
        if softmax is None or zero is None or zero.any() or test.input[0] != node.input[2]:
            continue
        if graph.is_finite_score(softmax.input[0]):
            unguarded[node.output[0]] = node.input[2]
    for node in model.graph.node:
        node.input[:] = [unguarded.get(name, name) for name in node.input]
    _drop_unread(model)


class _Graph:
    """Who makes what."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._makers = {output: node for node in model.graph.node for output in node.output}
        self.constants: Mapping[str, np.ndarray] = {
            tensor.name: numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if prod(tensor.dims) <= LARGEST_CONSTANT
        }

    def maker(self, value: str, op: str) -> onnx.NodeProto | None:
        """The node that makes a value, if it is of that kind."""
        node = self._makers.get(value)
        return node if node is not None and node.op_type == op else None

    def are_swapped(self, flat: onnx.NodeProto, back: onnx.NodeProto, shape: tuple[int | None, ...]) -> bool:
        """Whether one Reshape makes (-1, n, d) of `shape`, and the other (*first two sizes of `shape`, d, n)."""
        one, other = self._sizes(flat.input[1]), self._sizes(back.input[1])
        if one is None or other is None or len(one) != 3 or one[0] != -1 or one[1:] != other[:-3:-1]:
            return False
        if len(other) == 4:
            return other[0] == -1 and (other[1], *one[1:]) == shape[1:]
        return len(other) == 3 and self._is_first_two(str(other[0]), flat.input[0])

    def _sizes(self, shape: str) -> list[int | str] | None:
        """The parts of a Reshape's target: numbers, and names of values where they are computed."""
        if shape in self.constants:
            return self.constants[shape].ravel().tolist()
        concat = self.maker(shape, "Concat")
        if concat is None:
            return None
        return [name if (size := self._integer(name)) is None else size for name in concat.input]

    def _integer(self, value: str) -> int | None:
        """The value of a constant that is one integer."""
        array = self.constants.get(value)
        return int(array.item()) if array is not None and array.size == 1 and array.dtype.kind == "i" else None

    def _is_first_two(self, sizes: str, of: str) -> bool:
        """Whether a value is `Shape(of)[:-2]`."""
        cut = self.maker(sizes, "Slice")
        shape = cut and self.maker(cut.input[0], "Shape")
        if cut is None or shape is None or shape.input[0] != of or len(cut.input) != 3:
            return False
        start, end = map(self._integer, cut.input[1:3])
        return start in (0, -(2**63)) and end == -2

    def is_finite_score(self, value: str) -> bool:
        """Whether a value is a product, or a product plus something finite."""
        if self.maker(value, "MatMul"):
            return True
        node = self.maker(value, "Add") or self.maker(value, "Mul") or self.maker(value, "Div")
        if node is None:
            return False
        parts = [self._is_finite(name) for name in node.input]
        return any(parts) and all(
            known or self.is_finite_score(name) for name, known in zip(node.input, parts, strict=True)
        )

    def _is_finite(self, value: str) -> bool:
        """Whether a value is a finite constant, or chosen from such; in half precision a sum with it may overflow."""
        choice = self.maker(value, "Where")
        arrays = [self.constants.get(name) for name in ([value] if choice is None else choice.input[1:])]
        return all(array is not None and array.dtype.itemsize >= 4 and np.isfinite(array).all() for array in arrays)


def _permutation(node: onnx.NodeProto) -> tuple[int, ...]:
    return next((tuple(item.ints) for item in node.attribute if item.name == "perm"), ())


def _drop_unread(model: onnx.ModelProto) -> None:
    """Take away nodes and initializers that nobody reads any more."""
    graph = model.graph
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if any(name in read for name in node.output):
            read.update(node.input)
            read.update(name for item in node.attribute if item.HasField("g") for name in _outer_reads(item.g))
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(kept) == len(graph.node):
        return
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _outer_reads(graph: onnx.GraphProto) -> list[str]:
    inner = [name for item in graph.node for attribute in item.attribute for name in _outer_reads(attribute.g)]
    return inner + [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
