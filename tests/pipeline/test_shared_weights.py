"""A weight that two convolutions share: one layer, whose Hessian and time are those of both uses."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Prepared, find_layers, load_model, write_weights
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.hessian import collect_hessians
from onnx_spdy.pipeline.database.layer_database import build_database
from onnx_spdy.pipeline.database.pruners import NamedPruner
from onnx_spdy.pipeline.database.pruners.magnitude import magnitude
from onnx_spdy.pipeline.latency.equations import Row
from onnx_spdy.pipeline.latency.fit_zeros import LayersRow, together
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.level import DENSE, Level, levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.site import Site
from onnx_spdy.runtimes import Workload
from onnx_spdy.runtimes.fake import FakeRuntime

OVERHEAD, PER_MAC = 1e-6, 1e-9


@pytest.fixture
def model() -> onnx.ModelProto:
    """`head` on an image and on a smaller one, and a layer of its own before."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "stem"], ["s"], "stem", pads=[1, 1, 1, 1]),
        node("Relu", ["s"], ["r"], "relu"),
        node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["r", "head"], ["large"], "head_1"),
        node("Conv", ["p", "head"], ["small"], "head_2"),
        node("Flatten", ["large"], ["y"], "flat_1"),
        node("Flatten", ["small"], ["z"], "flat_2"),
    ]
    arrays = {"stem": rng.standard_normal((16, 3, 3, 3)), "head": rng.standard_normal((24, 16, 1, 1))}
    shapes = {"x": ["batch", 3, 8, 8], "y": ["batch", 24 * 64], "z": ["batch", 24 * 16]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "shared", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def samples() -> Samples:
    return Samples({"x": np.random.default_rng(1).standard_normal((64, 3, 8, 8)).astype(np.float32)})


def test_one_after_another_its_later_use_is_pruned_too(tmp_path):
    """`twice` is used before and behind `middle`: what comes last sees both of its uses pruned."""
    rng = np.random.default_rng(0)
    used = [("x", "stem"), ("a", "twice"), ("b", "middle"), ("c", "twice"), ("d", "last")]
    nodes = [
        helper.make_node("Conv", [source, name], [output], f"{name}_{output}", pads=[1, 1, 1, 1])
        for (source, name), output in zip(used, "abcdy", strict=True)
    ]
    shapes = {"stem": (16, 3, 3, 3)} | dict.fromkeys(("twice", "middle", "last"), (16, 16, 3, 3))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "twice", [value("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("y", TensorProto.FLOAT, ["batch", 16, 8, 8])],
        [numpy_helper.from_array(rng.normal(0, 0.1, shape).astype("f4"), name) for name, shape in shapes.items()],
    )  # fmt: skip
    network = Network(Prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)))
    samples = Samples({"x": rng.standard_normal((16, 3, 8, 8)).astype(np.float32)})
    given = []

    def seen(weight, hessian, levels):
        given.append(hessian.clone())
        yield from magnitude(weight, hessian, levels)

    level = Level("unstructured", 0.5)
    compression = Compression((DENSE, level), NamedPruner("seen", seen), sequential=True)
    database = build_database(network, samples, compression, tmp_path)
    stem, twice, middle, last = network.layers
    assert len(twice.nodes) == 2
    before = {}
    for layer in (stem, twice, middle):
        before |= {
            name: one.numpy() for name, one in database.weights(network, Site(layer.name, (layer,)), level).items()
        }
    pruned = Network(Prepared(write_weights(network.model, before)))
    expected = collect_hessians(pruned, [last], samples)[last.name]
    torch.testing.assert_close(given[-1], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_its_hessian_is_the_mean_over_what_both_uses_see(model, samples):
    network = Network(Prepared(model))
    stem, head = network.layers
    seen: list[torch.Tensor] = []
    hooks = [
        network.graph.node(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for name in head.nodes
    ]
    network.run(samples)
    for hook in hooks:
        hook.remove()
    patches = torch.cat([x.movedim(1, -1).reshape(-1, 16) for x in seen]).double()
    assert len(patches) == 64 * (64 + 16)
    found = collect_hessians(network, network.layers, samples)
    torch.testing.assert_close(found[head.name], patches.T @ patches / len(patches), rtol=1e-4, atol=1e-6)
    assert set(found) == {stem.name, head.name}


def test_its_time_is_that_of_both_uses(model):
    runtime = FakeRuntime(layer_overhead_seconds=OVERHEAD, seconds_per_mac=PER_MAC, node_seconds=0.0)
    table = measure_latency(Prepared(model), runtime, levels_for("unstructured"), Workload(2))
    stem, head = table.seconds[:, 0]
    assert stem == pytest.approx(OVERHEAD + PER_MAC * 2 * 64 * 16 * 27, rel=0.05)
    assert head == pytest.approx(2 * OVERHEAD + PER_MAC * 2 * (64 + 16) * 24 * 16, rel=0.05)
    assert table.layers == ("stem", "head_1")


def test_rows_of_one_layer_become_one():
    rows = [Row(("k", "a"), 1.0), Row(("b",), 2.0), Row(("l",), 4.0), Row(("k",), 8.0), Row(("l", "m"), 16.0)]
    expected = (LayersRow((), ("b",), 2.0), LayersRow((0,), ("a",), 9.0), LayersRow((1, 2), (), 20.0))
    assert together(rows, {"k": 0, "l": 1, "m": 2}) == expected


def test_it_is_pruned_once_and_both_uses_have_the_zeros(model, samples, tmp_path):
    runtime = FakeRuntime(layer_overhead_seconds=0.0, seconds_per_mac=PER_MAC, node_seconds=0.0)
    report = run(
        Prepared(model), samples, runtime, workload_of(samples, 2), Target(2.0, tmp_path),
        search=SearchSettings(time_limit_seconds=2),
    )  # fmt: skip
    assert report.content["measured_speedup_lower"] >= 2.0
    pruned = load_model(tmp_path / "model.onnx")
    head = next(tensor for tensor in pruned.graph.initializer if tensor.name == "head")
    assert (numpy_helper.to_array(head) == 0).mean() > 0.3
    assert [layer.nodes for layer in find_layers(pruned) if layer.prunable] == [("stem",), ("head_1", "head_2")]
