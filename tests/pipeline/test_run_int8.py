"""Networks of fewer units in int8, from the trained network to the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from onnx_spdy.models import Prepared, TorchGraph, load_model
from onnx_spdy.models.int8.form import NoForm
from onnx_spdy.pipeline import compare, validate
from onnx_spdy.pipeline import run as run_module
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import build_database, open_database
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.int8.pruned import in_int8
from onnx_spdy.pipeline.latency import measure
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.level import Level, levels_for
from onnx_spdy.pipeline.metric import Evaluation, top1
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.quantised.make import NOTHING
from onnx_spdy.pipeline.ranges import RANGES
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.stitch import Stitcher
from onnx_spdy.runtimes import Runtime, open_runtime
from onnx_spdy.runtimes.fake import FakeRuntime
from tests.models.int8.writing import plain_session

FAKE = {"layer_overhead_seconds": 0.0, "node_seconds": 1e-9}


def do(
    model: onnx.ModelProto, samples: Samples, runtime: Runtime, target: Target, pattern: str = "channels+int8", **more
) -> dict:
    report = run(
        Prepared(model), samples, runtime, workload_of(samples, 8), target,
        compression=Compression(levels_for(pattern), pruner_named("magnitude")),
        search=SearchSettings("dp", time_limit_seconds=2), evaluation=Evaluation(samples, top1, "top1"), **more,
    )  # fmt: skip
    return dict(report.content)


def check_int8(out: Path, samples: Samples) -> None:
    """The file computes with integer weights, is valid, and is near the same network in floating point."""
    written, plain = load_model(out / "model.onnx"), load_model(out / "alternatives" / "pruned.onnx")
    onnx.checker.check_model(written, full_check=True)
    integers = {t.name: tuple(t.dims) for t in written.graph.initializer if t.data_type == TensorProto.INT8}
    shapes = {t.name: tuple(t.dims) for t in plain.graph.initializer}
    for name in ("a.weight", "b.weight", "c.weight", "d.weight"):
        assert integers[f"{name}_int8"] == shapes[name]
    assert not any(t.data_type == TensorProto.INT8 for t in plain.graph.initializer)
    given = {"input": samples.inputs["input"]}
    expected, found = (plain_session(one, True).run(None, given)[0] for one in (plain, written))
    assert 0 < np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
    with torch.inference_mode():
        again = TorchGraph(written)({"input": torch.from_numpy(given["input"])})["output"].numpy()
    np.testing.assert_allclose(again, found, atol=0.02 * np.abs(found).max())


@pytest.mark.parametrize("finetune", ["none", "gap", "full"])
def test_the_promise_is_kept_in_int8(model: onnx.ModelProto, samples: Samples, tmp_path: Path, finetune: str) -> None:
    with open_runtime("fake", **FAKE) as runtime:
        report = do(model, samples, runtime, Target(4.0, tmp_path), finetune=finetune)
    check_int8(tmp_path, samples)
    levels = [Level.parse(row["level"]) for row in report["layers"]]
    assert all(level.is_int8 for level in levels)
    assert not all(level.is_whole for level in levels)
    assert report["measured_speedup_lower"] >= 4.0
    assert report["measured_speedup"] == pytest.approx(report["dense_seconds"] / report["pruned_seconds"])
    assert {stage["name"] for stage in report["stages"]} >= {"int8", "validate"}
    assert (report["repair"] is None) == (finetune == "none")
    assert (report["finetune"] is None) == (finetune != "full")
    assert json.loads((tmp_path / "report.json").read_text())["layers"] == report["layers"]
    for row in report["layers"]:
        assert row["kept"] <= row["units"]


def test_ranges_are_tried_where_what_they_are_of_stays(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that is trained after its speed was measured is written again."""
    tried: list[int] = []

    def seen(*arguments, ranges, **more):
        tried.append(len(ranges))
        return in_int8(*arguments, ranges=ranges, **more)

    monkeypatch.setattr(run_module, "in_int8", seen)
    with open_runtime("fake", **FAKE) as runtime:
        do(model, samples, runtime, Target(4.0, tmp_path / "plain"))
        assert {*tried} == {len(RANGES)}
        tried.clear()
        do(model, samples, runtime, Target(4.0, tmp_path / "repaired"), finetune="gap")
    assert {*tried[:-1]} == {1}
    assert tried[-1] == len(RANGES)


def test_int8_alone_may_be_enough_and_then_nothing_is_removed(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    with open_runtime("fake", **FAKE) as runtime:
        report = do(model, samples, runtime, Target(1.5, tmp_path))
    assert {row["level"] for row in report["layers"]} == {"int8"}
    assert report["measured_speedup_lower"] >= 1.5
    assert report["sparsity"] == 0
    check_int8(tmp_path, samples)
    assert LatencyTable.load(tmp_path / "latency.json").levels == levels_for("channels+int8")


def test_the_same_arguments_make_the_same_bytes(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    with open_runtime("fake", **FAKE) as runtime:
        do(model, samples, runtime, Target(4.0, tmp_path / "one"))
        first = (tmp_path / "one" / "model.onnx").read_bytes()
        do(model, samples, runtime, Target(4.0, tmp_path / "one"))  # goes on where everything is there
        do(model, samples, runtime, Target(4.0, tmp_path / "two"))
    assert (tmp_path / "one" / "model.onnx").read_bytes() == first
    assert (tmp_path / "two" / "model.onnx").read_bytes() == first


def test_a_folder_of_widths_in_floating_point_is_refused(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    with open_runtime("fake", **FAKE) as runtime:
        do(model, samples, runtime, Target(1.2, tmp_path), pattern="channels")
        before = (tmp_path / "model.onnx").read_bytes()
        with pytest.raises(ArtifactError, match="levels"):
            do(model, samples, runtime, Target(4.0, tmp_path))
    assert (tmp_path / "model.onnx").read_bytes() == before


def test_a_runtime_without_a_form_is_refused_before_anything_is_written(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    class Other(FakeRuntime):
        name = "cusparselt"

    with pytest.raises(NoForm, match="cusparselt can't be given networks in int8; take one of"):
        do(model, samples, Other(), Target(4.0, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("finetune", ["none", "gap"])
def test_the_whole_way_in_onnx_runtime(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path, finetune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How fast it is depends on the machine; that it is measured, in int8 and valid does not."""
    monkeypatch.setattr(compare, "quantise_all", lambda *_, **__: NOTHING)
    monkeypatch.setattr(compare, "elsewhere", lambda *_, **__: [])
    monkeypatch.setattr(measure, "PROFILE_SECONDS", 0.02)
    monkeypatch.setattr(measure, "ROUNDS_SECONDS", 0.05)
    monkeypatch.setattr(validate, "BUSY_WAITS_SECONDS", ())
    with open_runtime("onnxruntime") as runtime:
        report = do(model, samples, runtime, Target(0.05, tmp_path), finetune=finetune, allow_busy=True)
    check_int8(tmp_path, samples)
    assert {Level.parse(row["level"]).is_int8 for row in report["layers"]} == {True}
    assert 0 < report["measured_speedup_lower"] <= report["measured_speedup"]
    assert report["metric_pruned"] is not None
    assert report["headline"].split(" in ")[1].startswith("onnxruntime fp32 ")  # the dense network's own precision
    pruned = [one for one in report["alternatives"]["measured"] if one["role"] == "pruned"]
    assert [one["name"] for one in pruned] == ["onnxruntime int8"]


@pytest.mark.parametrize("finetune", ["none", "full"])
def test_precisions_are_mixed_to_a_speedup(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path, finetune: str
) -> None:
    with open_runtime("fake", **FAKE) as runtime:
        report = do(model, samples, runtime, Target(1.5, tmp_path), pattern="int8", finetune=finetune)
    levels = {row["initializer"]: row["level"] for row in report["layers"]}
    assert {*levels} == {"a.weight", "b.weight", "c.weight", "d.weight"}
    assert {*levels.values()} == {"dense", "int8"}
    assert report["measured_speedup_lower"] >= 1.5
    assert report["sparsity"] == 0
    written = load_model(tmp_path / "model.onnx")
    onnx.checker.check_model(written, full_check=True)
    stored = {t.name for t in written.graph.initializer if t.data_type == TensorProto.INT8 and t.name.endswith("_int8")}
    assert stored == {f"{name}_int8" for name, level in levels.items() if level == "int8"}
    for row in report["layers"]:
        assert (row["error"] > 0) == (row["level"] == "int8")
    assert (report["finetune"] is None) == (finetune == "none")


def test_all_layers_in_int8_are_the_most_there_is(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    with open_runtime("fake", **FAKE) as runtime:
        report = do(model, samples, runtime, Target(2.99, tmp_path), pattern="int8")
        assert {row["level"] for row in report["layers"]} == {"int8"}
        assert report["highest_speedup"] == pytest.approx(3.0, rel=0.05)
        assert report["prediction"]["median"] < 0.01
        with pytest.raises(NoSpeedup, match=r"highest reachable is 2\.99"):
            do(model, samples, runtime, Target(3.5, tmp_path), pattern="int8")


def test_no_speedup_leaves_all_layers_as_they_are(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    with open_runtime("fake", **FAKE) as runtime:
        report = do(model, samples, runtime, Target(1.0, tmp_path), pattern="int8")
    assert {row["level"] for row in report["layers"]} == {"dense"}
    assert report["int8"] is None
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "dense.onnx").read_bytes()


def test_the_search_sees_rounded_inputs(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    """The loss of a profile is that of weights and inputs on their grids, and nothing stays behind."""
    network = Network(Prepared(model))
    levels = levels_for("int8")
    database = build_database(network, samples, Compression(levels), tmp_path)
    stitcher = Stitcher(network, database)
    plain = network.run(samples)["output"]
    rounded = network.run(samples, stitcher.weights([levels[1]] * len(stitcher.sites)))["output"]
    only_weights = {name: v for name, v in stitcher.weights([levels[1]] * 4).items() if name in network.trainable_names}
    errors = [
        float((one - plain).norm() / plain.norm()) for one in (rounded, network.run(samples, only_weights)["output"])
    ]
    assert 0 < errors[1] < errors[0] < 0.1
    assert torch.equal(network.run(samples)["output"], plain)
    again = open_database(tmp_path)
    assert again.layers == database.layers
    assert np.all(database.errors([site.name for site in stitcher.sites])[:, 1] > 0)
