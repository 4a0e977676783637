"""Selective 2:4: only layers that gain time pay accuracy; tables measured elsewhere are used here."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Prepared, load_model
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import build_database
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.deploy import check_deployed
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import Report, _why
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.profile_search import ProfileSearch
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.runtimes import Environment, Workload, reason_in
from onnx_spdy.runtimes.fake import FakeRuntime
from onnx_spdy.runtimes.nvidia.cpu_device import CpuDevice
from onnx_spdy.runtimes.nvidia.cusparselt import CuSparseLt
from onnx_spdy.runtimes.nvidia.semi_structured import has_pattern
from onnx_spdy.tools.show import pattern_of

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "synthetic_2_4"
# Per layer: macs a sample are 64 * 128, 128 * 128, 128 * 32, 32 * 20 and 20 * 32.
GPU = {"kernels": "2:4", "sparse_overhead_seconds": 90e-9, "layer_overhead_seconds": 0.0, "node_seconds": 1e-9}


def perceptron() -> onnx.ModelProto:
    """Two large layers, one too small to gain, two whose channels no 2:4 kernel takes; Gemm both ways, and MatMul."""
    rng = np.random.default_rng(0)
    sizes = (64, 128, 128, 32, 20, 32)
    arrays, nodes, x = {}, [], "input"
    for number, (before, after) in enumerate(itertools.pairwise(sizes)):
        weight = rng.normal(0, 1 / np.sqrt(before), (after, before)).astype(np.float32)
        arrays[f"w{number}"] = np.ascontiguousarray(weight if number == 0 else weight.T)
        kind, options = ("Gemm", {"transB": 1}) if number == 0 else ("Gemm" if number == 1 else "MatMul", {})
        nodes.append(helper.make_node(kind, [x, f"w{number}"], [f"h{number}"], f"layer{number}", **options))
        x = f"r{number}" if number < 4 else "output"
        nodes.append(helper.make_node("Relu", [f"h{number}"], [x], f"relu{number}"))
    graph = helper.make_graph(
        nodes, "perceptron", [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def dense() -> onnx.ModelProto:
    return perceptron()


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(1)
    return Samples({"input": rng.normal(size=(96, 64)).astype(np.float32)}, rng.integers(0, 32, 96))


def do(dense: onnx.ModelProto, samples: Samples, speedup: float, out: Path) -> Report:
    return run(
        Prepared(dense), samples, FakeRuntime(**GPU), workload_of(samples, 4), Target(speedup, out),
        compression=Compression(levels_for("2:4")),
    )  # fmt: skip


def test_a_run_prunes_the_layers_that_gain_and_says_why_not_the_others(
    dense: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    report = do(dense, samples, 1.3, tmp_path).content
    rows = {row["name"]: row for row in report["layers"]}
    assert {name: row["level"] for name, row in rows.items()} == {
        "layer0": "2:4", "layer1": "2:4", "layer2": "dense", "layer3": "dense", "layer4": "dense"
    }  # fmt: skip
    assert report["measured_speedup_lower"] >= 1.3
    assert rows["layer2"]["note"] == "2:4: not picked"
    assert rows["layer3"]["note"] == "2:4: not eligible: 20 output channels, no multiple of 16"
    assert rows["layer4"]["note"] == "2:4: not eligible: 20 input channels, no multiple of 16"
    assert rows["layer1"]["kernel"] == "fake_2:4"
    written = load_model(tmp_path / "model.onnx")
    check_deployed(Prepared(dense), written, Profile.load(tmp_path / "profile.json").levels)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    assert has_pattern(arrays["w0"])  # (out, in): transB
    assert has_pattern(arrays["w1"].T) and not has_pattern(arrays["w1"])  # (in, out)
    assert not has_pattern(arrays["w2"].T)
    assert [pattern_of(arrays[name]) for name in ("w0", "w2")] == ["2:4", "dense"]


def test_more_than_all_layers_that_gain_can_give_is_refused(
    dense: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(NoSpeedup, match=r"highest reachable is 1\.3"):
        do(dense, samples, 1.5, tmp_path)


def test_the_table_knows_which_layers_gain(dense: onnx.ModelProto) -> None:
    table = measure_latency(Prepared(dense), FakeRuntime(**GPU, noise=0.01), levels_for("2:4"), Workload(4))
    assert table.sparse[:, 1].tolist() == [True, True, False, False, False]
    assert (table.seconds[:2, 1] < 0.9 * table.seconds[:2, 0]).all()
    assert (table.seconds[2:, 1] == table.seconds[2:, 0]).all()
    assert [reason_in(kernels[1]).partition(":")[0] for kernels in table.kernels[2:]] == [
        "not picked", "not eligible", "not eligible"
    ]  # fmt: skip


def test_a_kernel_that_is_taken_although_it_is_slower_is_named(dense: onnx.ModelProto) -> None:
    table = measure_latency(Prepared(dense), FakeRuntime(**GPU), levels_for("2:4"), Workload(4))
    seconds, sparse = table.seconds.copy(), table.sparse.copy()
    seconds[0, 1], sparse[0, 1] = 2 * seconds[0, 0], True
    slower = replace(table, seconds=seconds, sparse=sparse)
    times = f"{2e3 * seconds[0, 0]:.4f} against {1e3 * seconds[0, 0]:.4f} ms"
    assert _why(slower, 0, 0, True) == f"2:4: slower, {times}"
    assert _why(slower, 0, 1, False) == f"2:4: slower, {times}; pruned all the same"


def test_the_gpu_runtime_gives_such_a_table_too(dense: onnx.ModelProto) -> None:
    """With the CPU for a GPU its times mean nothing; which layers are asked for 2:4 kernels, and why not, does."""
    runtime = CuSparseLt("bf16", reader="onnx_spdy.models:TorchGraph", device=CpuDevice())
    table = measure_latency(Prepared(dense), runtime, levels_for("2:4"), Workload(16))
    assert {kernels[0] for kernels in table.kernels} == {"cublas"}
    assert reason_in(table.kernels[3][1]) == "not eligible: 20 output channels, no multiple of 16"
    for row in range(3):  # picked, or measured and not picked
        assert table.sparse[row, 1] or reason_in(table.kernels[row][1]).startswith("not picked")
    assert table.environment.precision == "bf16"


def test_a_table_from_another_machine_is_searched_here(
    dense: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    """latency.json in the golden folder is written by hand: its machine doesn't exist, its seconds are invented."""
    table = LatencyTable.load(GOLDEN / "latency.json")
    assert "SYNTHETIC" in table.environment.cpu
    network = Network(Prepared(dense))
    table = replace(table, model_sha256=network.sha256)
    database = build_database(
        network, samples, Compression(table.levels, pruner_named("magnitude")), tmp_path / "database"
    )
    profile = ProfileSearch(network, table, database, samples, SearchSettings("spdy", samples=32)).find(1.4)
    assert profile.predicted_speedup >= 1.4
    # By hand: dense 1000 us. 2:4 in layer0 saves 100, in layer1 250, nothing elsewhere: 1.4x needs both.
    assert [str(profile.levels[name]) for name in table.layers] == ["2:4", "2:4", "dense", "dense", "dense"]
    assert profile.predicted_seconds == pytest.approx(650e-6)
    here = json.loads((GOLDEN / "latency.json").read_text())["environment"]
    assert Environment.from_json(here).mismatch(
        FakeRuntime(**GPU).open(_saved(dense, tmp_path), Workload(4)).environment
    )


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "dense.onnx")
    return folder / "dense.onnx"
