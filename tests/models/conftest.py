"""Networks that the tests of models/ share: small ones made here, and real ones where they are at hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def real_file() -> Callable[[str], Path]:
    """A file of the development data by name; the test is skipped where there is none."""

    def find(name: str) -> Path:
        if not (DATA / name).is_file():
            pytest.skip(f"needs {DATA / name}, which isn't part of the repository")
        return DATA / name

    return find


@pytest.fixture
def real_networks(real_file, monkeypatch):
    """The module `networks.py` of the development data."""
    folder = real_file("networks.py").parent
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import networks

    yield networks
    del sys.modules["networks"]


@pytest.fixture
def build() -> Callable[..., onnx.ModelProto]:
    """Make a checked model from nodes, shapes of inputs and outputs, and arrays as initializers."""

    def make(nodes, inputs, outputs, initializers=None, opset=18) -> onnx.ModelProto:
        def values(shapes):
            return [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
                if not isinstance(shape, tuple)
                else helper.make_tensor_value_info(name, *shape)
                for name, shape in shapes.items()
            ]

        stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in (initializers or {}).items()]
        graph = helper.make_graph(nodes, "graph", values(inputs), values(outputs), stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
        onnx.checker.check_model(model)
        return model

    return make


@pytest.fixture
def small_cnn(build) -> onnx.ModelProto:
    """conv1 -> relu -> depthwise -> pool -> flatten -> fc, with an open batch; weights from seed 0."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    node = helper.make_node
    nodes = [
        node("Conv", ["input", "conv1.weight", "conv1.bias"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("Conv", ["r1", "dw.weight"], ["c2"], "dw", group=16, pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c2"], ["p"], "pool"),
        node("Flatten", ["p"], ["f"], "flatten"),
        node("Gemm", ["f", "fc.weight", "fc.bias"], ["logits"], "fc", transB=1),
    ]
    initializers = {
        "conv1.weight": random(16, 3, 3, 3),
        "conv1.bias": random(16),
        "dw.weight": random(16, 1, 3, 3),
        "fc.weight": random(20, 16),
        "fc.bias": random(20),
    }
    return build(nodes, {"input": ["batch", 3, 8, 8]}, {"logits": ["batch", 20]}, initializers)
