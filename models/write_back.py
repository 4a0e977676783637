"""Put new weights into a graph, and show that nothing else in it changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from onnx_spdy.models.graph import FLOATS, ModelError, data_file, set_data_aside, write_whole
from onnx_spdy.models.stored import is_mapped, parts_of, place_of, put_in_file, put_in_message, same_values
from onnx_spdy.runtimes.atomic import replacing

# Where a tensor keeps its elements, depending on its type and on who wrote the file.
DATA_FIELDS = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


def write_weights(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy of the model in which only these initializers have new values.

    Zeros stay exact zeros, and everything else stays byte for byte.

    Args:
        model: left as it is.
        weights: initializer name -> values with its shape; converted to its element type.
    Raises:
        ModelError: no such floating initializer, another shape, or NaN or infinite values (after the conversion).
    """
    written = onnx.ModelProto()
    written.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in written.graph.initializer}
    for name, values in weights.items():
        if name not in stored:
            raise ModelError(f"the graph has no initializer '{name}'")
        data = new_data(stored[name], values)
        for field in DATA_FIELDS:
            stored[name].ClearField(field)
        put_in_message(stored[name], data)
    return written


@contextlib.contextmanager
def writing(model: onnx.ModelProto, weights: Mapping[str, np.ndarray], path: Path) -> Iterator[onnx.ModelProto]:
    """`write_weights` and `save_model` of a model whose weights are mapped, one weight after the other.

    The weights are in `<name>.data` then. In the block they are in a temporary file, and the model to look at maps it;
    both files are replaced when the block ends well.

    Args:
        model, weights: as in `write_weights`; each is asked for once.
        path: of the new file.
    Raises:
        ModelError: as `write_weights` and `save_model`.
    """
    outline, large = set_data_aside(model, data_file(path).name)
    outline = write_weights(outline, {name: weights[name] for name in weights.keys() - {one.name for one in large}})
    try:
        with replacing(data_file(path)) as temporary:
            with temporary.open("wb") as stream:
                for tensor in large:
                    new = tensor.name in weights
                    stream.writelines([new_data(tensor, weights[tensor.name])] if new else parts_of(tensor))
            yield moved_to(outline, temporary)
        write_whole(path, [outline.SerializeToString(deterministic=True)])
    except OSError as exc:
        raise ModelError(f"cannot write the model to {path}: {exc.strerror or exc}") from exc


def moved_to(model: onnx.ModelProto, file: Path) -> onnx.ModelProto:
    """A copy of a model with external data that maps it from this file."""
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    for tensor in filter(is_mapped, moved.graph.initializer):
        place = place_of(tensor)
        put_in_file(tensor, str(file.resolve()), place.offset, place.bytes)
    return moved


def new_data(tensor: TensorProto, values: np.ndarray) -> bytes:
    """The raw data with which an initializer has new values.

    Raises:
        ModelError: as `write_weights`.
    """
    name, values = tensor.name, np.asarray(values)
    if tensor.data_type not in FLOATS:
        raise ModelError(f"initializer '{name}' is {TensorProto.DataType.Name(tensor.data_type)}, not a weight")
    if values.shape != tuple(tensor.dims):
        raise ModelError(f"initializer '{name}' has shape {tuple(tensor.dims)}, the new values {values.shape}")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with np.errstate(over="ignore"):  # reported below, by name
        converted = np.ascontiguousarray(values, dtype=dtype).reshape(values.shape)
    if not np.isfinite(converted).all():
        raise ModelError(f"the new values of '{name}' are NaN or infinite as {np.dtype(dtype).name}")
    return _little_endian(converted)


def changed_initializers(dense: onnx.ModelProto, pruned: onnx.ModelProto) -> list[str]:
    """Names of the initializers that both have, with values that differ in any bit, in graph order."""
    others = {tensor.name: tensor for tensor in pruned.graph.initializer}
    return [
        tensor.name
        for tensor in dense.graph.initializer
        if tensor.name in others and not same_values(tensor, others[tensor.name])
    ]


def differences(dense: onnx.ModelProto, pruned: onnx.ModelProto) -> list[str]:
    """All that differs between two models besides the values of initializers, one sentence each; [] if nothing."""
    found: list[str] = []
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        _compare(found, field, getattr(dense, field), getattr(pruned, field))
    _compare(found, "opset", _opsets(dense), _opsets(pruned))
    _compare(found, "metadata", _metadata(dense), _metadata(pruned))
    _compare_messages(found, "function", dense.functions, pruned.functions)
    a, b = dense.graph, pruned.graph
    for field in ("name", "doc_string"):
        _compare(found, f"graph {field}", getattr(a, field), getattr(b, field))
    for what, field in (("input", "input"), ("output", "output"), ("node", "node"), ("value", "value_info")):
        _compare_messages(found, what, getattr(a, field), getattr(b, field))
    _compare_messages(found, "initializer", [_header(t) for t in a.initializer], [_header(t) for t in b.initializer])
    if not found and _frame(dense) != _frame(pruned):
        found.append("other parts of the model differ (training information, annotations, ...)")
    return found


def _compare(found: list[str], what: str, a: object, b: object) -> None:
    if a != b:
        found.append(f"{what}: {a!r} became {b!r}")


def _compare_messages(found: list[str], what: str, before, after) -> None:
    if len(before) != len(after):
        found.append(f"{what}s: {len(before)} became {len(after)}")
    names, others = [_name(item) for item in before], [_name(item) for item in after]
    found += [f"{what} '{name}' is missing" for name in names if name not in set(others)]
    found += [f"{what} '{name}' is new" for name in others if name not in set(names)]
    if sorted(names) == sorted(others) and names != others:
        found.append(f"{what}s are in another order")
    elif names == others:
        pairs = zip(names, before, after, strict=True)
        found += [f"{what} '{name}' differs" for name, a, b in pairs if _bytes(a) != _bytes(b)]


def _name(item) -> str:
    return item.name or " ".join(getattr(item, "output", ()))


def _bytes(message) -> bytes:
    return message.SerializeToString(deterministic=True)


def _opsets(model: onnx.ModelProto) -> list[tuple[str, int]]:
    return [(entry.domain, entry.version) for entry in model.opset_import]


def _metadata(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(entry.key, entry.value) for entry in model.metadata_props]


def _header(tensor: TensorProto) -> TensorProto:
    """The tensor without its values: name, shape, element type, documentation."""
    header = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    header.doc_string = tensor.doc_string
    return header


def _frame(model: onnx.ModelProto) -> bytes:
    frame = onnx.ModelProto()
    frame.CopyFrom(model)
    del frame.graph.initializer[:]
    return _bytes(frame)


def _little_endian(array: np.ndarray) -> bytes:
    """ONNX stores raw data in little-endian order on every machine."""
    return (
        array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        if array.dtype.kind == "f"
        else array.tobytes()
    )
