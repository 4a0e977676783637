"""The sound networks that the fuzzer damages: convolutions, attention, recurrence, quantised numbers, control flow.

A tensor that is declared in a text, but that no node makes and no value is given for, gets random numbers.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import TensorProto, helper, numpy_helper

IMAGES = """
<ir_version: 9, opset_import: ["" : 18]>
images (float[batch, 3, 16, 16] x) => (float[batch, 20] y)
<float[16, 3, 3, 3] w1, float[16] b1, float[16] s, float[16] v, float low = {0}, float high = {6},
 float[16, 8, 1, 1] w2, int64[2] axes = {2, 3}, float[20, 16] w3, float[20] b3>
{
    [conv1] c = Conv <pads = [1, 1, 1, 1], strides = [2, 2], kernel_shape = [3, 3]> (x, w1, b1)
    [norm] n = BatchNormalization (c, s, s, s, v)
    [clip] r = Clip (n, low, high)
    [pool] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    [conv2] d = Conv <group = 2> (p, w2)
    [mean] m = ReduceMean <keepdims = 0> (d, axes)
    [fc] y = Gemm <transB = 1, alpha = 1.0> (m, w3, b3)
}
"""

SENTENCES = """
<ir_version: 9, opset_import: ["" : 17]>
sentences (float[batch, 6, 16] x) => (float[6, batch, 8] y, float[2] zeros)
<float[16, 48] w, float[16] gain, float[1, 24, 16] gw, float[1, 24, 8] gr, int64[3] sizes = {16, 16, 16},
 int64[1] zero = {0}, int64[1] two = {2}, int64[1] minus = {-1}, int64[1] one = {1}>
{
    [qkv] a = MatMul (x, w)
    [split] q, k, v = Split <axis = 2> (a, sizes)
    [shape] shape = Shape (q)
    [slice] first = Slice (shape, zero, two, zero)
    [concat] target = Concat <axis = 0> (first, minus)
    [reshape] q2 = Reshape (q, target)
    [transpose] kt = Transpose <perm = [0, 2, 1]> (k)
    [scores] scores = MatMul (q2, kt)
    [softmax] p = Softmax <axis = -1> (scores)
    [mix] m = MatMul (p, v)
    [fill] zeros = ConstantOfShape (two)
    [layernorm] l = LayerNormalization (m, gain)
    [time] t = Transpose <perm = [1, 0, 2]> (l)
    [gru] g = GRU <hidden_size = 8> (t, gw, gr)
    [sum] y = ReduceSum <keepdims = 0> (g, one)
}
"""

# Once as quantised operators, once as floating ones between QuantizeLinear and DequantizeLinear.
QUANTISED = """
<ir_version: 9, opset_import: ["" : 17]>
quantised (float[batch, 3, 8, 8] x) => (float[batch, 12] y)
<float scale = {0.05}, int8 zero = {0}, int8[16, 3, 3, 3] w1, float[16] scales, int8[16] zeros, int32[16] b1,
 float[16, 16, 1, 1] w2, float[4] sizes = {1, 1, 2, 2}, int64[2] flat = {0, -1}, int8[1024, 12] w3>
{
    [quantize] q = QuantizeLinear (x, scale, zero)
    [conv1] c = QLinearConv <pads = [1, 1, 1, 1], strides = [2, 2]>
        (q, scale, zero, w1, scales, zeros, scale, zero, b1)
    [dequantize] d = DequantizeLinear (c, scale, zero)
    [weights] wq = QuantizeLinear <axis = 0> (w2, scales, zeros)
    [back] wd = DequantizeLinear <axis = 0> (wq, scales, zeros)
    [conv2] e = Conv (d, wd)
    [resize] r = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric"> (e, , sizes)
    [reshape] f = Reshape (r, flat)
    [again] g = QuantizeLinear (f, scale, zero)
    [matmul] h = QLinearMatMul (g, scale, zero, w3, scale, zero, scale, zero)
    [end] y = DequantizeLinear (h, scale, zero)
}
"""

# Subgraphs that read values from outside, a function of the model's own, half precision.
CONTROL = """
<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
control (float[batch, 5, 16] x, bool flag) => (float[batch, 5, 16] y, float[steps, batch, 16] seen)
<float[16, 16] w1, float[16, 16] w2, float16[16, 16] w3, bool always = {1}, int64 three = {3}, float half = {0.5}>
{
    [project] a = MatMul (x, w1)
    [fixed] b = If (always) <
        then_branch = yes () => (float[batch, 5, 16] p) { [relu] p = Relu (a) },
        else_branch = no () => (float[batch, 5, 16] n) { [neg] n = Neg (a) }>
    [asked] c = If (flag) <
        then_branch = big () => (float[batch, 5, 16] u) { [twice] u = Add (b, b) },
        else_branch = small () => (float[batch, 5, 16] v) { [times] v = MatMul (b, w2) }>
    [loop] d = Loop (three, always, c) <body = step (int64 i, bool on, float[batch, 5, 16] s) =>
        (bool still, float[batch, 5, 16] t) {
            [still] still = Identity (on)
            [inside] m = MatMul (s, w2)
            [tanh] t = Tanh (m)
        }>
    [first] turned = Transpose <perm = [1, 0, 2]> (d)
    [start] zero = ReduceMax <axes = [1], keepdims = 0> (d)
    [scan] last, seen = Scan <num_scan_inputs = 1, body = scanned (float[batch, 16] h, float[batch, 16] e) =>
        (float[batch, 16] k, float[batch, 16] o) {
            [mix] k = Add (h, e)
            [out] o = Mul (k, half)
        }> (zero, turned)
    [narrow] f16 = Cast <to = 10> (d)
    [block] g16 = own.Block <alpha = 0.1> (f16, w3)
    [wide] y = Cast <to = 1> (g16)
}
<domain: "own", opset_import: ["" : 17]>
Block <alpha> (z, w) => (r) {
    m = MatMul (z, w)
    n = LeakyRelu <alpha: float = @alpha> (m)
    r = Add (n, z)
}
"""

EXTERNAL_BYTES = 256  # tensors of this size and more go to the second file of a model that has one


def examples() -> list[onnx.ModelProto]:
    """One small network of each text, all valid."""
    rng = np.random.default_rng(0)
    return [example(text, rng) for text in (IMAGES, SENTENCES, QUANTISED, CONTROL)]


def example(text: str, rng: np.random.Generator) -> onnx.ModelProto:
    """The network of a text, with random numbers."""
    return _filled(onnx.parser.parse_model(text), rng)


def with_external_data(model: onnx.ModelProto, location: str) -> tuple[onnx.ModelProto, bytes]:
    """A copy whose larger tensors refer to a file beside it, and what that file holds."""
    outside, data = onnx.ModelProto(), b""
    outside.CopyFrom(model)
    for tensor in outside.graph.initializer:
        if len(tensor.raw_data) >= EXTERNAL_BYTES:
            places = {"location": location, "offset": str(len(data)), "length": str(len(tensor.raw_data))}
            data += tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in places.items():
                tensor.external_data.add(key=key, value=value)
    return outside, data


def _filled(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    graph = model.graph
    made = {name for node in graph.node for name in node.output}
    for value in graph.value_info:
        if value.name not in made:
            graph.initializer.append(_random(value, rng))
    graph.ClearField("value_info")
    for tensor in graph.initializer:  # as exporters store them
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    return model


def _random(value: onnx.ValueInfoProto, rng: np.random.Generator) -> TensorProto:
    """Positive numbers where they are variances or scales (a vector), around zero otherwise."""
    kind = value.type.tensor_type
    numbers = rng.standard_normal([dim.dim_value for dim in kind.shape.dim])
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if np.issubdtype(dtype, np.integer):
        numbers = np.rint(20 * numbers) if numbers.ndim > 1 else 0 * numbers
    elif numbers.ndim == 1:
        numbers = np.abs(numbers) + 0.1
    return numpy_helper.from_array(numbers.astype(dtype), value.name)
