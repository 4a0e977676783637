"""What the dense network computes is found again for any samples, whatever axis they lie on."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.training.dense_outputs import DenseOutputs

WIDTH, BATCH = 16, 6


def time_first(time: int) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype("f4"), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Transpose", ["a"], ["y"], perm=[1, 0, 2])]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", time, WIDTH])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [time, "batch", WIDTH])
    graph = helper.make_graph(nodes, "g", [given], [made], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("time", [BATCH, 3])
def test_as_many_positions_as_samples_are_not_taken_for_samples(time: int) -> None:
    values = np.random.default_rng(1).standard_normal((4 * BATCH, time, WIDTH)).astype("f4")
    samples = Samples({"x": values})
    network = Network(Prepared(time_first(time)))
    dense = DenseOutputs(network, samples)
    for index in (np.arange(BATCH), np.arange(BATCH, 2 * BATCH), np.arange(2 * BATCH)[::-2]):
        expected = network.run(samples.take(index))["y"]
        np.testing.assert_allclose(dense(index)["y"].float(), expected.float(), atol=0.2)  # one is in bfloat16
