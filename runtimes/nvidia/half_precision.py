"""A network that carries fp16 or bf16 itself: what strongly typed engines run, which choose no precision of their own.

Every fp32 tensor inside the graph becomes a half one; the graph's inputs and outputs keep their type and are cast at
the border. What an operator allows is asked of ONNX's own definitions: where one knows no half type for a tensor
(the scales of a Resize, say), that tensor stays fp32, with a cast before or behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper, shape_inference, version_converter

from ..base import Arrays, ModelRefused, RuntimeUnavailable, one_line
from ..model_file import runtime_inputs, walk_graphs

PRECISIONS: dict[str, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TYPE_NAMES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
BF16_OPSET = 22  # the first in which convolutions and poolings know bf16
TOLERANCES = {"fp16": 0.02, "bf16": 0.1}  # of the largest output
_DTYPE_ATTRIBUTES = {"Cast": "to", "RandomNormal": "dtype", "RandomUniform": "dtype", "EyeLike": "dtype"}
_BORDER = "onnx_spdy_cast_"
AS_FP32 = "_as_fp32"
LARGE = 1024  # elements; what a shape is computed from has less
NODE = "onnx_spdy_node_"


def in_half_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The network in fp16 or bf16.

    A weight that is too large becomes the largest number of that type, a single number that is too small the smallest
    normal one: it is an epsilon, and 0 would mean something else. Zeros stay zeros.

    Args:
        model: with known input shapes; it isn't changed.
        precision: a key of PRECISIONS.
    Raises:
        ModelRefused: it has subgraphs or types that can't be inferred, carries another half type already, or its
            opset knows no bf16 and can't be raised.
    """
    if len([*walk_graphs(model.graph)]) > 1:
        raise ModelRefused(f"a network with subgraphs (If, Loop, Scan) can't be converted to {precision}; unroll them")
    model = _with_opset_for(model, precision)
    types = _types(model)
    for other, number in PRECISIONS.items():
        if number in types.values():
            if other != precision:
                raise ModelRefused(f"the file carries {other} already; run it in {other}, not in {precision}")
            if TensorProto.FLOAT not in {types[tensor.name] for tensor in model.graph.initializer}:
                return model  # somebody has converted it
    converted = _Conversion(model, precision, types).result()
    try:
        shape_inference.infer_shapes(skeleton(converted), check_type=True, strict_mode=True)
    except shape_inference.InferenceError as exc:
        raise ModelRefused(f"the network in {precision} isn't valid ONNX: {one_line(str(exc))}") from exc
    return converted


def check_same_results(original: onnx.ModelProto, converted: onnx.ModelProto, precision: str, inputs: Arrays) -> bool:
    """Compare the outputs of both in ONNX Runtime on the CPU: the conversion itself, types and weights.

    ONNX Runtime runs most operators in fp16 by way of fp32, and few in bf16. So it doesn't see all that overflows
    between two of them; the engine that runs the network has to look at its outputs, too.

    Returns:
        Whether they were compared.
    Raises:
        ModelRefused: an output isn't finite, or differs by more than TOLERANCES of the largest one.
    """
    from ..ort import create_session, run_session, session_options

    try:
        options = session_options(1)
    except RuntimeUnavailable:
        return False
    try:
        actual = run_session(create_session(converted.SerializeToString(), options), inputs)
    except ModelRefused:
        return False
    expected = run_session(create_session(original.SerializeToString(), options), inputs)
    for value, one, other in zip(original.graph.output, expected, actual, strict=True):
        if not np.issubdtype(one.dtype, np.floating):
            continue  # the index of a largest value may change
        if np.isfinite(one).all() and not np.isfinite(other).all():
            raise ModelRefused(f"in {precision} output {value.name!r} overflows; bf16 has the range of fp32")
        largest = float(np.abs(one).max(initial=0.0))
        difference = float(np.abs(one.astype(np.float64) - other).max(initial=0.0))
        if difference > TOLERANCES[precision] * largest:
            raise ModelRefused(
                f"in {precision} output {value.name!r} differs by {difference / largest:.1%} of its largest value "
                f"(allowed: {TOLERANCES[precision]:.0%}); run the network in another precision"
            )
    return True


def _with_opset_for(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """The model in an opset in which as many of its operators know the type as in any."""
    version = _opset(model)
    if precision != "bf16" or version >= BF16_OPSET or all(_knows_half(node, version) for node in model.graph.node):
        return model
    try:
        return version_converter.convert_version(model, BF16_OPSET)
    except (version_converter.ConvertError, RuntimeError, ValueError) as exc:
        raise ModelRefused(
            f"opset {version} doesn't know bf16 for all operators of this network, and it can't be raised to "
            f"{BF16_OPSET} ({one_line(str(exc))}); export it with opset {BF16_OPSET}, or use fp16"
        ) from exc


def _knows_half(node: onnx.NodeProto, version: int) -> bool:
    schema = _schema(node, version)
    if schema is None:
        return True
    return schema.since_version == _newest(node).since_version or any(
        TYPE_NAMES["bf16"] in one.allowed_type_strs for one in schema.type_constraints
    )


def _opset(model: onnx.ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def _schema(node: onnx.NodeProto, version: int) -> defs.OpSchema | None:
    """The operator's definition; None where it is none of ONNX's own."""
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return defs.get_schema(node.op_type, max_inclusive_version=version)
    except defs.SchemaError:
        return None


def _newest(node: onnx.NodeProto) -> defs.OpSchema:
    return defs.get_schema(node.op_type, max_inclusive_version=BF16_OPSET)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor name -> its element type in ONNX."""
    try:
        graph = shape_inference.infer_shapes(skeleton(model), strict_mode=True).graph
    except shape_inference.InferenceError as exc:
        raise ModelRefused(f"the types of this network's tensors can't be inferred: {one_line(str(exc))}") from exc
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if untyped := [name for name in node.output if name and not types.get(name)]:
            raise ModelRefused(f"the type of {untyped[0]!r}, made by {node.op_type} {node.name!r}, is unknown")
    return types


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large weights as inputs: types don't depend on their values, which may be gigabytes."""
    graph = model.graph
    large = [tensor for tensor in graph.initializer if math.prod(tensor.dims) > LARGE]
    names = {tensor.name for tensor in large}
    inputs = [value for value in graph.input if value.name not in names]
    weights = [helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in large]
    small = [tensor for tensor in graph.initializer if tensor.name not in names]
    bare = helper.make_graph(graph.node, graph.name or "graph", [*inputs, *weights], graph.output, small)
    made = helper.make_model(bare, opset_imports=model.opset_import, ir_version=model.ir_version)
    made.functions.extend(model.functions)
    return made


@dataclass
class _Conversion:
    """One network on its way to a half type. Names of tensors stay; an fp32 copy of one gets a name of its own."""

    model: onnx.ModelProto
    precision: str
    types: Mapping[str, int]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    stored: dict[str, TensorProto] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)  # the graph's fp32 inputs and outputs -> the half tensors
    copies: dict[str, str] = field(default_factory=dict)  # half tensor -> its fp32 copy

    def result(self) -> onnx.ModelProto:
        graph, half = self.model.graph, PRECISIONS[self.precision]
        constants = {tensor.name: tensor for tensor in graph.initializer}
        outputs = {value.name for value in graph.output}
        for value in runtime_inputs(graph):
            if self._is_float(value.name):
                self.renamed[value.name] = f"{value.name}_{self.precision}"
                self._cast(value.name, self.renamed[value.name], half)
        for name in outputs - set(self.renamed):
            if self._is_float(name):
                self.renamed[name] = f"{name}_{self.precision}"
        for tensor in graph.initializer:
            self.stored[tensor.name] = tensor
        version = _opset(self.model)
        for node in graph.node:
            self._add(node, version, constants)
        for name in (one.name for one in graph.output):
            if name in self.renamed and name not in {value.name for value in runtime_inputs(graph)}:
                self._cast(self.renamed[name], name, TensorProto.FLOAT)
        for name, tensor in constants.items():
            if self._is_float(name):
                self.stored[name] = self._half(tensor)
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        for content, new in ((made.graph.node, self.nodes), (made.graph.initializer, self.stored.values())):
            del content[:]
            content.extend(new)
        old_inputs = [value for value in made.graph.input if value.name not in constants]
        del made.graph.value_info[:], made.graph.input[:]  # the types in there were the old ones
        made.graph.input.extend(old_inputs)
        return made

    def _add(self, node: onnx.NodeProto, version: int, constants: Mapping[str, TensorProto]) -> None:
        """A node, and the casts around what it doesn't know in the half type."""
        schema, new = _schema(node, version), onnx.NodeProto()
        new.CopyFrom(node)
        self._change_types(new)
        for position, name in enumerate(node.input):
            if self._is_float(name):
                allowed = self._allowed(schema, schema.inputs if schema else (), position)
                new.input[position] = self.renamed.get(name, name) if allowed else self._in_fp32(name, constants)
        after = []
        for position, name in enumerate(node.output):
            if self._is_float(name):
                new.output[position] = self.renamed.get(name, name)
                if not self._allowed(schema, schema.outputs if schema else (), position):
                    half, new.output[position] = new.output[position], new.output[position] + AS_FP32
                    self.copies[name] = new.output[position]
                    after.append((new.output[position], half))
        self.nodes.append(new)
        for source, target in after:
            self._cast(source, target, PRECISIONS[self.precision])

    def _is_float(self, name: str) -> bool:
        return bool(name) and self.types.get(name) == TensorProto.FLOAT

    def _allowed(self, schema: defs.OpSchema | None, parameters, position: int) -> bool:
        """Whether the operator's definition knows the half type for this input or output."""
        if schema is None or not parameters:
            return False
        parameter = parameters[min(position, len(parameters) - 1)]  # the last one may stand for many
        wanted = TYPE_NAMES[self.precision]
        constraint = next((one for one in schema.type_constraints if one.type_param_str == parameter.type_str), None)
        return wanted in constraint.allowed_type_strs if constraint else parameter.type_str == wanted

    def _in_fp32(self, name: str, constants: Mapping[str, TensorProto]) -> str:
        """The name of a tensor's fp32 values."""
        if name not in self.copies:
            self.copies[name] = f"{name}_fp32"
            if name in constants:
                self.stored[self.copies[name]] = TensorProto()
                self.stored[self.copies[name]].CopyFrom(constants[name])
                self.stored[self.copies[name]].name = self.copies[name]
            else:
                self._cast(self.renamed.get(name, name), self.copies[name], TensorProto.FLOAT)
        return self.copies[name]

    def _cast(self, source: str, target: str, to: int) -> None:
        name = f"{_BORDER}{len(self.nodes)}"
        self.nodes.append(helper.make_node("Cast", [source], [target], name, to=to))

    def _change_types(self, node: onnx.NodeProto) -> None:
        """Attributes that say or hold fp32."""
        for attribute in node.attribute:
            if attribute.name == _DTYPE_ATTRIBUTES.get(node.op_type) and attribute.i == TensorProto.FLOAT:
                attribute.i = PRECISIONS[self.precision]
            elif node.op_type in ("Constant", "ConstantOfShape") and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(self._half(attribute.t))
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                values = np.array(helper.get_attribute_value(attribute), np.float32)
                attribute.CopyFrom(helper.make_attribute("value", self._half(numpy_helper.from_array(values))))

    def _half(self, tensor: TensorProto) -> TensorProto:
        kind = DTYPES[self.precision]
        limits = ml_dtypes.finfo(kind)
        values = numpy_helper.to_array(tensor)
        finite = np.where(np.isinf(values), values, values.clip(float(limits.min), float(limits.max)))
        if values.size == 1 and 0 < abs(float(finite.item())) < float(limits.smallest_normal):
            finite = np.copysign(np.full_like(values, float(limits.smallest_normal)), values)
        data = finite.astype(kind).tobytes()
        return helper.make_tensor(tensor.name, PRECISIONS[self.precision], tensor.dims, data, raw=True)


def number_nodes(graph: onnx.GraphProto) -> None:
    """Give each node a name that no other one has; an engine's profile may then be read by names."""
    for number, node in enumerate(graph.node):
        if not node.name.startswith(_BORDER):  # unique already
            node.name = f"{NODE}{number}"


def original_names(converted: onnx.GraphProto, original: onnx.GraphProto, precision: str) -> dict[str, str]:
    """Tensor of the converted graph -> the tensor of the original one that the same node makes."""
    known = {name for node in original.node for name in node.output if name}
    found: dict[str, str] = {}
    for name in (name for node in converted.node if not node.name.startswith(_BORDER) for name in node.output):
        bare = name.removesuffix(AS_FP32)
        candidates = (bare, bare.removesuffix(f"_{precision}"))
        if match := next((one for one in candidates if one in known), None):
            known.discard(match)
            found[name] = match
    return found
