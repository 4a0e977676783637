"""What every runtime promises, checked for all that work here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.pipeline.engine import READER
from onnx_spdy.pipeline.engine import open_runtime as open_engine
from onnx_spdy.runtimes import (
    ANY_ZEROS,
    RUNTIMES,
    Environment,
    ModelRefused,
    Runtime,
    RuntimeFailure,
    RuntimeUnavailable,
    UnknownRuntime,
    Workload,
    measure_interleaved,
    open_runtime,
    runtime_spec,
)
from onnx_spdy.runtimes.nvidia.cpu_device import CpuDevice
from onnx_spdy.runtimes.nvidia.cusparselt import CuSparseLt
from onnx_spdy.runtimes.nvidia.trt import TensorRt
from onnx_spdy.runtimes.nvidia.trt_engine import TrtPackage
from onnx_spdy.runtimes.registry import WITH_PRECISION
from onnx_spdy.runtimes.worker.remote import RemoteRuntime
from onnx_spdy.runtimes.worker.ssh import STARTER, Address

BATCH = 3
LAYER_OUTPUTS = {"a", "c", "y"}
FAR = "in a process like on another machine: "
STAND_IN = "with the CPU for a GPU: "
TENSORRT = "with a stand-in for the package tensorrt"
SPECS = sorted([*RUNTIMES, "openvino:bf16"])
NAMES = [pytest.param(spec, marks=pytest.mark.engine if spec == "deepsparse" else ()) for spec in SPECS]
NAMES += [FAR + "fake", FAR + "onnxruntime", STAND_IN + "fp16", STAND_IN + "bf16", TENSORRT]
HALF_TOLERANCE = 0.02  # of the largest output: bf16 keeps 8 bits


def open_here_or_far(name: str) -> Runtime:
    if name.startswith(STAND_IN):
        return CuSparseLt(name.removeprefix(STAND_IN), reader=READER, device=CpuDevice())
    if not name.startswith(FAR):
        return open_engine(name)
    engine = name.removeprefix(FAR)
    command = [sys.executable, "-c", STARTER]
    return RemoteRuntime(Address("nowhere", None, engine), open_runtime(engine), {}, command=command)


@pytest.fixture(scope="module", params=NAMES)
def runtime(request):
    if request.param == TENSORRT:
        package = request.getfixturevalue("tensorrt_stand_in").package()
        made = TensorRt(backend=TrtPackage(package, CpuDevice()))
    else:
        made = open_here_or_far(request.param)
    with made as opened:
        try:
            opened.check()
        except RuntimeUnavailable as exc:
            pytest.skip(str(exc))
        yield opened


@pytest.fixture
def session(runtime, conv_net):
    with runtime.open(conv_net(), Workload(BATCH, 1)) as opened:
        yield opened


def test_outputs_agree_with_onnx_runtime(session, conv_net):
    x = np.random.default_rng(0).standard_normal((BATCH, 8, 12, 12)).astype(np.float32)
    reference = onnxruntime.InferenceSession(conv_net(), providers=["CPUExecutionProvider"])
    outputs = session.run({"x": x})
    assert list(outputs) == ["y"]
    expected = reference.run(None, {"x": x})[0]
    half = session.environment.precision in ("bf16", "fp16")
    tolerance = HALF_TOLERANCE * np.abs(expected).max() if half else 1e-4
    np.testing.assert_allclose(outputs["y"], expected, rtol=1e-4, atol=tolerance)


def test_inputs_without_samples_and_with_samples_second_run(runtime, tmp_path):
    node = helper.make_node
    nodes = [
        node("Mul", ["x", "scale"], ["scaled"]),
        node("ReduceMean", ["state"], ["mean"], axes=[0], keepdims=0),
        node("Add", ["scaled", "mean"], ["h"]),
        node("MatMul", ["h", "w"], ["y"]),
    ]
    shapes = {"x": ["batch", 16], "scale": [], "state": [2, "batch", 16]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((16, 8)).astype(np.float32), "w")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(nodes, "graph", values, [output], [weight])
    path = tmp_path / "state.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    arrays = {
        "x": rng.standard_normal((BATCH, 16)).astype(np.float32),
        "scale": np.array(2, np.float32),
        "state": rng.standard_normal((2, BATCH, 16)).astype(np.float32),
    }
    (expected,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, arrays)
    for inputs in (None, arrays):
        with runtime.open(path, Workload(BATCH, 1, inputs)) as session:
            found = session.run(arrays)["y"]
            half = session.environment.precision in ("bf16", "fp16")
            tolerance = HALF_TOLERANCE * np.abs(expected).max() if half else 1e-4
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=tolerance)


def test_times_are_positive_and_as_many_as_asked(session):
    seconds = session.seconds(4, warmup=2)
    assert len(seconds) == 4
    assert min(seconds) > 0


def test_rows_cover_every_layer_once_and_have_a_kernel(runtime, conv_net):
    rows = runtime.layer_seconds(conv_net(), Workload(BATCH, 1), iterations=3, warmup=1)
    covered = [name for row in rows for name in row.outputs]
    assert sorted(LAYER_OUTPUTS.intersection(covered)) == sorted(name for name in covered if name in LAYER_OUTPUTS)
    assert set(covered) >= LAYER_OUTPUTS
    assert all(row.kernel and row.seconds >= 0 for row in rows)
    assert sum(row.seconds for row in rows) > 0


def test_sparse_kernels_show_exactly_where_the_runtime_has_them(runtime, conv_net):
    rows = runtime.layer_seconds(conv_net(sparsity=0.95), Workload(BATCH, 1), iterations=2, warmup=1)
    if not runtime.patterns or ANY_ZEROS in runtime.patterns:  # else a few of these zeros may fit by chance
        assert any(row.sparse for row in rows) == bool(runtime.patterns)
    for row in rows:
        if row.sparse:
            assert row.kernel_sparsity == pytest.approx(0.95, abs=0.01)


def test_zeros_are_imposed_before_the_profile(runtime, conv_net):
    zeros = {"w0": 0.95, "w1": 0.9}
    rows = runtime.layer_seconds(
        conv_net(), Workload(BATCH, 1), iterations=2, warmup=1, zeros=zeros, seed=1, merged=False
    )
    sparsity = {row.outputs[0]: row.kernel_sparsity for row in rows if row.sparse}
    if not runtime.patterns or ANY_ZEROS in runtime.patterns:
        assert bool(sparsity) == bool(runtime.patterns)
    for output, fraction in zip("ac", zeros.values(), strict=True):
        if output in sparsity:
            assert sparsity[output] == pytest.approx(fraction, abs=0.03)


def test_zeros_are_imposed_before_a_session_runs(runtime, conv_net):
    """With every weight of the last layer at 0 its output is its bias, whatever goes in."""
    x = np.random.default_rng(0).standard_normal((BATCH, 8, 12, 12)).astype(np.float32)
    with runtime.open(conv_net(), Workload(BATCH, 1), zeros={"w2": 1.0}, seed=3) as session:
        outputs = session.run({"x": x})["y"]
    np.testing.assert_allclose(outputs, outputs[:1].repeat(BATCH, axis=0), atol=1e-5)


def test_merged_rows_and_single_ones_cover_the_same_layers(runtime, conv_net):
    profiles = [
        runtime.layer_seconds(conv_net(), Workload(BATCH, 1), iterations=2, warmup=1, merged=merged)
        for merged in (True, False)
    ]
    merged, single = [LAYER_OUTPUTS.intersection(name for row in rows for name in row.outputs) for rows in profiles]
    assert merged == single == LAYER_OUTPUTS
    assert all(len(LAYER_OUTPUTS.intersection(row.outputs)) <= 1 for row in profiles[1])


def test_the_load_of_its_machine_is_told(runtime):
    assert runtime.foreign_cores() == 0.0  # the count starts
    cores = runtime.foreign_cores()
    assert cores is None or cores >= 0


@pytest.mark.parametrize("zeros", [{"w9": 0.5}, {"w0": 1.5}, {"w0": -0.1}])
def test_impossible_zeros_are_an_error(runtime, conv_net, zeros):
    with pytest.raises(ValueError, match=f"zeros in {next(iter(zeros))!r}"):
        runtime.layer_seconds(conv_net(), Workload(1), iterations=1, warmup=0, zeros=zeros)
    with pytest.raises(ValueError, match=f"zeros in {next(iter(zeros))!r}"):
        runtime.open(conv_net(), Workload(1), zeros=zeros)


def test_environment_is_complete_and_survives_json(runtime, session):
    environment = session.environment
    assert (environment.runtime, environment.version) == (runtime.name, runtime.check())
    assert (environment.batch, environment.threads) == (BATCH, 1)
    assert all((environment.precision, environment.cpu, environment.instruction_set, environment.cores))
    again = Environment.from_json(json.loads(json.dumps(environment.to_json())))
    assert again == environment
    assert session.fallback is None


def test_batch_is_fixed(session):
    with pytest.raises(ValueError, match=r"float32\[3, 8, 12, 12\]"):
        session.run({"x": np.zeros((BATCH + 1, 8, 12, 12), np.float32)})
    with pytest.raises(ValueError, match="missing or unknown"):
        session.run({})


def test_another_fixed_batch_is_refused(runtime, conv_net):
    with pytest.raises(ModelRefused, match="fixed batch of 2, not 3"):
        runtime.open(conv_net(batch=2), Workload(3))
    runtime.open(conv_net(batch=2), Workload(2)).close()


def test_a_batch_written_into_the_graph_is_refused_in_one_line(runtime, tmp_path):
    """An exporter that traced with batch 2 may leave Reshape(2, 16) behind a dynamic input."""
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        "frozen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array([2, 16]), "shape")],
    )
    path = tmp_path / "frozen.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    with pytest.raises(RuntimeFailure) as caught, runtime.open(path, Workload(3)) as session:
        session.run({"x": np.zeros((3, 4, 4), np.float32)})
    assert "\n" not in str(caught.value)


def test_a_closed_session_says_so_and_closes_again(runtime, conv_net):
    session = runtime.open(conv_net(), Workload(1))
    session.close()
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.seconds(1)


@pytest.mark.parametrize("content", [None, b"", b"this is not a model\n"])
def test_a_bad_file_is_refused_in_one_line(runtime, tmp_path: Path, content):
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelRefused) as caught:
        runtime.open(path, Workload(1))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_sessions_are_timed_interleaved(runtime, conv_net):
    with runtime.open(conv_net(), Workload(1)) as dense, runtime.open(conv_net(sparsity=0.9), Workload(1)) as pruned:
        measured = measure_interleaved({"dense": dense, "pruned": pruned}, rounds=6, warmup=2)
    assert {name: len(value.seconds) for name, value in measured.items()} == {"dense": 6, "pruned": 6}


def test_importing_the_runtimes_imports_no_engine():
    engines = {"onnxruntime", "deepsparse", "openvino", "tensorrt", "torch", "uv"}
    code = f"import sys, onnx_spdy.runtimes; print({engines} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_unknown_runtime_lists_the_known_ones():
    with pytest.raises(UnknownRuntime, match=r"'abacus'.*deepsparse, fake, onnxruntime, openvino"):
        open_runtime("abacus")


@pytest.mark.parametrize("name", sorted(set(RUNTIMES) - WITH_PRECISION))
def test_a_runtime_without_a_choice_of_precision_refuses_one(name):
    with pytest.raises(UnknownRuntime, match=f"{name} has no choice of precision.*write {name}"):
        open_runtime(f"{name}:bf16")


@pytest.mark.parametrize("spec", SPECS)
def test_a_runtime_tells_how_to_open_it_again(spec):
    with open_runtime(spec) as runtime, open_runtime(runtime_spec(runtime)) as again:
        assert (type(again), runtime_spec(again)) == (type(runtime), runtime_spec(runtime))
