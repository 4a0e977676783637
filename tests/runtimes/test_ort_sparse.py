"""The runtime `sparse` beyond what every runtime promises: its rows, and what it says when it isn't there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.runtimes import RuntimeUnavailable, Workload, open_runtime

BATCH = 2


@pytest.fixture
def runtime():
    with open_runtime("sparse") as opened:
        try:
            opened.check()
        except RuntimeUnavailable as exc:
            pytest.skip(str(exc))
        yield opened


@pytest.fixture
def residual_block(tmp_path: Path) -> Path:
    """Conv, Relu, Conv, Add, Relu with 95 % zeros, then a dense Conv and a Softmax."""
    rng = np.random.default_rng(0)

    def weight(*shape: int, zeros: float) -> np.ndarray:
        return (rng.standard_normal(shape) * (rng.random(shape) >= zeros)).astype(np.float32)

    arrays = {
        "w0": weight(32, 32, 3, 3, zeros=0.95),
        "w1": weight(32, 32, 3, 3, zeros=0.95),
        "w2": weight(32, 32, 1, 1, zeros=0.0),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w0"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["ra"]),
        node("Conv", ["ra", "w1"], ["b"], pads=[1, 1, 1, 1]),
        node("Add", ["b", "x"], ["s"]),
        node("Relu", ["s"], ["rs"]),
        node("Conv", ["rs", "w2"], ["c"]),
        node("Softmax", ["c"], ["y"], axis=1),
    ]
    shape = ["batch", 32, 24, 24]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "block", [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    path = tmp_path / "block.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_a_row_says_what_ran_in_which_kernel(runtime, residual_block):
    rows = runtime.layer_seconds(residual_block, Workload(BATCH, 1), iterations=3, warmup=1)
    of = {name: row for row in rows for name in row.outputs}
    assert {"a", "ra"} <= set(of["a"].outputs)
    assert {"b", "s", "rs"} <= set(of["b"].outputs)
    for name, sparse in (("a", True), ("b", True), ("c", False), ("y", False)):
        assert of[name].sparse == sparse
        assert (of[name].kernel == "spdy") == sparse
    assert of["b"].kernel_sparsity == pytest.approx(0.95, abs=0.01)
    assert rows[-1].outputs == ()  # copies into the engine's layout, and what ONNX Runtime does between nodes


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_spdy", None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install onnxruntime-ep-spdy, from runtimes/sparse"):
        open_runtime("sparse").check()
