"""Damage to a model file: bytes flipped, cut out, doubled; fields with values that they shouldn't have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

from onnx_spdy.tools.fuzz.graphs import with_external_data

DATA_FILE = "weights.bin"
NUMBERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 1000, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
NAMES = ("", "x", "y", "/", "../../outside", "a\nb", "\N{SNOWMAN}" * 3, "n" * 5000)


@dataclass(frozen=True)
class Files:
    """A model's file and the second one with its larger tensors, if it has one."""

    model: bytes
    data: bytes | None = None


def damaged(model: onnx.ModelProto, rng: np.random.Generator) -> Files:
    """A damaged copy, one in four with external data."""
    copied, data = onnx.ModelProto(), None
    copied.CopyFrom(model)
    if rng.random() < 0.25:
        copied, data = with_external_data(copied, DATA_FILE)
    if data and rng.random() < 0.25:
        return Files(copied.SerializeToString(), damaged_bytes(data, rng))
    if rng.random() < 0.5:
        return Files(damaged_bytes(copied.SerializeToString(), rng), data)
    return Files(damaged_fields(copied, rng).SerializeToString(), data)


def damaged_fields(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The same network, with one to three of its fields changed."""
    for _ in range(int(rng.integers(1, 4))):
        _FIELDS[int(rng.integers(len(_FIELDS)))](model, rng)
    return model


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """With some bits flipped, a byte replaced, a part left out or doubled, or the end cut off."""
    values, kind = bytearray(data), rng.integers(5)
    start = int(rng.integers(len(values)))
    # Weights are most of a file, and a changed weight is no damage: half of the places are near the structure's text.
    if rng.random() < 0.5:
        text = [i for i, byte in enumerate(values[:-1]) if byte == 0x0A] or [start]
        start = min(text[int(rng.integers(len(text)))] + int(rng.integers(4)), len(values) - 1)
    length = int(rng.integers(1, 1 + min(200, len(values) - start)))
    if kind == 0:
        for _ in range(int(rng.integers(1, 20))):
            values[int(rng.integers(len(values)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        values[start] = int(rng.integers(256))
    elif kind == 2:
        del values[start : start + length]
    elif kind == 3:
        values[start:start] = values[start : start + length]
    else:
        del values[start:]
    return bytes(values)


def _any(items, rng: np.random.Generator):
    return items[int(rng.integers(len(items)))]


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for item in node.attribute:
            if item.type == AttributeProto.GRAPH:
                yield from _graphs(item.g)


def _nodes(model: onnx.ModelProto) -> list[NodeProto]:
    """All nodes, also those of subgraphs and functions."""
    inside = [node for function in model.functions for node in function.node]
    return [node for graph in _graphs(model.graph) for node in graph.node] + inside


def _size_of_value(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    dims = _any([*model.graph.input, *model.graph.output], rng).type.tensor_type.shape.dim
    if dims:
        _any(dims, rng).dim_value = _any(NUMBERS, rng)


def _size_of_tensor(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    dims = _any(model.graph.initializer, rng).dims
    if dims:
        dims[int(rng.integers(len(dims)))] = _any(NUMBERS, rng)


def _numbers_of_tensor(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _any(model.graph.initializer, rng)
    dtype = _NUMBER_TYPES.get(tensor.data_type)
    if dtype is None or not tensor.raw_data or len(tensor.raw_data) % dtype.itemsize:
        return
    array = np.frombuffer(tensor.raw_data, dtype).copy()
    array[int(rng.integers(array.size))] = _any(NUMBERS if dtype.kind == "i" else (np.nan, np.inf, 6e4), rng)
    tensor.raw_data = array.tobytes()


_NUMBER_TYPES: dict[int, np.dtype] = {
    TensorProto.INT64: np.dtype(np.int64),
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
}


def _type_of_tensor(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    _any(model.graph.initializer, rng).data_type = int(rng.integers(-1, 40))


def _external_data(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _any(model.graph.initializer, rng)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("external_data")
    location = _any(
        ("../model.onnx", "/etc/passwd", "missing", "model.onnx", "", ".", "a\0b", "/dev/zero", DATA_FILE), rng
    )
    for key, value in (("location", location), ("offset", _any(NUMBERS, rng)), ("length", _any(NUMBERS, rng))):
        if rng.random() < 0.8:
            tensor.external_data.add(key=key, value=str(value))


def _name_of_edge(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A node reads or writes another value: cycles, duplicates, values from nowhere."""
    node = _any(_nodes(model), rng)
    names = node.input if rng.random() < 0.5 else node.output
    every = [name for other in _nodes(model) for name in (*other.input, *other.output)]
    if names:
        names[int(rng.integers(len(names)))] = _any([*every, *NAMES], rng)


def _name(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = _any(list(_graphs(model.graph)), rng)
    _any([*graph.node, *graph.initializer, *graph.input, *graph.output], rng).name = _any(NAMES, rng)


def _operator(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    nodes = _nodes(model)
    node = _any(nodes, rng)
    node.op_type = _any(["Loop", "If", "Nothing", "", "Resize", "Tile", "Range", *(n.op_type for n in nodes)], rng)


def _attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    attributes = [item for node in _nodes(model) for item in node.attribute]
    item = _any(attributes, rng)
    if item.ints:
        item.ints[int(rng.integers(len(item.ints)))] = _any(NUMBERS, rng)
    elif rng.random() < 0.5:
        item.i = _any(NUMBERS, rng)
    else:
        item.type = int(rng.integers(0, 15))


def _repeated(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = _any(list(_graphs(model.graph)), rng)
    items = _any([graph.node, graph.initializer, graph.input, graph.output], rng)
    if items and rng.random() < 0.5:
        items.add().CopyFrom(_any(items, rng))
    elif items:
        del items[int(rng.integers(len(items)))]


def _versions(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:
        model.ir_version = _any(NUMBERS, rng)
    elif rng.random() < 0.5:
        model.opset_import[0].version = _any((*NUMBERS, 7, 11, 13, 23), rng)
    else:
        model.opset_import[0].domain = _any(NAMES, rng)


_FIELDS: list[Callable[[onnx.ModelProto, np.random.Generator], None]] = [
    _size_of_value, _size_of_tensor, _numbers_of_tensor, _type_of_tensor, _external_data, _name_of_edge, _name,
    _operator, _attribute, _repeated, _versions,
]  # fmt: skip
