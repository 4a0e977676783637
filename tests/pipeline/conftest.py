"""A small network with a Conv, a strided Conv, a Gemm and a MatMul, and samples for it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network


def build_model(seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        return numpy_helper.from_array(rng.normal(0, 1 / np.sqrt(fan_in), shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["input", "a.weight", "a.bias"], ["a"], "conv_a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ra"], "relu_a"),
        helper.make_node("Conv", ["ra", "b.weight", "b.bias"], ["b"], "conv_b", pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Relu", ["b"], ["rb"], "relu_b"),
        helper.make_node("GlobalAveragePool", ["rb"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "c.weight", "c.bias"], ["c"], "gemm_c", transB=1),
        helper.make_node("Relu", ["c"], ["rc"], "relu_c"),
        helper.make_node("MatMul", ["rc", "d.weight"], ["d"], "matmul_d"),
        helper.make_node("Add", ["d", "d.bias"], ["output"], "add_d"),
    ]
    initializers = [
        weight("a.weight", 16, 3, 3, 3), weight("a.bias", 16), weight("b.weight", 24, 16, 3, 3), weight("b.bias", 24),
        weight("c.weight", 32, 24), weight("c.bias", 32), weight("d.weight", 32, 10), weight("d.bias", 10),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 12, 12])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


@pytest.fixture(scope="session")
def model() -> onnx.ModelProto:
    return build_model()


@pytest.fixture
def any_size(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network for images of any size."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for number, name in ((2, "height"), (3, "width")):
        copy.graph.input[0].type.tensor_type.shape.dim[number].dim_param = name
    return copy


@pytest.fixture
def network(model: onnx.ModelProto) -> Network:
    return Network(Prepared(model))


@pytest.fixture
def samples() -> Samples:
    rng = np.random.default_rng(1)
    images = rng.normal(size=(96, 3, 12, 12)).astype(np.float32).cumsum(axis=3)
    return Samples({"input": images}, rng.integers(0, 10, 96))
