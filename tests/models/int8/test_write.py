"""Written networks in int8: valid, the same everywhere, and only the nodes that quantise are new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

from onnx_spdy.models import TorchGraph
from onnx_spdy.models.int8.form import FORMS
from onnx_spdy.models.int8.grid import grid_between
from onnx_spdy.models.int8.place import find_placement
from onnx_spdy.models.int8.write import Integers, IntegerWeight, in_float, write_int8
from onnx_spdy.runtimes import RuntimeUnavailable, Workload, open_runtime
from tests.models.int8.test_place import ATTENTION, IMAGE, RESIDUAL
from tests.models.int8.writing import all_values, plain_session, residual, written
from tests.models.narrowing import network, random_inputs

NEW = ("QuantizeLinear", "DequantizeLinear")
DEPTHWISE = f"""
g ({IMAGE}) => (float[n, 4, 8, 8] y)
<float[8, 8, 1, 1] w1, float[8] b1, float[8, 1, 3, 3] w2, float[8] b2, float[4, 8, 1, 1] w3>
{{
    [expand] a = Conv (x, w1, b1)
    [relu] r = Relu (a)
    [deep] d = Conv <group = 8, pads = [1, 1, 1, 1]> (r, w2, b2)
    [project] y = Conv (d, w3)
}}"""
GRAPHS = {"residual": RESIDUAL, "depthwise": DEPTHWISE, "attention": ATTENTION}
cases = pytest.mark.parametrize(
    ("graph", "form"), [(graph, form) for graph in GRAPHS for form in ("onnxruntime", "openvino", "tensorrt")]
)


def inputs_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """So small that a softmax doesn't choose one of them alone."""
    return {name: 0.1 * array for name, array in random_inputs(model, batch=5).items()}


def largest_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@cases
def test_it_is_valid_and_nearly_the_same(graph: str, form: str) -> None:
    model = network(GRAPHS[graph])
    inputs = inputs_of(model)
    quantised, _, _ = written(model, FORMS[form], inputs)
    onnx.checker.check_model(quantised, full_check=True)
    onnx.shape_inference.infer_shapes(quantised, strict_mode=True, data_prop=True)
    expected, found = (plain_session(one).run(None, inputs)[0] for one in (model, quantised))
    assert 0 < np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    # So that the comparison tells something: with half as many bits it would fail.
    assert quantised.graph.node[0].op_type == "QuantizeLinear"


@cases
def test_all_engines_compute_the_same_to_one_step(graph: str, form: str, tmp_path: Path) -> None:
    """The outputs' own step, had they one: 1/255 of their range. Engines round halves inside differently."""
    model = network(GRAPHS[graph])
    inputs = inputs_of(model)
    quantised, _, _ = written(model, FORMS[form], inputs)
    expected = plain_session(quantised).run(None, inputs)[0]
    step = (expected.max() - expected.min()) / 255
    with torch.inference_mode():
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        found = {"TorchGraph": TorchGraph(quantised)(given)["y"].numpy()}
    found["optimised"] = plain_session(quantised, optimised=True).run(None, inputs)[0]
    onnx.save(quantised, tmp_path / "int8.onnx")
    try:
        with open_runtime("openvino:fp32") as vino, vino.open(tmp_path / "int8.onnx", Workload(5, 1)) as session:
            found["OpenVINO"] = session.run(inputs)["y"]
    except RuntimeUnavailable:
        pass
    for name, values in found.items():
        off = np.abs(values - expected)
        assert off.max() <= 2 * step, name
        assert off.mean() <= 0.2 * step, name


@cases
def test_the_graph_is_the_same_but_for_what_quantises(graph: str, form: str) -> None:
    model = network(GRAPHS[graph])
    before = model.SerializeToString()
    quantised, placement, _ = written(model, FORMS[form], random_inputs(model))
    assert model.SerializeToString() == before

    def nodes(one: onnx.ModelProto) -> list[tuple[str, str]]:
        return [(node.name, node.op_type) for node in one.graph.node if node.op_type not in NEW]

    assert nodes(quantised) == nodes(model)
    names = [node.name for node in quantised.graph.node]
    assert len(set(names)) == len(names)
    assert quantised.graph.input == model.graph.input
    assert quantised.graph.output == model.graph.output
    made = {name: node.op_type for node in quantised.graph.node for name in node.output}
    for tensor, readers in placement.points.items():
        for name, number in readers:
            (node,) = (node for node in quantised.graph.node if node.name == name)
            assert made[node.input[number]] == "DequantizeLinear"
            assert tensor not in node.input
    for weight in placement.weights:
        assert weight.name not in {tensor.name for tensor in quantised.graph.initializer}  # its integers are there


def test_a_file_of_large_weights_is_a_quarter_as_large() -> None:
    model = network("g (float[n, 256] x) => (float[n, 256] y) <float[256, 256] w> { [one] y = MatMul (x, w) }")
    quantised, _, _ = written(model, FORMS["openvino"], random_inputs(model))
    assert quantised.ByteSize() < 0.26 * model.ByteSize() + 4 * 256 + 2000


def stored(model: onnx.ModelProto) -> Mapping[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_biases_are_in_the_scale_of_the_products_where_the_form_says_so() -> None:
    model = network(DEPTHWISE)
    inputs = random_inputs(model)
    quantised, placement, integers = written(model, FORMS["onnxruntime"], inputs)
    values, floats = stored(quantised), stored(model)
    for bias, (tensor, weight) in placement.biases.items():
        scale = integers.activations[tensor].scale * integers.weights[weight].scale
        assert values[f"{bias}_int32"].dtype == np.int32
        np.testing.assert_allclose(values[f"{bias}_scale"], scale, rtol=1e-6)
        np.testing.assert_allclose(values[f"{bias}_int32"] * scale, floats[bias], atol=float(scale.max()))
    plain, _, _ = written(model, FORMS["openvino"], inputs)
    assert {tensor.name for tensor in plain.graph.initializer if tensor.data_type == TensorProto.INT32} == set()
    np.testing.assert_array_equal(stored(plain)["b1"], floats["b1"])


@pytest.mark.parametrize("second", ["w1", "w2"])
@pytest.mark.parametrize("weight", [0.0, 1e-12])
@pytest.mark.parametrize("size", [1.0, 0.0])
def test_a_bias_that_is_far_larger_than_what_it_is_added_to_is_not_cut_off(
    size: float, weight: float, second: str
) -> None:
    """A channel without weights, as pruning or a dead filter leaves it, or an input that was always zero."""
    model = network(
        "g (float[n, 8, 4, 4] x) => (float[n, 8, 4, 4] y) <float[8, 8, 1, 1] w1, float[8] b1, float[8, 8, 1, 1] w2> "
        f"{{ [one] a = Conv (x, w1, b1) [relu] r = Relu (a) [two] y = Conv (r, {second}) }}"
    )
    kept = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    values = numpy_helper.to_array(kept).copy()
    values[2] = weight * values[2]
    kept.CopyFrom(numpy_helper.from_array(values, "w1"))
    inputs = {"x": size * np.random.default_rng(0).normal(size=(3, 8, 4, 4)).astype(np.float32)}
    quantised, _, _ = written(model, FORMS["onnxruntime"], inputs)
    assert "b1_int32" in stored(quantised)
    assert ("w1_int8_1" in stored(quantised)) == (second == "w1")  # the other layer's weight needn't give way
    expected, found = (all_values(one, inputs)["a"] for one in (model, quantised))
    assert largest_error(found, expected) < 0.02
    np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=1e-3)
    for optimised in (False, True):
        dense, own = (plain_session(one, optimised).run(None, inputs)[0] for one in (model, quantised))
        assert largest_error(own, dense) < 0.03


def test_a_shared_weight_is_stored_once_and_a_shared_bias_stays_as_it_is() -> None:
    model = network("""
    g (float[n, 8] x, float[n, 8] z) => (float[n, 8] y1, float[n, 8] y2) <float[8, 8] w, float[8] b, float[8, 8] v>
    { [one] y1 = Gemm (x, w, b) [two] t = Gemm (z, w) [three] y2 = Gemm (t, v, b) }""")
    inputs = random_inputs(model)
    quantised, _, _ = written(model, FORMS["onnxruntime"], inputs)
    assert "b" in stored(quantised)
    assert "b_int32" not in stored(quantised)
    (first, second, _) = (node for node in quantised.graph.node if node.op_type == "Gemm")
    assert first.input[1] == second.input[1]
    for found, expected in zip(
        plain_session(quantised).run(None, inputs), plain_session(model).run(None, inputs), strict=True
    ):
        assert largest_error(found, expected) < 0.05


def test_names_that_are_taken_already_are_left_alone() -> None:
    """Tensors and nodes that are called what this would call its own."""
    model = network("""
    g (float[n, 8] x, float[n, 8] x_quantized) => (float[n, 8] y, float[n, 8] w_dequantized)
    <float[8, 8] w, float[8, 8] w_int8, float[8] x_scale, float[8] b, float[8] b_int32>
    {
        [x_quantize] x_dequantized = MatMul (x, w)
        [w_dequantize] x_zero = Gemm (x_dequantized, w_int8, b)
        [x_dequantize] t = Mul (x_zero, x_scale)
        [b_dequantize] y = Add (t, b_int32)
        [add] w_dequantized = Add (x_quantized, y)
    }""")
    inputs = random_inputs(model)
    for form in FORMS.values():
        quantised, _, _ = written(model, form, inputs)
        onnx.checker.check_model(quantised, full_check=True)
        names = [node.name for node in quantised.graph.node if node.name]
        assert len(set(names)) == len(names)
        assert [node.name for node in quantised.graph.node if node.op_type not in NEW] == [
            node.name for node in model.graph.node
        ]
        found, expected = (plain_session(one, True).run(None, inputs)[0] for one in (quantised, model))
        assert largest_error(found, expected) < 0.05


def test_tensors_in_int8_are_told_by_their_names_in_floating_point() -> None:
    model = network(RESIDUAL)
    quantised, _, _ = written(model, FORMS["onnxruntime"], random_inputs(model))
    known = {name for node in model.graph.node for name in node.output}
    for node in quantised.graph.node:
        (told,) = in_float(node.output, {*known, "x", "w1", "w2", "w3", "b1", "b3"})
        assert node.output[0].startswith(told)
    assert in_float(["a", "a_quantized", "a_dequantized", "a_dequantized_1", "nothing"], {"a", "b"}) == ("a",)
    assert in_float(["a_quantized"], {"a", "a_quantized"}) == ("a_quantized",)


def test_what_the_integers_say_is_what_is_written() -> None:
    """One product by hand."""
    model = network("g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w> { [one] y = MatMul (x, w) }")
    grid = grid_between(np.asarray(-1.0), np.asarray(1.0), signed=True, symmetric=True)
    weight = IntegerWeight(np.array([[127, -3], [5, 0]], np.int8), np.array([0.5, 2.0], np.float32))
    quantised = write_int8(model, find_placement(model, FORMS["tensorrt"]), Integers({"x": grid}, {"w": weight}))
    (found,) = plain_session(quantised).run(None, {"x": np.array([[1.0, 0.126], [-7.0, 0.0]], np.float32)})
    x = np.array([[127, 16], [-128, 0]]) / 127  # -7 is cut off
    np.testing.assert_allclose(found, x @ np.array([[63.5, -6.0], [2.5, 0.0]]), rtol=1e-5)


def test_onnx_runtime_leaves_layers_in_floating_point_alone(tmp_path: Path) -> None:
    """It rounds the weights of those that read what was dequantised by one scale."""
    model, form = residual(), FORMS["onnxruntime"]
    inputs = {"input": np.random.default_rng(0).normal(size=(2, 4, 9, 9)).astype(np.float32)}
    chosen = {"conv0", "conv1", "conv3", "conv5"}
    in_int8, placement, _ = written(model, form, inputs, chosen)
    assert {reader for one in placement.apart.values() for reader in one.readers} == {("conv2", 0), ("conv4", 0)}
    onnx.checker.check_model(in_int8, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = ort.InferenceSession(in_int8.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert (
        kinds["QLinearConv"] == 2
    )  # the first two; two others read what has a sign, the result of the last one leaves
    assert kinds["Conv"] + kinds["FusedConv"] == 4
    as_written = plain_session(in_int8).run(None, inputs)[0]
    np.testing.assert_allclose(session.run(None, inputs)[0], as_written, atol=0.02 * np.abs(as_written).max())
