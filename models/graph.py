"""An ONNX graph as a value: read and checked, asked for its inputs, hashed, written.

Errors:

    ModelError(ValueError)            everything that is wrong with a model that a user gave
    ├── UnsupportedOperator           TorchGraph has no function for an operator
    └── GroupError                    a group that doesn't exist or can't shrink, or units that it doesn't have
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from onnx_spdy.models.stored import has_mapped, parts_of, put_in_file, stored_bytes
from onnx_spdy.runtimes.atomic import replacing
from onnx_spdy.runtimes.batch_axes import batch_axes, dimensions
from onnx_spdy.runtimes.batch_axes import fixed_batch as batch_of_inputs
from onnx_spdy.runtimes.errors import OnnxSpdyError

# A protobuf message can't be larger than 2 GiB; weights of larger models go to a second file.
LARGEST_PROTOBUF_BYTES = 2**31 - 1
# Shape inference reads small tensors (shapes, axes), so only larger ones are ever set aside.
LARGE_TENSOR_BYTES = 1024

# Of the operators into which ONNX Runtime's optimiser (and Optimum's, Olive's, which use it) fuses others.
OPTIMISER_DOMAINS = ("com.microsoft", "com.ms.")

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


class ModelError(OnnxSpdyError, ValueError):
    """Something is wrong with a model; the message is one line that says what, and what to do."""


class UnsupportedOperator(ModelError):
    """TorchGraph has no function for an operator, or not for the form in which the graph uses it."""


def save_model(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write `model` to `path` in one step: a reader sees the old file or the new one, never half of it.

    The bytes depend on the model alone. Above 2 GiB, and where weights are mapped, they go to `<name>.data` in the same
    folder, piece by piece, which is replaced just before the model itself.

    Raises:
        ModelError: the folder doesn't exist or can't be written.
    """
    path = Path(path)
    try:
        if fits_in_message(model):
            write_whole(path, [model.SerializeToString(deterministic=True)])
            return
        outline, large = set_data_aside(model, data_file(path).name)
        write_whole(data_file(path), (part for tensor in large for part in parts_of(tensor)))
        write_whole(path, [outline.SerializeToString(deterministic=True)])
    except OSError as exc:
        raise ModelError(f"cannot write the model to {path}: {exc.strerror or exc}") from exc


def data_file(path: Path) -> Path:
    """The file beside a model that holds its large weights."""
    return path.with_name(f"{path.name}.data")


def fits_in_message(model: onnx.ModelProto) -> bool:
    """Whether the model is one protobuf message with all its data."""
    return data_bytes(model) <= LARGEST_PROTOBUF_BYTES and not has_mapped(model)


def model_sha256(model: onnx.ModelProto) -> str:
    """Hexadecimal sha256 of everything in the model, whatever its size and wherever it was stored."""
    outline, large = set_data_aside(model, "data")
    digest = hashlib.sha256(outline.SerializeToString(deterministic=True))
    for tensor in large:
        for part in parts_of(tensor):
            digest.update(part)
    return digest.hexdigest()


def outline_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large initializers have a shape but no data: cheap, and enough to infer shapes."""
    return set_data_aside(model, "data")[0]


def data_bytes(model: onnx.ModelProto) -> int:
    """About the size of the model as one protobuf message: its tensors, and an allowance for each node."""
    return sum(map(stored_bytes, all_tensors(model))) + 1024 * len(model.graph.node)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators; 1 where the file names none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def check_model(model: onnx.ModelProto, name: str) -> None:
    """Let `onnx.checker` look at the model; `name` stands for it in the message of the ModelError."""
    # Large data can't be given to the checker; what it has to say about the structure stays the same.
    subject = model if fits_in_message(model) else without_large_data(model, LARGE_TENSOR_BYTES)
    try:
        onnx.checker.check_model(subject)
    except onnx.checker.ValidationError as exc:
        raise ModelError(f"{name} is not a valid ONNX model: {one_line(str(exc))}") from exc
    except UnicodeDecodeError as exc:  # the checker quotes a text of the model that is none
        raise ModelError(f"{name} is damaged: it holds text that is no UTF-8 ({exc.reason})") from exc


def check_interface(model: onnx.ModelProto, name: str) -> None:
    """Raise ModelError for inputs and outputs that are no tensors; `name` stands for the model in the message."""
    kinds = {"sequence_type": "a sequence", "map_type": "a map", "optional_type": "optional"}
    for role, values in (("input", graph_inputs(model)), ("output", model.graph.output)):
        for value in values:
            kind = value.type.WhichOneof("value")
            if kind != "tensor_type":
                maps = any(node.op_type == "ZipMap" and value.name in node.output for node in model.graph.node)
                raise ModelError(
                    f"{role} '{value.name}' of {name} is {kinds.get(str(kind), 'of another kind')}, not a tensor: "
                    + ("convert the classifier with zipmap=False" if maps else "export the network with tensors there")
                )


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller has to give: graph inputs that are no initializers."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Shape of each input, None for a dimension that is open."""
    return {value.name: tuple(_size(dim) for dim in dimensions(value)) for value in graph_inputs(model)}


def input_dtypes(model: onnx.ModelProto) -> dict[str, np.dtype]:
    """Element type of each input."""
    return {
        value.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        for value in graph_inputs(model)
    }


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The batch that the graph's inputs fix; None if it is open."""
    return batch_of_inputs(graph_inputs(model))


def input_axes(model: onnx.ModelProto) -> dict[str, int | None]:
    """The axis of each input on which samples lie; None where it has none. See `batch_axes`."""
    return batch_axes(graph_inputs(model))


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node: branches of an If, the body of a Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def captured_names(graph: onnx.GraphProto) -> list[str]:
    """What a graph inside a node, or one inside that, reads from the graphs around it."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {name for node in graph.node for name in node.output}
    read = [name for node in graph.node for name in node.input]
    read += [name for node in graph.node for inner in inner_graphs(node) for name in captured_names(inner)]
    read += [value.name for value in graph.output]
    return list(dict.fromkeys(name for name in read if name and name not in own))


def names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """What the nodes of a graph and the graphs inside them read, and its outputs; once for each time."""
    for node in graph.node:
        yield from node.input
        for inner in inner_graphs(node):
            yield from captured_names(inner)
    yield from (value.name for value in graph.output)


def node_names(graph: onnx.GraphProto) -> list[str]:
    """A unique name for each node: its own, or one made from its operator and first output.

    The names don't depend on a node's position, so they stay when other parts of the graph change.
    """
    taken = {node.name for node in graph.node}
    used: set[str] = set()
    names = []
    for node in graph.node:
        name = node.name or f"{node.op_type}_{next(iter(node.output), '')}"
        if name in used or (not node.name and name in taken):
            count = 2
            while f"{name}_{count}" in taken or f"{name}_{count}" in used:
                count += 1
            name = f"{name}_{count}"
        used.add(name)
        names.append(name)
    return names


def one_line(text: str, limit: int = 400) -> str:
    """`text` with its line breaks and runs of blanks replaced by single blanks, cut at `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    # Some exporters write 0 or -1 for an open dimension.
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None


def all_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model: initializers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        yield from attribute.tensors
    for graph in inner_graphs(node):
        yield from _graph_tensors(graph)


def without_large_data(
    model: onnx.ModelProto, smallest_bytes: int, names: Collection[str] | None = None
) -> onnx.ModelProto:
    """A copy whose initializers of `smallest_bytes` and more are graph inputs, so that it has a shape but no data.

    Where `names` is given, only those of them.
    """
    outline, large = set_data_aside(model, "data", smallest_bytes, names)
    known = {value.name for value in outline.graph.input}
    gone = {tensor.name for tensor in large}
    kept = [tensor for tensor in outline.graph.initializer if tensor.name not in gone]
    for tensor in large:
        if tensor.name not in known:
            outline.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del outline.graph.initializer[:]
    outline.graph.initializer.extend(kept)
    return outline


def set_data_aside(
    model: onnx.ModelProto, location: str, smallest_bytes: int | None = None, names: Collection[str] | None = None
) -> tuple[onnx.ModelProto, list[TensorProto]]:
    """The model with its large initializers as external data at `location`, and those initializers in order.

    Large are those of `smallest_bytes` and more; where `names` is given, only those of them.
    """
    smallest_bytes = LARGE_TENSOR_BYTES if smallest_bytes is None else smallest_bytes
    outline = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(outline, field, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(outline.graph, field, value)
    large: list[TensorProto] = []
    offset = 0
    for tensor in model.graph.initializer:
        size = stored_bytes(tensor)
        if size < smallest_bytes or (names is not None and tensor.name not in names):
            outline.graph.initializer.add().CopyFrom(tensor)
            continue
        reference = outline.graph.initializer.add()
        for field, value in tensor.ListFields():
            if field.name not in ("raw_data", "external_data", "data_location"):
                _copy_field(reference, field, value)
        put_in_file(reference, location, offset, size)
        large.append(tensor)
        offset += size
    return outline, large


def _copy_field(target, field, value) -> None:
    if hasattr(value, "CopyFrom"):
        getattr(target, field.name).CopyFrom(value)
    elif hasattr(value, "extend"):
        getattr(target, field.name).extend(value)
    else:
        setattr(target, field.name, value)


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file in one step. Raises OSError."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder doesn't exist", str(path.parent))
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.writelines(parts)
