"""OpenVINO: what its own naming, counters and manners need."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.runtimes import RuntimeUnavailable, UnknownPrecision, Workload, open_runtime, runtime_spec
from onnx_spdy.runtimes.vino import _after_warmup, _Executed, _rows


@pytest.fixture
def runtime():
    with open_runtime("openvino") as opened:
        try:
            opened.check()
        except RuntimeUnavailable as exc:
            pytest.skip(str(exc))
        yield opened


@pytest.fixture
def bf16():
    with open_runtime("openvino:bf16") as opened:
        try:
            opened.check()
        except RuntimeUnavailable as exc:
            pytest.skip(str(exc))
        yield opened


@pytest.fixture
def residual_net(tmp_path):
    """Conv + BatchNormalization + Relu twice around a shortcut, then a Gemm with bias and a MatMul + Add."""
    random = np.random.default_rng(2)
    tensors = {
        "w0": random.standard_normal((16, 8, 3, 3)), "w1": random.standard_normal((16, 16, 3, 3)),
        "w2": random.standard_normal((12, 16)), "b2": random.standard_normal(12),
        "w3": random.standard_normal((12, 6)), "b3": random.standard_normal(6),
        "scale": np.ones(16), "shift": np.full(16, 0.1), "mean": np.zeros(16), "variance": np.ones(16),
    }  # fmt: skip
    norm = ["scale", "shift", "mean", "variance"]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["conv0"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv0", *norm], ["norm0"]),
        helper.make_node("Relu", ["norm0"], ["relu0"]),
        helper.make_node("Conv", ["relu0", "w1"], ["conv1"], "same name", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["conv1", *norm], ["norm1"], "same name"),
        helper.make_node("Add", ["norm1", "relu0"], ["sum"], "with,comma"),
        helper.make_node("Relu", ["sum"], ["relu1"]),
        helper.make_node("GlobalAveragePool", ["relu1"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w2", "b2"], ["gemm"], transB=1, alpha=0.5),
        helper.make_node("Tanh", ["gemm"], ["tanh"]),
        helper.make_node("MatMul", ["tanh", "w3"], ["matmul"]),
        helper.make_node("Add", ["matmul", "b3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 24, 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )  # fmt: skip
    path = tmp_path / "residual.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("threads", [1, None])
def test_every_layer_has_one_row_though_openvino_fuses_and_renames(runtime, residual_net, threads):
    rows = runtime.layer_seconds(residual_net, Workload(2, threads), iterations=5, warmup=2)
    of = {name: row for row in rows for name in row.outputs}
    assert len(of) == sum(len(row.outputs) for row in rows)
    assert of.keys() >= {"conv0", "conv1", "gemm", "matmul"}
    assert [of[name].kernel.split()[0] for name in ("conv0", "conv1")] == ["Convolution"] * 2
    assert of["conv0"] is of["relu0"] is not of["conv1"]
    assert of["conv0"].seconds > 0
    assert {"node_1", "same name", "with,comma"}.isdisjoint(of)


def test_rows_are_attributed_as_openvino_names_them(residual_net):
    """As 2026.4 does it: Conv + BatchNormalization get new weights and a new name, the last node is called y."""
    graph = onnx.load(residual_net).graph
    for number, node in enumerate(graph.node):
        node.name = f"n{number}"
    nodes = [
        _Executed("Reorder", "jit", ("",), 3.0),
        _Executed("Convolution", "brgconv", ("Multiply_36", "n1", "n2"), 40.0),
        _Executed("Convolution", "brgconv", ("Multiply_39", "n4"), 50.0),
        _Executed("Eltwise", "jit", ("n5", "n6"), 5.0),
        _Executed("Reshape", "unknown", ("n8",), 0.0),
        _Executed("Transpose", "ref", ("n9/transpose_b",), 1.0),
        _Executed("FullyConnected", "brgemm", ("n9", "n10"), 20.0),
        _Executed("FullyConnected", "brgemm", ("y",), 10.0),
        _Executed("Output", "unknown", ("y/sink_port_0",), 0.0),
    ]
    rows = _rows(nodes, 200e-6, graph)
    assert [(set(row.outputs), row.kernel, round(1e6 * row.seconds, 6)) for row in rows] == [
        (set(), "Reorder jit", 3),
        ({"conv0", "norm0", "relu0"}, "Convolution brgconv", 40),
        ({"conv1", "norm1"}, "Convolution brgconv", 50),
        ({"sum", "relu1"}, "Eltwise jit", 5),
        ({"flat"}, "Reshape unknown", 0),
        (set(), "Transpose ref", 1),
        ({"gemm", "tanh"}, "FullyConnected brgemm", 20),
        ({"matmul", "y"}, "FullyConnected brgemm", 10),
        (set(), "outside the nodes", 71),
    ]


def test_rows_add_up_to_what_a_run_takes(runtime, residual_net):
    workload = Workload(8, 1)
    ratios = []  # in turns, and the best counts: a shared machine may run at another speed a second later
    for _ in range(6):
        with runtime.open(residual_net, workload) as session:
            seconds = np.median(session.seconds(40, warmup=10))
        rows = runtime.layer_seconds(residual_net, workload, iterations=20, warmup=5)
        ratios.append(sum(row.seconds for row in rows) / seconds)
        assert rows[-1].outputs == ()
    assert min(abs(ratio - 1) for ratio in ratios) < 0.3


def test_runs_before_the_profile_do_not_count():
    """Two warm-up runs of 500 us, then three of 10 us, as OpenVINO's running means show them."""
    before = {"n": _Executed("Convolution", "jit", ("n0",), 500.0)}
    after = {"n": _Executed("Convolution", "jit", ("n0",), 206.0)}
    assert _after_warmup(before, 2, after, 3) == [_Executed("Convolution", "jit", ("n0",), 10.0)]


def test_bf16_is_bf16(bf16, runtime, conv_net):
    x = np.random.default_rng(0).standard_normal((4, 8, 12, 12)).astype(np.float32)
    with bf16.open(conv_net(), Workload(4, 1)) as short, runtime.open(conv_net(), Workload(4, 1)) as full:
        assert (short.environment.precision, full.environment.precision) == ("bf16", "fp32")
        assert short.environment.mismatch(full.environment).keys() == {"precision"}
        difference = (
            np.abs(short.run({"x": x})["y"] - full.run({"x": x})["y"]).max() / np.abs(full.run({"x": x})["y"]).max()
        )
    assert 1e-5 < difference < 0.02  # more than any order of summation in fp32 makes


def test_a_cpu_without_bf16_instructions_is_told(runtime, monkeypatch):
    class Core:
        def get_property(self, device, name):
            return {"OPTIMIZATION_CAPABILITIES": ["FP32", "INT8"]}[name]

    monkeypatch.setattr("openvino.Core", Core)
    with pytest.raises(RuntimeUnavailable, match=r"needs a CPU with bf16 instructions.*use openvino in fp32"):
        open_runtime("openvino:bf16").check()


@pytest.mark.parametrize("precision", ["", "fp8"])
def test_an_unknown_precision_lists_the_known_ones(precision):
    with pytest.raises(UnknownPrecision, match=f"{precision!r}; there are fp32, bf16"):
        open_runtime(f"openvino:{precision}")


def test_the_default_precision_is_the_one_of_other_engines():
    assert runtime_spec(open_runtime("openvino")) == "openvino:fp32"


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(RuntimeUnavailable, match="pip install openvino"):
        open_runtime("openvino").check()


def test_nothing_is_reported_to_anybody(runtime, tmp_path):
    """OpenVINO's telemetry leaves an id and a counter in the home folder before it sends."""
    code = (
        "import sys; from onnx_spdy.runtimes import open_runtime; open_runtime('openvino').check(); "
        "print({'openvino', 'openvino_telemetry'} & set(sys.modules))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "{'openvino'}"
    assert list(tmp_path.iterdir()) == []


def test_the_calling_thread_may_run_everywhere_afterwards(runtime, conv_net):
    """OpenVINO pins its threads while it runs; other engines in this process must not inherit that."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no affinity")
    before = os.sched_getaffinity(0)
    with runtime.open(conv_net(), Workload(1)) as session:
        session.seconds(3)
        assert os.sched_getaffinity(0) == before
