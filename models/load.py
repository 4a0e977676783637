"""Read an ONNX file, and find out before anything works with it whether it is what it says: texts, data, numbers.

The large weights of a large model can stay in their file, to be mapped into memory when they are used.
"""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, numpy_helper

from onnx_spdy.models.graph import FLOATS, ModelError, all_tensors, check_interface, check_model, node_names
from onnx_spdy.models.limits import check_limits
from onnx_spdy.models.stored import (
    flat_parts_of,
    is_mapped,
    itemsize,
    put_in_file,
    read_into_message,
    stored_bytes,
)

# An infinite value in one of their parameters can only be damage; in a mask that is added to something it is meant.
PARAMETRIC = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization", "InstanceNormalization"}
)
MULTIPLYING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# The error that pruning a weight makes goes with its square.
LARGEST_WEIGHT = float(np.sqrt(np.finfo(np.float32).max))
# In a model of more external data than this, initializers of this size and more can be mapped.
LARGE_MODEL_BYTES = 1 << 28
MAPPED_BYTES = 1 << 20


def load_model(path: str | os.PathLike[str], *, mapped: bool = False) -> onnx.ModelProto:
    """Read an ONNX file and check it.

    Args:
        path: the file.
        mapped: leave large external weights where they are, if there are more than 256 MiB of external data; see
            `stored.py`. Otherwise all data is in memory.
    Raises:
        ModelError: no such file, not an ONNX model, a model without nodes, external data that is missing or lies
            outside the model's folder, text that is no UTF-8, tensors without the data that their shape promises, a
            model that `onnx.checker` refuses, inputs or outputs that are no tensors, tensors or loops beyond all
            measure, strides of 0, or NaN, infinite or enormous weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no such model file: {path}{', it is a folder' if path.is_dir() else ''}")
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, OSError) as exc:
        raise ModelError(f"{path} is not a readable ONNX file (damaged, truncated or of another kind): {exc}") from exc
    if not model.graph.node:
        raise ModelError(f"{path} holds no graph with nodes: it is not an ONNX model, or an empty one")
    if model.graph.sparse_initializer:
        raise ModelError(f"{path} holds sparse initializers, which runtimes turn into dense ones: store them dense")
    _check_texts(model, str(path))
    left = _left_in_file(model) if mapped else set()
    for number, tensor in enumerate(all_tensors(model)):
        if tensor.data_location == TensorProto.EXTERNAL:
            _find_external(tensor, path)
            if number not in left:
                read_into_message(tensor)
        _check_size(tensor, str(path))
    check_model(model, str(path))
    check_interface(model, str(path))
    check_limits(model, str(path))
    _check_finite(model, str(path))
    return model


def _left_in_file(model: onnx.ModelProto) -> set[int]:
    """The numbers of the initializers that are large enough to be mapped, in a model that is; of `all_tensors`."""
    sizes = {
        number: (itemsize(tensor) or 0) * prod(tensor.dims)
        for number, tensor in enumerate(model.graph.initializer)
        if tensor.data_location == TensorProto.EXTERNAL and tensor.data_type not in _PACKED
    }
    large = sum(sizes.values()) > LARGE_MODEL_BYTES
    return {number for number, size in sizes.items() if size >= MAPPED_BYTES} if large else set()


def _check_texts(model: onnx.ModelProto, name: str) -> None:
    """Raise ModelError for names and other texts that are no UTF-8: protobuf finds out only when they are read."""
    try:
        _read_texts(model)
    except UnicodeDecodeError as exc:
        raise ModelError(f"{name} is damaged: it holds text that is no UTF-8 ({exc.reason})") from exc


def _read_texts(message: Message) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            value = getattr(message, field.name)
            for text in [value] if isinstance(value, str | bytes) else value:
                if isinstance(text, bytes):  # what some versions of protobuf give instead of an error
                    text.decode()
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            value = getattr(message, field.name)
            if isinstance(value, Message):
                if message.HasField(field.name):
                    _read_texts(value)
            else:
                for item in value:
                    _read_texts(item)


def _check_size(tensor: TensorProto, name: str) -> None:
    """Raise ModelError unless the tensor holds exactly the data that its shape and element type promise."""
    wrong = None
    if any(size < 0 for size in tensor.dims):
        wrong = "negative sizes"
    elif tensor.HasField("raw_data") or is_mapped(tensor):
        width = itemsize(tensor)
        if width is None:
            return  # onnx.checker says what it thinks of this type
        size = stored_bytes(tensor)
        # Types of less than a byte share bytes; the checker knows how.
        if width * prod(tensor.dims) != size and tensor.data_type not in _PACKED:
            wrong = f"{size} bytes, not {width * prod(tensor.dims)}"
    elif tensor.data_type in FLOATS:
        try:
            numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as exc:
            wrong = f"other data ({exc})"
    if wrong:
        raise ModelError(
            f"{name} is damaged: tensor '{tensor.name}' of shape {tuple(tensor.dims)} has {wrong}; export it again"
        )


_PACKED = frozenset(
    value
    for name, value in TensorProto.DataType.items()
    if name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2", "STRING")
)


def _find_external(tensor: TensorProto, path: Path) -> None:
    """Make a reference to a file in the model's folder one to where it really is, with offset and length."""
    entry = {item.key: item.value for item in tensor.external_data}
    location, offset, length = entry.get("location", ""), entry.get("offset", "0"), entry.get("length", "")
    folder = path.parent.resolve()
    if "\0" in location:
        raise ModelError(f"{path}: tensor '{tensor.name}' refers to a file whose name holds a zero byte")
    file = (folder / location).resolve()
    if not location or not file.is_relative_to(folder):
        raise ModelError(f"{path}: tensor '{tensor.name}' refers to '{location}', outside the model's folder; refused")
    if not file.is_file():
        raise ModelError(f"{path}: the file '{location}' with the data of '{tensor.name}' is missing beside the model")
    if not offset.isdecimal() or not (length.isdecimal() or not length):
        raise ModelError(f"{path}: tensor '{tensor.name}' has offset '{offset}' and length '{length}' in '{location}'")
    try:
        with file.open("rb"):  # somebody else's
            available = max(file.stat().st_size - int(offset), 0)
    except OSError as exc:
        raise ModelError(f"{path}: cannot read '{location}': {exc.strerror or exc}") from exc
    if length and available < int(length):
        raise ModelError(f"{path}: '{location}' is cut off: '{tensor.name}' needs {length} bytes at {offset}")
    put_in_file(tensor, str(file), int(offset), int(length) if length else available)


def _check_finite(model: onnx.ModelProto, name: str) -> None:
    readers: dict[str, tuple[str, bool]] = {}  # parameter -> a node that computes with it, and whether it multiplies
    for node, node_name in zip(model.graph.node, node_names(model.graph), strict=True):
        if node.op_type in PARAMETRIC:
            for position, key in enumerate(node.input):
                readers[key] = node_name, position < 2 and node.op_type in MULTIPLYING
    for tensor in model.graph.initializer:
        if tensor.data_type not in FLOATS:
            continue
        reader, multiplies = readers.get(tensor.name, ("", False))
        bad, largest = 0, 0.0
        for values in flat_parts_of(tensor):
            values = values.astype(np.float64 if tensor.data_type == TensorProto.DOUBLE else "f4", copy=False)
            bad += np.count_nonzero(~np.isfinite(values) if reader else np.isnan(values))
            largest = max(largest, float(np.abs(values).max(initial=0.0)) if multiplies else 0.0)
        if bad:
            raise ModelError(
                f"{name}: {bad} of {prod(tensor.dims)} values of '{tensor.name}' are NaN or infinite; "
                "a network with such weights can't be pruned: export a sound checkpoint"
            )
        if largest > LARGEST_WEIGHT:
            raise ModelError(
                f"{name}: layer '{reader}' multiplies by a weight of {largest:.1e} in '{tensor.name}'; more than "
                f"{LARGEST_WEIGHT:.1e} overflows in float32 when it is squared: export a sound checkpoint"
            )
