"""An ONNX file as the engines get it: a copy in memory with the batch fixed, and inputs that fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from .base import Arrays, ModelRefused, one_line
from .batch_axes import batch_axes, fixed_batch
from .random_zeros import impose_zeros
from .workload import Workload, WorkloadError

PROTOBUF_LIMIT_BYTES = 2**31 - 1
LAYER_OPS = frozenset({"Conv", "Gemm", "MatMul"})
INPUT_SEED = 0

_QUANTIZED = ("Integer", "QuantizeLinear", "QLinear")
_FLOATS = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
_ZEROED = frozenset({*_FLOATS, TensorProto.DOUBLE})


@dataclass(frozen=True)
class FixedModel:
    """A private copy of a model with every input shape known."""

    proto: onnx.ModelProto
    inputs: dict[str, np.ndarray]  # one batch, to time with
    outputs: tuple[str, ...]
    precision: str  # "fp32", "fp16", "bf16" or "int8": what the file's weights are computed in

    def to_bytes(self) -> bytes:
        """The copy as one ONNX file.

        Raises:
            ModelRefused: it does not fit into one protobuf message.
        """
        return serialized(self.proto)


def fix_model(path: Path, workload: Workload, zeros: Mapping[str, float] | None = None, seed: int = 0) -> FixedModel:
    """Read a model and fix its input shapes: the axis of samples to the batch, others as in the inputs; draw the zeros.

    Raises:
        ModelRefused: the file is missing or broken, has another fixed batch, or an axis that the inputs
            don't tell.
        WorkloadError: the inputs don't fit the graph.
        ValueError: as `zero_randomly`.
    """
    proto = read_model(path)
    zero_randomly(proto.graph, zeros, seed)
    sizes: dict[str, int] = {}
    examples = _fix_inputs(runtime_inputs(proto.graph), workload, sizes)
    for value in (*proto.graph.output, *proto.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in sizes:
                axis.dim_value = sizes[axis.dim_param]  # also clears the name
    return FixedModel(proto, examples, tuple(value.name for value in proto.graph.output), _precision(proto))


def resolved(graph: onnx.GraphProto, workload: Workload) -> Workload:
    """The workload with every input's array as an engine is given it: one batch, random values where none are given.

    Raises:
        ModelRefused, WorkloadError: as `fix_model`.
    """
    copies = []
    for value in runtime_inputs(graph):
        copies.append(onnx.ValueInfoProto())
        copies[-1].CopyFrom(value)
    return replace(workload, inputs=_fix_inputs(copies, workload, {}))


def _fix_inputs(
    graph_inputs: Sequence[onnx.ValueInfoProto], workload: Workload, sizes: dict[str, int]
) -> dict[str, np.ndarray]:
    """Write the sizes of all axes into the graph's inputs, those of named dynamic axes into `sizes`, and return one
    batch for each input.
    """
    given = dict(workload.inputs or {})
    names = [value.name for value in graph_inputs]
    if unknown := set(given) - set(names):
        raise WorkloadError(f"inputs {sorted(unknown)} are not in the graph, whose inputs are {names}")
    _check_batch(graph_inputs, workload.batch)
    axes = batch_axes(graph_inputs)
    random = np.random.default_rng(INPUT_SEED)
    examples = {}
    for value in graph_inputs:
        sample, axis = given.get(value.name), axes[value.name]
        shape = _fixed_shape(value, axis, workload.batch, sample, sizes)
        examples[value.name] = _fill(value, shape, axis, sample, random)
    return examples


def read_model(path: Path) -> onnx.ModelProto:
    """Load a model with its weights.

    Raises:
        ModelRefused: no such file, or not an ONNX model; one line.
    """
    if not path.is_file():
        raise ModelRefused(f"no such file: {path}")
    try:
        model = onnx.load(path)
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as exc:
        raise ModelRefused(f"{path} can't be read as an ONNX model: {one_line(str(exc))}") from exc
    if not model.graph.node:
        raise ModelRefused(f"{path} is not an ONNX model, or one without a single node; export it again")
    return model


def serialized(model: onnx.ModelProto) -> bytes:
    """A model with its weights as one ONNX file.

    Raises:
        ModelRefused: it does not fit into one protobuf message.
    """
    if (size := model.ByteSize()) > PROTOBUF_LIMIT_BYTES:
        raise ModelRefused(f"the model is {size} bytes with its weights; engines take up to {PROTOBUF_LIMIT_BYTES}")
    return model.SerializeToString()


def zero_randomly(graph: onnx.GraphProto, zeros: Mapping[str, float] | None, seed: int) -> None:
    """Set a random fraction of initializers to zero, in place; see `impose_zeros`.

    Raises:
        ValueError: no such initializer, one that does not hold floats, or a fraction outside [0, 1].
    """
    prepare_zeros(graph, zeros)
    impose_zeros(graph, zeros or {}, seed)


def prepare_zeros(graph: onnx.GraphProto, zeros: Mapping[str, float] | None) -> None:
    """Check that these zeros can be drawn, and store the initializers as `impose_zeros` needs them; nothing is drawn.

    Raises:
        ValueError: as `zero_randomly`.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name, fraction in (zeros or {}).items():
        if not 0 <= fraction <= 1:
            raise ValueError(f"a fraction of {fraction} zeros in {name!r}; a fraction is in [0, 1]")
        if name not in stored or stored[name].data_type not in _ZEROED or 0 in stored[name].dims:
            raise ValueError(f"zeros in {name!r}, which is no initializer of the graph that holds floats")
        if not stored[name].raw_data:  # old files keep each value in a field of its own
            stored[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored[name]), name))


def runtime_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Inputs that a caller has to give: old files list their weights as inputs too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def walk_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and every graph inside it (bodies of If, Loop and Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from walk_graphs(inner)


def check_inputs(given: Arrays, expected: Mapping[str, np.ndarray]) -> None:
    """Compare the inputs of a run with those that the session was made for.

    Raises:
        WorkloadError: one is missing, unknown, or of another shape or type.
    """
    if wrong := set(given) ^ set(expected):
        raise WorkloadError(f"inputs {sorted(wrong)} are missing or unknown; the graph takes {list(expected)}")
    for name, array in given.items():
        if (array.shape, array.dtype) != (expected[name].shape, expected[name].dtype):
            wanted = f"{expected[name].dtype}{list(expected[name].shape)}"
            raise WorkloadError(f"input {name!r} is {array.dtype}{list(array.shape)}; this session takes {wanted}")


def _check_batch(inputs: Sequence[onnx.ValueInfoProto], batch: int) -> None:
    """A file whose inputs are all fixed runs one batch only; one dynamic input makes the batch free."""
    if (fixed := fixed_batch(inputs)) not in (None, batch):
        raise ModelRefused(f"the model has a fixed batch of {fixed}, not {batch}; use {fixed} or export a dynamic one")


def _fixed_shape(
    value: onnx.ValueInfoProto, batch_axis: int | None, batch: int, sample: np.ndarray | None, sizes: dict[str, int]
) -> tuple[int, ...]:
    """Write the input's sizes into `value`, and the named ones into `sizes`."""
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        raise ModelRefused(f"input {value.name!r} is not a tensor of known rank; export it with a shape")
    if sample is not None and sample.ndim != len(tensor.shape.dim):
        raise WorkloadError(f"input {value.name!r} has {len(tensor.shape.dim)} axes, the array for it {sample.ndim}")
    for number, axis in enumerate(tensor.shape.dim):
        if axis.dim_value > 0:
            continue
        if number == batch_axis:
            size = batch
        elif sample is not None:
            size = sample.shape[number]
        elif axis.dim_param in sizes:
            size = sizes[axis.dim_param]
        else:
            label = f" ({axis.dim_param!r})" if axis.dim_param else ""
            raise ModelRefused(
                f"axis {number}{label} of input {value.name!r} is dynamic; give an example of that input"
            )
        if axis.dim_param and sizes.setdefault(axis.dim_param, size) != size:
            raise WorkloadError(
                f"axis {number} of input {value.name!r} is {size}, but {axis.dim_param!r} is {sizes[axis.dim_param]}"
            )
        axis.dim_value = size
    return tuple(axis.dim_value for axis in tensor.shape.dim)


def _fill(
    value: onnx.ValueInfoProto,
    shape: tuple[int, ...],
    batch_axis: int | None,
    sample: np.ndarray | None,
    random: np.random.Generator,
) -> np.ndarray:
    """One batch for an input: the samples, repeated to fill it, or random values."""
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    except KeyError as exc:
        raise ModelRefused(
            f"input {value.name!r} has ONNX type {value.type.tensor_type.elem_type}, unknown here"
        ) from exc
    if sample is None:
        # Zeros and ones are valid as tokens, masks and flags alike; floats look like normalised data.
        if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            return random.integers(0, 2, shape).astype(dtype)
        return random.standard_normal(shape).astype(dtype)
    if sample.dtype != dtype:
        raise WorkloadError(f"the array for input {value.name!r} is {sample.dtype}; the graph takes {dtype}")
    filled = sample
    if batch_axis is not None:
        if sample.shape[batch_axis] == 0:
            raise WorkloadError(f"the array for input {value.name!r} has 0 samples; give at least one")
        filled = sample.take(np.arange(shape[batch_axis]), axis=batch_axis, mode="wrap")
    if filled.shape != shape:
        raise WorkloadError(
            f"the array for input {value.name!r} is {list(sample.shape)}; the graph takes {list(shape)}"
        )
    return np.require(filled, requirements="C")  # unlike ascontiguousarray it leaves a single number one


def _precision(model: onnx.ModelProto) -> str:
    if any(part in node.op_type for node in model.graph.node for part in _QUANTIZED):
        return "int8"
    widths = [tensor.data_type for tensor in model.graph.initializer if tensor.data_type in _FLOATS and tensor.dims]
    widths += [value.type.tensor_type.elem_type for value in model.graph.output]
    return _FLOATS.get(widths[0], "fp32") if widths else "fp32"
