from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_spdy.runtimes import ModelRefused, Workload
from onnx_spdy.runtimes.fused_layers import covered_outputs
from onnx_spdy.runtimes.model_file import fix_model
from onnx_spdy.runtimes.opset import lower_versions


@pytest.fixture
def tokens(tmp_path):
    """Two integer inputs of dynamic length."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in ("ids", "mask")]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["ids", "mask"], ["y"])],
        "tokens",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["batch", "length"])],
    )
    path = tmp_path / "tokens.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def shape(value):
    return [axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_a_dynamic_batch_becomes_fixed_in_a_copy(conv_net):
    path = conv_net()
    before = path.read_bytes()
    fixed = fix_model(path, Workload(5))
    assert shape(fixed.proto.graph.input[0]) == [5, 8, 12, 12]
    assert shape(fixed.proto.graph.output[0]) == [5, 10]
    assert fixed.inputs["x"].shape == (5, 8, 12, 12)
    assert fixed.precision == "fp32"
    assert path.read_bytes() == before
    np.testing.assert_array_equal(fixed.inputs["x"], fix_model(path, Workload(5)).inputs["x"])


def test_samples_fill_the_batch_and_tell_the_other_axes(tokens):
    ids = np.arange(6).reshape(2, 3)
    fixed = fix_model(tokens, Workload(5, inputs={"ids": ids}))
    np.testing.assert_array_equal(fixed.inputs["ids"], ids[[0, 1, 0, 1, 0]])
    assert fixed.inputs["mask"].shape == (5, 3)
    assert set(np.unique(fixed.inputs["mask"])) <= {0, 1}
    assert shape(fixed.proto.graph.output[0]) == [5, 3]


def test_a_dynamic_axis_without_an_example_is_refused(tokens):
    with pytest.raises(ModelRefused, match=r"axis 1 \('length'\) of input 'ids' is dynamic; give an example"):
        fix_model(tokens, Workload(1))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"id": np.zeros((1, 3), np.int64)}, "not in the graph"),
        ({"ids": np.zeros((1, 3), np.int32)}, "int32; the graph takes int64"),
        ({"ids": np.zeros(3, np.int64)}, "2 axes"),
        ({"ids": np.zeros((0, 3), np.int64)}, "0 samples"),
        ({"ids": np.zeros((1, 3), np.int64), "mask": np.zeros((1, 4), np.int64)}, "'length' is 3"),
    ],
)
def test_samples_that_do_not_fit_are_an_error(tokens, inputs, message):
    with pytest.raises(ValueError, match=message):
        fix_model(tokens, Workload(1, inputs=inputs))


def test_an_operator_that_did_not_change_is_renumbered(conv_net):
    model = onnx.load(conv_net(opset=20))
    before = [node.SerializeToString() for node in model.graph.node]
    lower_versions(model, opset=19, ir_version=9, engine="tester")
    assert (model.opset_import[0].version, model.ir_version) == (19, 9)
    assert [node.SerializeToString() for node in model.graph.node] == before
    onnx.checker.check_model(model, full_check=True)


def test_an_operator_that_changed_is_refused_by_name(conv_net):
    model = onnx.load(conv_net(opset=21))  # Flatten is another in 21
    with pytest.raises(ModelRefused, match=r"tester knows opset 19, the model has 21, and Flatten 'flat' changed"):
        lower_versions(model, opset=19, ir_version=9, engine="tester")


def test_a_low_opset_stays(conv_net):
    model = onnx.load(conv_net(opset=13))
    lower_versions(model, opset=19, ir_version=9, engine="tester")
    assert model.opset_import[0].version == 13


def test_a_row_covers_the_layers_fused_into_it():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("BatchNormalization", ["conv", "s", "b", "m", "v"], ["norm"]),
        helper.make_node("Relu", ["norm"], ["relu"]),
        helper.make_node("MatMul", ["relu", "w2"], ["left"]),
        helper.make_node("MatMul", ["relu", "w3"], ["right"]),
        helper.make_node("Add", ["left", "right"], ["sum"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [])
    assert covered_outputs(graph, [("relu",), (), ("sum",)]) == [("conv", "relu"), (), ("left", "right", "sum")]
    assert covered_outputs(graph, [("norm",), ("left",), ("sum",)]) == [("conv", "norm"), ("left",), ("right", "sum")]
