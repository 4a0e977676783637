"""What the tests of groups and narrower graphs share: graphs from texts, and the comparison of narrow with masked."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import helper, numpy_helper

from onnx_spdy.models import Group, find_groups, masked, narrowed

# Two residual blocks, of which the second has no activation behind it, and a layer between them that makes them wider.
TWO_BLOCKS = """
g (float[n, 3, 16, 16] x) => (float[n, 10] y)
<float[16, 3, 3, 3] w0, float[16] b0, float[16, 16, 3, 3] w1, float[16] b1, float[16, 16, 3, 3] w2, float[16] b2,
 float[24, 16, 3, 3] w3, float[24] b3, float[32, 24, 3, 3] w4, float[32] b4, float[24, 32, 3, 3] w5, float[24] b5,
 float[24, 10] w6, float[10] b6>
{
    [stem] a = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    [r0] r = Relu (a)
    [one] c = Conv <pads = [1, 1, 1, 1]> (r, w1, b1)
    [r1] d = Relu (c)
    [two] e = Conv <pads = [1, 1, 1, 1]> (d, w2, b2)
    [sum1] f = Add (e, r)
    [r2] s = Relu (f)
    [down] p = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (s, w3, b3)
    [three] q = Conv <pads = [1, 1, 1, 1]> (p, w4, b4)
    [r3] t = Relu (q)
    [four] u = Conv <pads = [1, 1, 1, 1]> (t, w5, b5)
    [sum2] v = Add (u, p)
    [pool] i = GlobalAveragePool (v)
    [flat] j = Flatten (i)
    [head] y = Gemm (j, w6, b6)
}"""
TOLERANCE = 1e-4  # of the largest absolute output


def network(text: str, opset: int = 18, seed: int = 0) -> onnx.ModelProto:
    """The model of a text. Tensors declared without values get random ones, vectors positive ones."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}')
    rng = np.random.default_rng(seed)
    made = {name for node in model.graph.node for name in node.output}
    for value in model.graph.value_info:
        if value.name not in made:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            numbers = rng.standard_normal(shape)
            numbers = np.abs(numbers) + 0.1 if len(shape) == 1 else numbers
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            model.graph.initializer.append(numpy_helper.from_array(numbers.astype(dtype), value.name))
    kept = [value for value in model.graph.value_info if value.name in made]
    model.graph.ClearField("value_info")
    model.graph.value_info.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model


def two_blocks() -> onnx.ModelProto:
    """The network of `TWO_BLOCKS`, whose activations are about 1."""
    model = network(TWO_BLOCKS)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        fan_in = values.size / values.shape[0] if values.ndim == 4 else values.shape[0]
        tensor.CopyFrom(numpy_helper.from_array((values / np.sqrt(fan_in)).astype(np.float32), tensor.name))
    return model


def groups_by_name(model: onnx.ModelProto) -> dict[str, Group]:
    return {group.name: group for group in find_groups(model)}


def outputs_of(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def random_inputs(model: onnx.ModelProto, batch: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal numbers, or small whole ones, for each input; open dimensions are the batch."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for value in model.graph.input:
        shape = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        whole = np.issubdtype(dtype, np.integer)
        inputs[value.name] = (rng.integers(0, 5, shape) if whole else rng.standard_normal(shape)).astype(dtype)
    return inputs


def random_keep(groups: list[Group], seed: int) -> dict[str, list[int]]:
    """Units of each group that can shrink, drawn at random; at least one, but of some branches none."""
    rng, gone = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    return {
        group.name: rng.permutation(group.units)[: rng.integers(1, group.units + 1)].tolist()
        if group.branch is None or gone.random() < 0.7
        else []
        for group in groups
        if group.prunable
    }


def check_narrow_is_masked(
    model: onnx.ModelProto, keep: dict[str, list[int]], inputs: dict[str, np.ndarray] | None = None
) -> onnx.ModelProto:
    """The narrower graph is valid, smaller, has the same nodes, or fewer, and computes what the masked one does."""
    before = model.SerializeToString(deterministic=True)
    narrow, zeroed = narrowed(model, keep), masked(model, keep)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(narrow)
    if all(node.op_type != "GroupNormalization" for node in narrow.graph.node):  # which inference doesn't know
        onnx.shape_inference.infer_shapes(narrow, strict_mode=True, data_prop=True)
    nodes, known = ([(node.name, node.op_type) for node in one.graph.node] for one in (narrow, model))
    left = iter(known)
    assert all(node in left for node in nodes)
    assert len(nodes) == len(known) or not all(keep.values())
    inputs = random_inputs(model) if inputs is None else inputs
    for actual, expected in zip(outputs_of(narrow, inputs), outputs_of(zeroed, inputs), strict=True):
        assert actual.shape == expected.shape
        largest = max(np.abs(expected.astype(np.float64)).max(initial=0), 1e-6)
        assert np.abs(actual.astype(np.float64) - expected).max(initial=0) <= TOLERANCE * largest
    return narrow


def check(model: onnx.ModelProto, seeds: int = 3) -> dict[str, Group]:
    """All groups of a model at random widths; returns them by name."""
    groups = find_groups(model)
    assert any(group.prunable for group in groups)
    for seed in range(seeds):
        check_narrow_is_masked(model, random_keep(groups, seed))
    return {group.name: group for group in groups}


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
