"""TensorRT without TensorRT: what it writes is read from texts in the documented formats, the rest with a stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_spdy.runtimes import ModelRefused, RuntimeUnavailable, Workload, reason_in
from onnx_spdy.runtimes.nvidia.cpu_device import CpuDevice
from onnx_spdy.runtimes.nvidia.trt import TensorRt
from onnx_spdy.runtimes.nvidia.trt_engine import TrtPackage
from onnx_spdy.runtimes.nvidia.trt_log import (
    ProfiledLayer,
    SparsityLists,
    UnreadableLog,
    engine_layers,
    exported_profile,
    exported_times,
    logged_device,
    logged_version,
    printed_profile,
    sparsity_lists,
)

BATCH = 2

# As the developer guide and trtexec's own output show them; the times are made up.
BUILD_LOG = """
&&&& RUNNING TensorRT.trtexec [TensorRT v100300] [b26] # trtexec --onnx=net.onnx --sparsity=enable
[03/23/2026-00:14:00] [I] === Device Information ===
[03/23/2026-00:14:00] [I] Selected Device: NVIDIA Something 90
[03/23/2026-00:14:00] [I] Compute Capability: 8.6
[03/23/2026-00:14:05] [I] [TRT] (Sparsity) Layers eligible for sparse math: conv1 + relu1, conv2, MatMul_3
[03/23/2026-00:14:05] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2
[03/23/2026-00:14:06] [I] Engine built in 5.1 sec.
"""
PRINTED = """
[03/23/2026-00:14:15] [I] === Profile (2094 iterations ) ===
[03/23/2026-00:14:15] [I]    Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer
[03/23/2026-00:14:15] [I]       16.15       0.0077       0.0075       0.5   Reformatting CopyNode to a
[03/23/2026-00:14:15] [I]       47.82       0.0228       0.0225       1.6   conv1 + relu1
[03/23/2026-00:14:15] [I]       63.97       0.0305       0.0300     100.0   Total
[03/23/2026-00:14:15] [I]
"""


def test_the_lists_of_a_build_log():
    assert sparsity_lists(BUILD_LOG) == SparsityLists(("conv1 + relu1", "conv2", "MatMul_3"), ("conv2",))


def test_empty_lists_are_lists_and_missing_ones_an_error():
    nothing = "(Sparsity) Layers eligible for sparse math:\n" + (
        "(Sparsity) TRT inference plan picked sparse implementation for layers: \n"
    )
    assert sparsity_lists(nothing) == SparsityLists((), ())
    with pytest.raises(UnreadableLog, match="SPARSE_WEIGHTS"):
        sparsity_lists("[I] Engine built in 5.1 sec.")


@pytest.mark.parametrize("median", [True, False])
def test_a_printed_profile_with_and_without_medians(median):
    text = PRINTED if median else PRINTED.replace("   Median(ms)", "").replace("       0.0075", "").replace(
        "       0.0225", "").replace("       0.0300", "")  # fmt: skip
    assert printed_profile(text) == [
        ProfiledLayer("Reformatting CopyNode to a", pytest.approx(7.7e-6)),
        ProfiledLayer("conv1 + relu1", pytest.approx(22.8e-6)),
    ]
    with pytest.raises(UnreadableLog, match="dumpProfile"):
        printed_profile(BUILD_LOG)


def test_an_exported_profile():
    text = """[
      { "count" : 100 }
    , { "name" : "conv1 + relu1", "timeMs" : 2.5, "averageMs" : 0.025, "medianMs" : 0.024, "percentage" : 100 }
    ]"""
    assert exported_profile(text) == [ProfiledLayer("conv1 + relu1", pytest.approx(25e-6))]


def test_layer_information_detailed_or_names_only():
    detailed = {
        "Layers": [
            {
                "Name": "__myl_Fc_0",
                "LayerType": "kgen",
                "TacticName": "sm90_xmma",
                "Metadata": "[ONNX Layer: /a/MatMul]",
            },
            {"Name": "r", "LayerType": "Reformat"},
        ],
        "Bindings": ["x", "y"],
    }
    found = engine_layers(json.dumps(detailed))
    assert (found["__myl_Fc_0"].tactic, found["__myl_Fc_0"].metadata) == ("sm90_xmma", "[ONNX Layer: /a/MatMul]")
    assert (found["r"].tactic, found["r"].metadata) == ("Reformat", "")
    assert [*engine_layers('{"Layers": ["a", "b"], "Bindings": []}')] == ["a", "b"]


def test_times_version_and_device():
    assert exported_times('[{"computeMs": 0.5, "latencyMs": 0.7}]') == [0.0005]
    assert logged_version(BUILD_LOG) == "10.3.0"
    assert logged_version("[TensorRT v8601]") == "8.6.1"
    assert logged_version("[TensorRT v110102]") == "11.1.2"
    assert logged_device(BUILD_LOG) == ("NVIDIA Something 90", "8.6")


@pytest.mark.parametrize("read", [exported_profile, exported_times, engine_layers])
@pytest.mark.parametrize("text", ["", "[1, 2]", '{"Layers": [{}]}', '{"a": 1}', '[{"name": 1}]'])
def test_something_else_is_an_error_in_one_line(read, text):
    with pytest.raises(UnreadableLog) as caught:
        read(text)
    assert "\n" not in str(caught.value)


@pytest.fixture
def semi_structured_net(conv_net) -> Path:
    """The small network, both convolutions 2:4."""
    path = conv_net(batch=BATCH)
    model = onnx.load(path)
    for tensor in model.graph.initializer[:2]:
        weight = onnx.numpy_helper.to_array(tensor).copy()
        weight[:, 0::4] = weight[:, 1::4] = 0
        tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, path)
    return path


@pytest.fixture
def trtexec(tmp_path: Path, tensorrt_stand_in: ModuleType) -> str:
    """A command that is the stand-in."""
    command = tmp_path / "trtexec"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {tensorrt_stand_in.__file__} "$@"\n')
    command.chmod(0o755)
    return str(command)


@pytest.fixture(params=["package", "trtexec"])
def runtime(request, tensorrt_stand_in) -> TensorRt:
    if request.param == "trtexec":
        return TensorRt(trtexec=request.getfixturevalue("trtexec"))
    return TensorRt(backend=TrtPackage(tensorrt_stand_in.package(), CpuDevice()))


def test_rows_say_what_was_eligible_and_picked(runtime, semi_structured_net):
    rows = runtime.layer_seconds(semi_structured_net, Workload(BATCH), iterations=2, warmup=1)
    by_output = {row.outputs[0]: row for row in rows if row.outputs}
    assert by_output["a"].outputs == ("a", "b")  # with its Relu
    assert (by_output["a"].sparse, by_output["a"].kernel_sparsity) == (True, 0.5)
    assert not by_output["c"].sparse
    assert reason_in(by_output["c"].kernel) == "not picked by TensorRT"
    assert reason_in(by_output["y"].kernel) == ""  # its weights are dense
    assert [row.seconds for row in rows] == pytest.approx([0.25e-3] * len(rows))
    assert rows[0].outputs == ()  # the copy bears a layer's name, and is none


def test_outputs_times_and_environment(runtime, semi_structured_net):
    x = np.random.default_rng(0).standard_normal((BATCH, 8, 12, 12)).astype(np.float32)
    with runtime.open(semi_structured_net, Workload(BATCH)) as session:
        outputs = session.run({"x": x})
        seconds = session.seconds(3, warmup=2)
    expected = onnxruntime.InferenceSession(semi_structured_net, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(outputs["y"], expected[0], atol=0.01 * np.abs(expected[0]).max())
    assert len(seconds) == 3
    assert (session.environment.version, session.environment.precision) == ("10.3.0", "fp16")


def test_trtexec_runs_exactly_what_is_asked_and_the_warm_up_is_left_out(trtexec, semi_structured_net):
    with TensorRt(trtexec=trtexec).open(semi_structured_net, Workload(BATCH)) as session:
        assert session.seconds(2, warmup=3) == pytest.approx([3.5e-3, 4.5e-3])
        assert (session.environment.cpu, session.environment.instruction_set) == ("A stand-in", "sm_90")


@pytest.mark.parametrize("version", ["10.3.0", "11.0.0"])
def test_the_network_is_strongly_typed_sparse_and_its_timings_are_kept(
    version, tensorrt_stand_in, semi_structured_net, tmp_path, monkeypatch
):
    cache = tmp_path / "kept" / "cache"
    monkeypatch.setenv("ONNX_SPDY_TIMING_CACHE", str(cache))
    package = tensorrt_stand_in.package(version)
    runtime = TensorRt("fp16", backend=TrtPackage(package, CpuDevice()))
    cache.parent.mkdir()
    cache.write_bytes(b"of another GPU")
    for _ in range(2):
        runtime.open(semi_structured_net, Workload(BATCH)).close()
    assert package.made.flags == (2 if version.startswith("10") else 0)
    assert package.config.flags == {package.BuilderFlag.SPARSE_WEIGHTS}
    assert cache.read_bytes() == b"timings;timings;"
    model = onnx.load_from_string(package.made.model)
    assert {tensor.data_type for tensor in model.graph.initializer} == {onnx.TensorProto.FLOAT16}


def test_other_versions_are_not_used(tensorrt_stand_in, trtexec, monkeypatch):
    with pytest.raises(RuntimeUnavailable, match=r"8\.6\.1; versions 10 and 11"):
        TensorRt(backend=TrtPackage(tensorrt_stand_in.package("8.6.1"), CpuDevice())).check()
    monkeypatch.setenv("TRTEXEC_VERSION", "8601")
    with pytest.raises(RuntimeUnavailable, match=r"TensorRT 8\.6\.1; 10 or later"):
        TensorRt(trtexec=trtexec).check()


def test_what_tensorrt_refuses_is_told_in_its_words(runtime, tmp_path):
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Selu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [BATCH, 4])], [value("y", 1, [BATCH, 4])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "selu.onnx")
    if isinstance(runtime._backend, TrtPackage):
        runtime._backend._package.OnnxParser.parse = lambda self, model: False
    with pytest.raises(ModelRefused, match="no importer") as caught:
        runtime.open(tmp_path / "selu.onnx", Workload(BATCH))
    assert "\n" not in str(caught.value)


def test_without_tensorrt_it_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeUnavailable, match=r"no trtexec on PATH.*ONNX_SPDY_TRTEXEC") as caught:
        TensorRt().check()
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("ONNX_SPDY_TRTEXEC", str(tmp_path / "missing"))
    with pytest.raises(RuntimeUnavailable, match="missing is no trtexec that works"):
        TensorRt().check()
