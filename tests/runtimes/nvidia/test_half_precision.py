"""Conversion to fp16 and bf16: compared with the fp32 network by ONNX's reference implementation or ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_spdy.runtimes import ModelRefused, Workload
from onnx_spdy.runtimes.model_file import fix_model
from onnx_spdy.runtimes.nvidia.half_precision import PRECISIONS, check_same_results, in_half_precision

SHARED = Path(__file__).parents[3] / "shared" / "data"


def net(nodes, arrays, inputs, outputs, opset=17) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def attention() -> onnx.ModelProto:
    """What exporters write: a mask computed in fp32 from integers, and a scale as a constant."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["mask"], ["kept"], "to_float", to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["one"], "one", value_float=1.0),
        helper.make_node("Sub", ["one", "kept"], ["hidden"], "hidden"),
        helper.make_node("Mul", ["hidden", "lowest"], ["bias"], "bias"),
        helper.make_node("MatMul", ["x", "w"], ["scores"], "scores"),
        helper.make_node("Add", ["scores", "bias"], ["masked"], "masked"),
        helper.make_node("Softmax", ["masked"], ["y"], "softmax", axis=-1),
    ]
    arrays = {
        "w": rng.standard_normal((16, 8)).astype(np.float32),
        "lowest": np.array([np.finfo(np.float32).min], np.float32),
    }
    inputs = [("x", TensorProto.FLOAT, [4, 16]), ("mask", TensorProto.INT64, [4, 8])]
    return net(nodes, arrays, inputs, ["y"])


def attention_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "x": rng.standard_normal((4, 16)).astype(np.float32),
        "mask": np.tile(np.arange(8) < 6, (4, 1)).astype(np.int64),
    }


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_mask_and_its_lowest_number_stay_what_they_are(precision):
    original = attention()
    converted = in_half_precision(original, precision)
    (y,) = ReferenceEvaluator(converted).run(None, attention_inputs())
    (expected,) = ReferenceEvaluator(original).run(None, attention_inputs())
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=0.02)
    assert (y[:, 6:] == 0).all()
    types = element_types(converted)
    assert {types[name] for name in ("w", "bias", "scores", "masked")} == {PRECISIONS[precision]}
    assert (types["x"], types["y"], types["mask"]) == (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64)


def test_onnx_runtime_agrees_in_fp16():
    assert check_same_results(attention(), in_half_precision(attention(), "fp16"), "fp16", attention_inputs())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_convolutions_compute_in_the_half_type_whatever_the_opset(precision, conv_net):
    original = onnx.load(conv_net(batch=2))
    converted = in_half_precision(original, precision)
    types = element_types(converted)
    assert {types[name] for name in ("w0", "w1", "w2", "a", "b", "c", "d", "e")} == {PRECISIONS[precision]}
    x = np.random.default_rng(0).standard_normal((2, 8, 12, 12)).astype(np.float32)
    if precision == "fp16":
        assert check_same_results(original, converted, precision, {"x": x})


def test_what_an_operator_knows_in_fp32_only_stays_fp32():
    """The scales of a Resize are fp32 by definition, and are another layer's fp16 input here."""
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["big"], "resize", mode="nearest"),
        helper.make_node("Mul", ["big", "scales"], ["y"], "mul"),
    ]
    model = net(nodes, {"scales": np.array([1, 1, 2, 4], np.float32)}, [("x", TensorProto.FLOAT, [1, 1, 2, 1])], ["y"])
    converted = in_half_precision(model, "fp16")
    x = np.arange(2, dtype=np.float32).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(*(ReferenceEvaluator(one).run(None, {"x": x})[0] for one in (model, converted)))
    types = element_types(converted)
    assert (types["scales"], types["scales_fp32"], types["big"]) == (10, 1, 10)


def test_zeros_stay_zeros_large_weights_stay_finite_and_epsilons_stay_positive():
    arrays = {"w": np.array([[0.0, 1e6, -1e6, 1e-9]], np.float32), "eps": np.array(1e-12, np.float32)}
    nodes = [helper.make_node("Mul", ["x", "w"], ["m"], "m"), helper.make_node("Add", ["m", "eps"], ["y"], "y")]
    converted = in_half_precision(net(nodes, arrays, [("x", TensorProto.FLOAT, [1, 4])], ["y"]), "fp16")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in converted.graph.initializer}
    assert stored["w"].tolist() == [[0.0, 65504.0, -65504.0, 0.0]]
    assert stored["eps"] == np.finfo(np.float16).smallest_normal


def test_an_overflow_is_refused_and_bf16_proposed():
    model = net([helper.make_node("Mul", ["x", "w"], ["y"], "m")], {"w": np.array([1e4], np.float32)}, [
        ("x", TensorProto.FLOAT, [1, 4])], ["y"])  # fmt: skip
    converted = in_half_precision(model, "fp16")
    converted.graph.initializer[0].raw_data = np.array([np.inf], np.float16).tobytes()
    with pytest.raises(ModelRefused, match="overflows; bf16"):
        check_same_results(model, converted, "fp16", {"x": np.ones((1, 4), np.float32)})


def test_a_wrong_result_is_refused():
    other = in_half_precision(attention(), "fp16")
    weight = next(tensor for tensor in other.graph.initializer if tensor.name == "w")
    weight.raw_data = (-numpy_helper.to_array(weight)).tobytes()
    with pytest.raises(ModelRefused, match=r"differs by \d+.*another precision"):
        check_same_results(attention(), other, "fp16", attention_inputs())


def test_a_file_that_carries_fp16_stays_as_it_is_and_is_no_bf16():
    converted = in_half_precision(attention(), "fp16")
    assert in_half_precision(converted, "fp16").SerializeToString() == converted.SerializeToString()
    with pytest.raises(ModelRefused, match="carries fp16 already"):
        in_half_precision(converted, "bf16")


def test_subgraphs_are_refused_in_one_line():
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])  # fmt: skip
    nodes = [helper.make_node("If", ["flag"], ["y"], "if", then_branch=branch, else_branch=branch)]
    model = net(nodes, {"flag": np.array(True)}, [("x", TensorProto.FLOAT, [1])], ["y"])
    with pytest.raises(ModelRefused, match="subgraphs"):
        in_half_precision(model, "fp16")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development networks are not at hand")
@pytest.mark.parametrize("name", ["resnet20_cifar10.onnx", "dscnn_kws.onnx"])
def test_real_networks_agree_in_fp16(name):
    fixed = fix_model(SHARED / name, Workload(4))
    assert check_same_results(fixed.proto, in_half_precision(fixed.proto, "fp16"), "fp16", fixed.inputs)
    in_half_precision(fixed.proto, "bf16")
