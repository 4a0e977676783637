"""DeepSparse's copy of a graph means the same in the words that it knows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.runtimes.base import ModelRefused
from onnx_spdy.runtimes.deepsparse.graph import decompose_unsupported

X = np.random.default_rng(0).normal(1, 3, (2, 5, 8)).astype(np.float32)


def model(nodes: list[onnx.NodeProto], arrays: dict[str, np.ndarray], opset: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 5, 8])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def results(network: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def operators(network: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in network.graph.node)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_norm_is_written_as_its_formula(opset: int, bias: bool) -> None:
    arrays = {"scale": np.linspace(0.5, 2, 8, dtype=np.float32)}
    arrays |= {"bias": np.linspace(-1, 1, 8, dtype=np.float32)} if bias else {}
    network = model(
        [helper.make_node("LayerNormalization", ["x", *arrays], ["output"], "n", epsilon=0.1)], arrays, opset
    )
    expected = results(network)
    decompose_unsupported(network)
    onnx.checker.check_model(network)
    assert operators(network)["LayerNormalization"] == 0
    np.testing.assert_allclose(results(network), expected, atol=1e-5)


def test_a_norm_over_several_axes_stays() -> None:
    arrays = {"scale": np.ones((5, 8), np.float32)}
    network = model([helper.make_node("LayerNormalization", ["x", "scale"], ["output"], "n", axis=1)], arrays, 17)
    before = network.SerializeToString()
    decompose_unsupported(network)
    assert network.SerializeToString() == before


def gelu(*, read_twice: bool = False) -> onnx.ModelProto:
    make = helper.make_node
    arrays = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    nodes = [
        make("Div", ["x", "root"], ["scaled"], "a"), make("Erf", ["scaled"], ["erf"], "b"),
        make("Add", ["erf", "one"], ["sum"], "c"), make("Mul", ["half", "sum"], ["share"], "d"),
        make("Mul", ["x", "share"], ["gelu"], "e"),
        make("Add", ["gelu", "share" if read_twice else "x"], ["output"], "f"),
    ]  # fmt: skip
    return model(nodes, {name: np.array(value) for name, value in arrays.items()}, 17)


def test_the_half_of_gelu_is_multiplied_last_and_nothing_changes() -> None:
    network = gelu()
    expected = results(network)
    decompose_unsupported(network)
    assert [list(node.input) for node in network.graph.node[3:5]] == [["x", "sum"], ["share", "half"]]
    np.testing.assert_allclose(results(network), expected, rtol=1e-6)  # ONNX Runtime has a kernel of its own for it


def test_a_half_that_another_node_reads_stays() -> None:
    network = gelu(read_twice=True)
    before = network.SerializeToString()
    decompose_unsupported(network)
    assert network.SerializeToString() == before


def test_weights_that_a_graph_inside_a_node_reads_stay_where_zeros_are_drawn() -> None:
    network = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 2] x, bool on) => (float[batch, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2] v = {5, 6}> {
            n = LayerNormalization (x, v)
            y = If (on) <then_branch = a () => (float[k, 2] t) { t = MatMul (n, w) },
                         else_branch = b () => (float[k, 2] e) { e = Add (n, v) }>
        }""")
    choose = network.graph.node[1].SerializeToString()
    decompose_unsupported(network)
    assert {"w", "v"} < {tensor.name for tensor in network.graph.initializer}
    assert network.graph.node[-1].SerializeToString() == choose
    onnx.checker.check_model(network)


def test_a_graph_that_cannot_be_read_is_refused_in_one_line() -> None:
    network = gelu()
    network.graph.node[0].attribute.append(helper.make_attribute("text", b"\xff"))
    message = r"^this graph can't be brought into the form that deepsparse knows: UnicodeDecodeError"
    with pytest.raises(ModelRefused, match=message):
        decompose_unsupported(network)
