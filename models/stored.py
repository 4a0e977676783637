"""Stored tensors and where their values are: in the message, or in a file that is mapped into memory when it is read.

A mapped tensor is one with external data whose location is an absolute path; only `load_model` makes it, after it has
looked at the file. Copies of a model then copy no weights. In a file that is written, locations are names beside it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnx_spdy.runtimes.errors import OnnxSpdyError

PART_BYTES = 1 << 24  # that are read at a time where nothing else is needed


class StoredError(OnnxSpdyError, ValueError):
    """The file with a tensor's values can't be read any more."""


@dataclass(frozen=True)
class Place:
    """Where a mapped tensor's values are: little-endian, in C order."""

    path: Path
    offset: int
    bytes: int


def is_mapped(tensor: TensorProto) -> bool:
    """Whether the values are in a file."""
    return tensor.data_location == TensorProto.EXTERNAL


def has_mapped(model: onnx.ModelProto) -> bool:
    """Whether some initializers of the model are mapped."""
    return any(is_mapped(tensor) for tensor in model.graph.initializer)


def place_of(tensor: TensorProto) -> Place:
    """Where the values of a mapped tensor are."""
    entry = {item.key: item.value for item in tensor.external_data}
    return Place(Path(entry["location"]), int(entry["offset"]), int(entry["length"]))


def put_in_file(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make the tensor one whose values are in a file."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=text)


def put_in_message(tensor: TensorProto, data: bytes) -> None:
    """Give the tensor these bytes as its values."""
    # Cleared, not set to the default: the model is then the same bytes as one that never had external data.
    tensor.ClearField("data_location")
    tensor.ClearField("external_data")
    tensor.raw_data = data


def read_into_message(tensor: TensorProto) -> None:
    """Make a mapped tensor one that has its values itself. Raises StoredError: as `values_of`."""
    put_in_message(tensor, b"".join(parts_of(tensor)))


def stored_bytes(tensor: TensorProto) -> int:
    """Size of the values as raw data; 0 where they are in another field."""
    return place_of(tensor).bytes if is_mapped(tensor) else len(tensor.raw_data)


def itemsize(tensor: TensorProto) -> int | None:
    """Bytes of one element; None for a type that NumPy has none for."""
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        return None


def values_of(tensor: TensorProto) -> np.ndarray:
    """The values, of a mapped tensor without reading them; what is written there stays in this array.

    Raises:
        StoredError: the file is gone, or shorter than it was.
    """
    if not is_mapped(tensor):
        return numpy_helper.to_array(tensor)
    place = _checked_place(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    skipped = place.offset % mmap.ALLOCATIONGRANULARITY
    try:
        with place.path.open("rb") as stream:
            mapped = mmap.mmap(
                stream.fileno(), place.bytes + skipped, access=mmap.ACCESS_COPY, offset=place.offset - skipped
            )
    except (OSError, ValueError) as exc:  # ValueError: beyond its end
        raise _unreadable(tensor, place) from exc
    array = np.frombuffer(mapped, dtype, prod(tensor.dims), skipped).reshape(tuple(tensor.dims))
    return np.require(array, requirements="A")


def parts_of(tensor: TensorProto) -> Iterator[bytes]:
    """The raw data piece by piece; a file is read, not mapped, so that no more than a piece is in memory.

    Raises:
        StoredError: as `values_of`.
    """
    if not is_mapped(tensor):
        yield tensor.raw_data
        return
    place = _checked_place(tensor)
    left = place.bytes
    try:
        with place.path.open("rb") as stream:
            stream.seek(place.offset)
            while left and (part := stream.read(min(PART_BYTES, left))):
                left -= len(part)
                yield part
    except OSError as exc:
        raise _unreadable(tensor, place) from exc
    if left:
        raise _unreadable(tensor, place)


def flat_parts_of(tensor: TensorProto) -> Iterator[np.ndarray]:
    """The values as one-dimensional arrays, piece by piece."""
    if not is_mapped(tensor):
        yield numpy_helper.to_array(tensor).reshape(-1)
        return
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    yield from (np.frombuffer(part, dtype) for part in parts_of(tensor))


def same_values(a: TensorProto, b: TensorProto) -> bool:
    """Whether two tensors of one type and shape have the same bits."""
    if is_mapped(a) or is_mapped(b):
        return stored_bytes(a) == stored_bytes(b) and _joined(a, b)
    return _value_bytes(a) == _value_bytes(b)


def _joined(a: TensorProto, b: TensorProto) -> bool:
    """Compare in pieces of one size, whichever of the two is in a file."""
    first, second = (parts_of(one) if is_mapped(one) else _pieces(one.raw_data) for one in (a, b))
    return all(x == y for x, y in zip(first, second, strict=True))


def _pieces(data: bytes) -> Iterator[memoryview]:
    return (memoryview(data)[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES))


def _value_bytes(tensor: TensorProto) -> bytes:
    return tensor.raw_data or numpy_helper.to_array(tensor).tobytes()


def _checked_place(tensor: TensorProto) -> Place:
    place = place_of(tensor)
    if not place.path.is_absolute():
        raise StoredError(f"the data of '{tensor.name}' is in another file: read the model with load_model")
    return place


def _unreadable(tensor: TensorProto, place: Place) -> StoredError:
    return StoredError(f"'{place.path}' with the data of '{tensor.name}' was changed or removed meanwhile; start again")
