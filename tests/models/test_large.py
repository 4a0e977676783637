"""A network over 2 GiB, which no single protobuf message holds: its weights are in a second file.

The real one takes 8 GiB of memory and 5 GiB of disk, and is run where LARGE=1 is set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_spdy.models import graph, prepare

LAYERS, WIDTH = 9, 8192  # 9 x 256 MiB = 2.25 GiB


def small(build) -> onnx.ModelProto:
    """Two layers with a BatchNormalization that is folded and a shape that is computed."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Identity", ["x"], ["i"], "identity"),
        helper.make_node("MatMul", ["i", "w1"], ["a"], "first"),
        helper.make_node("Shape", ["a"], ["shape"], "shape"),
        helper.make_node("Reshape", ["a", "shape"], ["r"], "reshape"),
        helper.make_node("Add", ["three", "three"], ["six"], "numbers"),
        helper.make_node("Mul", ["r", "six"], ["s"], "scale"),
        helper.make_node("MatMul", ["s", "w2"], ["y"], "second"),
    ]
    arrays = {
        "w1": rng.standard_normal((64, 64), np.float32),
        "three": np.float32(3),
        "unused": rng.standard_normal((64, 64), np.float32),
        "w2": rng.standard_normal((64, 64), np.float32),
    }
    return build(nodes, {"x": [None, 64]}, {"y": [None, 64]}, arrays)


def test_weights_that_are_set_aside_come_back_as_they_were(build, monkeypatch):
    model = small(build)
    expected = prepare(model).proto
    monkeypatch.setattr(graph, "LARGEST_PROTOBUF_BYTES", 2000)
    monkeypatch.setattr(sys.modules[prepare.__module__], "LARGEST_PROTOBUF_BYTES", 2000)
    monkeypatch.setattr(sys.modules[prepare.__module__], "UNTOUCHED_BYTES", 1000)
    before = model.SerializeToString()
    prepared = prepare(model).proto
    assert model.SerializeToString() == before
    assert [node.op_type for node in prepared.graph.node] == ["MatMul", "Mul", "MatMul"]
    assert prepared.graph.node == expected.graph.node and prepared.graph.input == expected.graph.input
    stored = {tensor.name: tensor for tensor in prepared.graph.initializer}
    assert set(stored) == {tensor.name for tensor in expected.graph.initializer} and "unused" not in stored
    assert all(stored[tensor.name].raw_data == tensor.raw_data for tensor in expected.graph.initializer)
    assert prepare(prepared).proto.SerializeToString() == prepared.SerializeToString()


# In a process of its own, so that its peak of memory is its own.
WHOLE_PATH = """
import resource, sys
import numpy as np, torch
from pathlib import Path
from onnx_spdy.models import TorchGraph, changed_initializers, differences, find_layers, load_model, prepare
from onnx_spdy.models import save_model, write_weights
path = Path(sys.argv[1])
model = prepare(load_model(path)).proto
layers = find_layers(model)
print(len(layers), sum(layer.prunable for layer in layers))
x = torch.randn(1, 8192)
graph = TorchGraph(model)
with torch.no_grad():
    (dense,) = graph({"x": x}).values()
    weight = dict(graph.named_parameters())["w8"]
    weight[:, ::2] = 0
    (expected,) = graph({"x": x}).values()
    values = weight.numpy().copy()
del graph, weight
written = write_weights(model, {"w8": values})
print(changed_initializers(model, written), differences(model, written))
del model
save_model(written, path.with_name("pruned.onnx"))
del written
import onnxruntime as ort
options = ort.SessionOptions()
options.add_session_config_entry("session.disable_prepacking", "1")
(found,) = ort.InferenceSession(str(path.with_name("pruned.onnx")), options).run(None, {"x": x.numpy()})
print(np.abs(found - expected.numpy()).max() <= 1e-4 * np.abs(found).max(), np.abs(found - dense.numpy()).max() > 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif("LARGE" not in os.environ, reason="takes 8 GiB of memory and 5 GiB of disk; set LARGE=1 to run it")
def test_a_network_over_2_gib_goes_from_file_to_pruned_file(tmp_path):
    path = large_network(tmp_path)
    done = subprocess.run([sys.executable, "-c", WHOLE_PATH, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    layers, written, same, peak_gib = done.stdout.splitlines()
    assert layers == f"{LAYERS} {LAYERS}" and written == "['w8'] []" and same == "True True"
    assert float(peak_gib) < 3 * 2.25 + 1.5  # the model, its copy with other weights, what runs it; and libraries


def large_network(folder: Path) -> Path:
    """Weights that cost little to make: one row of random numbers, shifted."""
    row = np.random.default_rng(0).standard_normal(2 * WIDTH).astype(np.float32) / np.sqrt(np.float32(WIDTH))
    matrix = np.lib.stride_tricks.sliding_window_view(row, WIDTH)[:WIDTH]
    names = ["x", *(f"t{i}" for i in range(LAYERS - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"layer{i}") for i in range(LAYERS)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "large", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip
    with (folder / "weights.bin").open("wb") as stream:
        for i in range(LAYERS):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            tensor.data_location = TensorProto.EXTERNAL
            places = {"location": "weights.bin", "offset": stream.tell(), "length": matrix.size * 4}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
            stream.write(np.ascontiguousarray(matrix).tobytes())
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"
