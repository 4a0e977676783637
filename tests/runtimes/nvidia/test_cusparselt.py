"""The GPU runtime with the CPU in the place of the GPU: which layers take a 2:4 kernel, what it computes, its rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.pipeline.engine import READER, open_runtime
from onnx_spdy.runtimes import ModelRefused, RuntimeUnavailable, UnknownPrecision, Workload
from onnx_spdy.runtimes import open_runtime as open_by_name
from onnx_spdy.runtimes.base import reason_in
from onnx_spdy.runtimes.model_file import fix_model
from onnx_spdy.runtimes.nvidia.cpu_device import CpuDevice
from onnx_spdy.runtimes.nvidia.cusparselt import CuSparseLt, folded
from onnx_spdy.runtimes.nvidia.semi_structured import has_pattern, layer_weight
from onnx_spdy.runtimes.nvidia.sparse_nodes import patches
from onnx_spdy.runtimes.worker.remote import RemoteRuntime
from onnx_spdy.runtimes.worker.ssh import STARTER, Address, first_request, requirements

BATCH = 2


class Clock(CpuDevice):
    """A GPU whose 2:4 kernel takes `sparse_seconds`, and everything else a second; it counts the kernel's runs."""

    def __init__(self, sparse_seconds: float, wrong: bool = False) -> None:
        self.sparse_seconds, self.wrong, self.runs = sparse_seconds, wrong, 0

    def seconds(self, replay: Any, iterations: int, *, cold: bool = False) -> list[float]:
        before = self.runs
        replay()
        return [self.sparse_seconds if self.runs > before else 1.0] * iterations

    def sparse_products(self, weight: Any, bias: Any, sample: Any) -> Iterator[tuple[str, Any]]:
        assert has_pattern(weight.float().numpy())  # else a real one would compute something else
        assert sample.shape[1] == weight.shape[1]
        for name, product in super().sparse_products(weight, bias, sample):

            def counted(x: Any, product: Any = product) -> Any:
                self.runs += 1
                return product(x) + self.wrong

            yield name, counted


def two_in_four(weight: np.ndarray) -> np.ndarray:
    """(out, in, *kernel) with the two smaller ones of every 4 input channels set to 0."""
    groups = np.moveaxis(weight, 1, -1).reshape(-1, 4)
    groups = np.where(np.argsort(np.argsort(np.abs(groups), axis=1), axis=1) >= 2, groups, 0)
    kept = np.moveaxis(groups.reshape(np.moveaxis(weight, 1, -1).shape), -1, 1)
    return np.ascontiguousarray(kept, np.float32)


@pytest.fixture
def every_kind(tmp_path: Path) -> Path:
    """Convolutions (3x3 with stride, padding and dilation; 1x1 with stride), both kinds of Gemm, and a MatMul."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return two_in_four(rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:])))

    arrays = {
        "stem": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "w33": weight(32, 16, 3, 3), "b33": rng.standard_normal(32).astype(np.float32),
        "w11": weight(48, 32, 1, 1), "wd": weight(48, 48, 3, 3), "wg": weight(16, 48),
        "bg": rng.standard_normal(16).astype(np.float32), "wh": weight(32, 16).T.copy(),
        "bh": rng.standard_normal((1, 32)).astype(np.float32), "wm": weight(16, 32).T.copy(),
        "shape": np.array([BATCH, 2, 16]),
        "w_odd": two_in_four(rng.standard_normal((10, 16)).astype(np.float32)).T.copy(),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["c0"], "c0", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c0", "w33", "b33"], ["c1"], "c1", pads=[1, 0, 2, 1], strides=[2, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "r1"),
        helper.make_node("Conv", ["r1", "w11"], ["c2"], "c2", strides=[2, 2]),
        helper.make_node("Conv", ["c2", "wd"], ["c3"], "c3", dilations=[2, 2], pads=[2, 2, 2, 2]),
        helper.make_node("GlobalAveragePool", ["c3"], ["p"], "p"),
        helper.make_node("Flatten", ["p"], ["f"], "f"),
        helper.make_node("Gemm", ["f", "wg", "bg"], ["g"], "g", transB=1),
        helper.make_node("Gemm", ["g", "wh", "bh"], ["h"], "h", alpha=0.5, beta=2.0),
        helper.make_node("Reshape", ["h", "shape"], ["s"], "s"),
        helper.make_node("Concat", ["s", "s"], ["t"], "t", axis=2),
        helper.make_node("MatMul", ["t", "wm"], ["m"], "m"),
        helper.make_node("MatMul", ["m", "w_odd"], ["y"], "y"),
    ]
    graph = helper.make_graph(
        nodes, "kinds", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    path = tmp_path / "kinds.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def kernels(path: Path, device: CpuDevice, **options: Any) -> dict[str, str]:
    with CuSparseLt(reader=READER, device=device) as runtime:
        rows = runtime.layer_seconds(path, Workload(BATCH), iterations=2, warmup=1, **options)
    return {row.outputs[0]: row.kernel for row in rows if row.outputs}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_network_computes_the_same_with_all_of_its_layers_in_the_sparse_kernel(every_kind, precision):
    device = Clock(sparse_seconds=0.5)
    x = np.random.default_rng(3).standard_normal((BATCH, 3, 12, 12)).astype(np.float32)
    runtime = CuSparseLt(precision, reader=READER, device=device)
    with runtime, runtime.open(every_kind, Workload(BATCH)) as session:
        before = device.runs
        found = session.run({"x": x})["y"]
    assert device.runs == before + 6  # all layers but the stem and the last one
    expected = onnxruntime.InferenceSession(every_kind, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.abs(found - expected).max() < {"fp16": 5e-3, "bf16": 3e-2}[precision] * np.abs(expected).max()


def test_the_profile_says_which_kernel_each_layer_runs_in_and_why(every_kind):
    found = kernels(every_kind, Clock(sparse_seconds=0.5))
    assert found["c0"] == "cudnn"  # its weights aren't 2:4
    assert [found[name] for name in ("c1", "c2", "c3")] == [
        "im2col + stand-in_2:4",
        "stand-in_2:4",
        "im2col + stand-in_2:4",
    ]
    assert {found[name] for name in ("g", "h", "m")} == {"stand-in_2:4"}
    assert reason_in(found["y"]) == "not eligible: 10 output channels, no multiple of 16"


def test_where_the_sparse_kernel_is_slower_the_dense_one_stays(every_kind):
    found = kernels(every_kind, Clock(sparse_seconds=1.5))
    reasons = {name: reason_in(found[name]) for name in ("c1", "c2", "c3", "g", "h", "m")}
    assert set(reasons.values()) == {"not picked: 1500000.0 us sparse, 1000000.0 dense"}


def test_rows_tell_what_is_sparse_and_add_up_to_the_network(every_kind):
    with CuSparseLt(reader=READER, device=Clock(0.5)) as runtime:
        rows = runtime.layer_seconds(every_kind, Workload(BATCH), iterations=3, warmup=1)
    sparse = {row.outputs[0]: row.kernel_sparsity for row in rows if row.sparse}
    assert set(sparse) == {"c1", "c2", "c3", "g", "h", "m"}
    assert set(sparse.values()) == {0.5}
    outputs = [name for row in rows for name in row.outputs]
    assert sorted(outputs) == sorted({node.output[0] for node in onnx.load(every_kind).graph.node})
    assert [row.outputs for row in rows if len(row.outputs) > 1] == [("r1", "p", "f", "s", "t")]


def test_a_kernel_that_computes_something_else_is_refused(every_kind):
    runtime = CuSparseLt(reader=READER, device=Clock(0.5, wrong=True))
    with runtime, pytest.raises(ModelRefused, match=r"stand-in_2:4 computes 'c1' .*% .*away from the dense kernel"):
        runtime.open(every_kind, Workload(BATCH))


def test_a_bias_that_is_computed_is_never_frozen(tmp_path):
    """Gemm's C and Conv's B may be results: with other inputs they are others."""
    rng = np.random.default_rng(0)
    weight = two_in_four(rng.standard_normal((16, 16)).astype(np.float32))
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["c"], "mean", axes=[0], keepdims=0),
        helper.make_node("Gemm", ["x", "w", "c"], ["y"], "g", transB=1),
        helper.make_node("Unsqueeze", ["x", "axes"], ["image"], "image"),
        helper.make_node("Conv", ["image", "k", "c"], ["z"], "k"),
    ]
    arrays = {"w": weight, "k": weight[:, :, None, None], "axes": np.array([2, 3])}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "biases", [value("x", TensorProto.FLOAT, ["n", 16])],
        [value("y", TensorProto.FLOAT, ["n", 16]), value("z", TensorProto.FLOAT, ["n", 16, 1, 1])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    path = tmp_path / "biases.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    x = rng.standard_normal((BATCH, 16)).astype(np.float32)
    with CuSparseLt(reader=READER, device=Clock(0.5)).open(path, Workload(BATCH)) as session:
        found = session.run({"x": x})
        kernel_of = {name: choice.kernel for name, choice in session.choices.items()}
    assert kernel_of["y"] == "stand-in_2:4"
    assert reason_in(kernel_of["z"]) == "not eligible: its bias is computed"
    reference = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    for actual, expected in zip(found.values(), reference, strict=True):
        assert np.abs(actual - expected).max() < 5e-3 * np.abs(expected).max()


class Compiler(Clock):
    """A GPU whose compiler is torch.compile without code generation, or what `compiler` does."""

    def __init__(self, compiler: Any = None) -> None:
        super().__init__(sparse_seconds=0.5)
        self.graphs, self._compiler = 0, compiler

    def compiled(self, graph: Any) -> Any:
        self.graphs += 1
        if self._compiler:
            return self._compiler(graph)
        return torch.compile(graph, backend="aot_eager", fullgraph=True, dynamic=False)


def fusion(session: Any) -> str:
    return dict(session.environment.options)["fusion"]


def test_networks_that_differ_in_weights_share_one_compiled_graph_and_keep_their_results(every_kind, tmp_path):
    model = onnx.load(every_kind)
    for tensor in model.graph.initializer:
        if tensor.name in ("w11", "b33", "stem"):
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    device, x = Compiler(), np.random.default_rng(3).standard_normal((BATCH, 3, 12, 12)).astype(np.float32)
    with CuSparseLt(reader=READER, device=device) as runtime:
        for path in (every_kind, other, every_kind):
            with runtime.open(path, Workload(BATCH)) as session:
                found, kind = session.run({"x": x})["y"], fusion(session)
                rows = {row.outputs[0] for row in session.layer_seconds(2) if row.outputs}
            expected = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
            assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()
            assert kind == "torch.compile"
            assert {"c0", "c1", "c2", "c3", "g", "h", "m", "y"} < rows
    assert device.graphs == 1


def test_a_shape_that_the_graph_carries_is_no_weight(tmp_path):
    device = Compiler()
    with CuSparseLt(reader=READER, device=device) as runtime:
        for axis in (1, 2):
            weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
            nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "h"),
                     helper.make_node("ReduceSum", ["h", "axes"], ["y"], "y", keepdims=1)]  # fmt: skip
            value = helper.make_tensor_value_info
            graph = helper.make_graph(
                nodes, "sums", [value("x", TensorProto.FLOAT, ["n", 8, 8])], [value("y", TensorProto.FLOAT, None)],
                [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([axis]), "axes")],
            )  # fmt: skip
            path = tmp_path / "sums.onnx"
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
            with runtime.open(path, Workload(BATCH)) as session:
                found = session.run({"x": np.ones((BATCH, 8, 8), np.float32)})["y"]
            assert found.shape == ((BATCH, 1, 8) if axis == 1 else (BATCH, 8, 1))
    assert device.graphs == 2


def failing(graph: Any) -> Any:
    raise NotImplementedError("no such compiler")


def wrong(graph: Any) -> Any:
    return lambda arguments: [value + 1 for value in graph(arguments)]


@pytest.mark.parametrize(
    ("compiler", "reason"), [(failing, "no such compiler"), (wrong, "fused, it computes something else")]
)
def test_what_can_not_be_fused_runs_as_it_is_and_that_is_said(every_kind, caplog, compiler, reason):
    x = np.random.default_rng(3).standard_normal((BATCH, 3, 12, 12)).astype(np.float32)
    runtime = CuSparseLt(reader=READER, device=Compiler(compiler))
    with runtime, runtime.open(every_kind, Workload(BATCH)) as session:
        found = session.run({"x": x})["y"]
        assert fusion(session) == "none"
        assert session.layer_seconds(1)[-1].kernel == "fusion: none"
    assert reason in caplog.text
    expected = onnxruntime.InferenceSession(every_kind, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()


def test_shapes_that_are_computed_are_known_before_it_runs(tmp_path):
    """A tensor that is made on the CPU can't be copied to the GPU while a graph is captured."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], "shape"),
        helper.make_node("Gather", ["shape", "last"], ["size"], "size"),
        helper.make_node("Range", ["zero", "size", "one"], ["places"], "places"),
        helper.make_node("Gather", ["table", "places"], ["added"], "added"),
        helper.make_node("MatMul", ["x", "w"], ["h"], "h"),
        helper.make_node("Add", ["h", "added"], ["y"], "y"),
    ]
    rng = np.random.default_rng(0)
    arrays = {
        "last": np.array(1), "zero": np.array(0), "one": np.array(1), "w": rng.standard_normal((8, 8)),
        "table": rng.standard_normal((40, 8)),
    }  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "positions", [value("x", TensorProto.FLOAT, ["n", 5, 8])], [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a.astype(np.float32) if a.ndim else a, name) for name, a in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "positions.onnx"
    onnx.save(model, path)
    left = folded(fix_model(path, Workload(BATCH)).proto)
    assert {"MatMul", "Add"} <= {node.op_type for node in left.graph.node} <= {"MatMul", "Add", "Gather"}
    x = rng.standard_normal((BATCH, 5, 8)).astype(np.float32)
    with CuSparseLt(reader=READER, device=CpuDevice()).open(path, Workload(BATCH)) as session:
        found = session.run({"x": x})["y"]
    expected = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()


def test_dense_weights_are_left_alone(every_kind, conv_net):
    device = Clock(0.5)
    assert not any("2:4" in kernel for kernel in kernels(conv_net(), device).values())
    assert device.runs == 0


@pytest.mark.parametrize(
    ("kernel", "strides", "pads", "dilations"),
    [((1, 1), (1, 1), (0,) * 4, (1, 1)), ((3, 3), (1, 1), (1,) * 4, (1, 1)), ((3, 2), (2, 1), (0, 1, 2, 3), (2, 3))],
)
def test_patches_are_those_of_unfold(kernel, strides, pads, dilations):
    x = torch.randn(2, 4, 9, 11)
    found = patches(x, kernel, strides, pads, dilations)
    top, left, bottom, right = pads
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    columns = torch.nn.functional.unfold(padded, kernel, dilations, 0, strides)  # (2, 4 * kh * kw, positions)
    expected = columns.unflatten(1, (4, -1)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(found.flatten(1, 2), expected)


@pytest.mark.parametrize(("op", "attributes"), [("Gemm", {"transB": 1}), ("Gemm", {}), ("MatMul", {})])
def test_the_axis_of_the_pattern_is_that_of_the_input_channels(op, attributes):
    stored = two_in_four(np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32))
    array = stored if attributes else stored.T
    weight = layer_weight(helper.make_node(op, ["x", "w"], ["y"], **attributes), {"w": array})
    assert weight.shape == (8, 16)
    assert has_pattern(weight)
    assert not has_pattern(weight.T)
    assert not has_pattern(np.where(weight == weight.max(), 1, weight) + (weight == 0) * np.eye(8, 16))


def test_without_a_gpu_it_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeUnavailable, match="cusparselt needs") as caught:
        open_runtime("cusparselt:bf16").check()
    assert "\n" not in str(caught.value)


def test_a_network_that_nobody_can_read_is_an_error():
    with pytest.raises(RuntimeUnavailable, match=r"no reader.*pipeline\.engine"):
        CuSparseLt(device=CpuDevice()).check()
    with pytest.raises(RuntimeUnavailable, match="needs no_such_module"):
        CuSparseLt(reader="no_such_module:x", device=CpuDevice()).check()
    with pytest.raises(UnknownPrecision, match="fp16, bf16"):
        open_by_name("cusparselt:fp8")


def test_another_machine_gets_the_reader_and_says_what_is_missing_there():
    """That machine is this one, whose PyTorch may know no GPU: the reader's sources have to arrive all the same."""
    here = open_runtime("cusparselt")
    with RemoteRuntime(
        Address("nowhere", None, "cusparselt"), here, {"reader": READER}, command=[sys.executable, "-c", STARTER]
    ) as far:
        if torch.cuda.is_available():
            assert far.check() == here.check()
        else:
            with pytest.raises(RuntimeUnavailable, match="cusparselt needs"):
                far.check()
    assert len(first_request(READER)["package"]) > len(first_request()["package"])
    assert any(one.startswith("torch==") and "+" not in one for one in requirements("cusparselt"))
    with open_runtime("ssh://board/cusparselt:bf16") as remote:
        assert (remote.name, remote.precision, remote.patterns) == ("cusparselt", "bf16", {"2:4"})
