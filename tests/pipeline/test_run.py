import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import load_model
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.deploy import check_deployed
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.metric import MetricError, top1
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.run import run
from onnx_spdy.runtimes import open_runtime

OVERHEADLESS = {"layer_overhead_seconds": 0.0, "node_seconds": 1e-9}


def do(model: onnx.ModelProto, samples: Samples, out: Path, speedup: float = 1.5, **more):
    with open_runtime("fake", **OVERHEADLESS) as runtime:
        return run(
            model, samples, runtime, speedup, out, batch=8, evaluation=samples, metric=top1, metric_name="top1", **more
        )


@pytest.fixture(scope="module")
def finished(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples]:
    rng = np.random.default_rng(1)
    samples = Samples({"input": rng.normal(size=(96, 3, 12, 12)).astype(np.float32)}, rng.integers(0, 10, 96))
    out = tmp_path_factory.mktemp("run")
    do(model, samples, out)
    return out, samples


def test_the_promise_is_kept_and_every_artifact_is_there(finished: tuple[Path, Samples]) -> None:
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    for name in ("dense.onnx", "model.onnx", "latency.json", "profile.json", "database/index.json"):
        assert (out / name).is_file()
    assert (report["format"], report["version"]) == ("onnx_spdy.report", 1)
    assert report["target_speedup"] == 1.5
    assert report["predicted_speedup"] >= 1.5
    assert report["measured_speedup"] == pytest.approx(report["dense_seconds"] / report["pruned_seconds"])
    assert report["measured_speedup_lower"] >= 1.45
    assert report["measured_speedup"] == pytest.approx(report["predicted_speedup"], rel=0.05)
    assert {stage["name"] for stage in report["stages"]} >= {"measure", "database", "search", "validate", "evaluate"}


def test_a_metric_that_does_not_fit_the_data_is_refused_before_the_long_work(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    unlabelled = Samples({"input": np.zeros((8, 3, 12, 12), np.float32)})
    with pytest.raises(MetricError, match="needs labels"):
        do(model, unlabelled, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dense.onnx"]


def test_the_report_agrees_with_the_written_file(finished: tuple[Path, Samples]) -> None:
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in load_model(out / "model.onnx").graph.initializer}
    for layer in report["layers"]:
        assert layer["sparsity"] == pytest.approx(float((arrays[layer["initializer"]] == 0).mean()))
    check_deployed(
        load_model(out / "dense.onnx"), load_model(out / "model.onnx"), Profile.load(out / "profile.json").levels
    )


def test_a_second_call_keeps_the_work_of_the_first(model: onnx.ModelProto, finished: tuple[Path, Samples]) -> None:
    out, samples = finished
    names = ("dense.onnx", "latency.json", "database/index.json", "database/0000.safetensors")
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    content = (out / "model.onnx").read_bytes()
    evaluations = Profile.load(out / "profile.json").evaluations
    do(model, samples, out)
    assert Profile.load(out / "profile.json").evaluations == evaluations
    assert before == {name: (out / name).stat().st_mtime_ns for name in names}
    assert (out / "model.onnx").read_bytes() == content


def test_another_target_shares_the_table_and_the_database(
    model: onnx.ModelProto, finished: tuple[Path, Samples]
) -> None:
    out, samples = finished
    before = (out / "latency.json").read_bytes(), (out / "database" / "index.json").read_bytes()
    report = do(model, samples, out, speedup=1.2, search="uniform").content
    assert (report["search"], report["target_speedup"]) == ("uniform", 1.2)
    assert before == ((out / "latency.json").read_bytes(), (out / "database" / "index.json").read_bytes())
    do(model, samples, out)


def test_the_same_seed_gives_the_same_bytes(
    model: onnx.ModelProto, finished: tuple[Path, Samples], tmp_path: Path
) -> None:
    out, samples = finished
    do(model, samples, tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


def test_an_impossible_target_is_refused_before_the_long_work(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    with pytest.raises(NoSpeedup, match="highest reachable"):
        do(model, samples, tmp_path, speedup=500)
    assert not (tmp_path / "database").exists()


def test_a_folder_of_another_network_is_refused(finished: tuple[Path, Samples]) -> None:
    out, samples = finished
    other = load_model(out / "model.onnx")
    with pytest.raises(ArtifactError, match="model_sha256"):
        do(other, samples, out)


def test_a_table_of_another_batch_is_refused(model: onnx.ModelProto, finished: tuple[Path, Samples]) -> None:
    out, samples = finished
    with (
        open_runtime("fake", **OVERHEADLESS) as runtime,
        pytest.raises(ArtifactError, match="its batch is 8, this run's is 4"),
    ):
        run(model, samples, runtime, 1.5, out, batch=4)


@pytest.mark.parametrize("pattern", ["2:4", "block4"])
def test_other_patterns_go_the_same_way(model: onnx.ModelProto, samples: Samples, tmp_path: Path, pattern: str) -> None:
    report = do(model, samples, tmp_path, speedup=1.1, pattern=pattern).content
    levels = {layer["level"] for layer in report["layers"]}
    assert any(level.startswith(pattern) for level in levels)
    assert report["measured_speedup"] > 1.05
    assert LatencyTable.load(tmp_path / "latency.json").levels[1].pattern == pattern


def test_repair_comes_after_the_measurement_and_keeps_its_zeros(
    model: onnx.ModelProto, finished: tuple[Path, Samples], tmp_path: Path
) -> None:
    out, samples = finished
    report = do(model, samples, tmp_path, finetune="gap").content
    assert [stage["name"] for stage in report["stages"]][3:5] == ["validate", "repair"]
    assert report["repair"]["loss_after"] < report["repair"]["loss_before"]
    plain, repaired = (
        {t.name: onnx.numpy_helper.to_array(t) for t in load_model(folder / "model.onnx").graph.initializer}
        for folder in (out, tmp_path)
    )
    pruned = [layer["initializer"] for layer in report["layers"] if layer["level"] != "dense"]
    for name in pruned:
        assert ((plain[name] == 0) == (repaired[name] == 0)).all()
        assert not np.array_equal(plain[name], repaired[name])
    check_deployed(
        load_model(tmp_path / "dense.onnx"), load_model(tmp_path / "model.onnx"),
        Profile.load(tmp_path / "profile.json").levels,
    )  # fmt: skip
    content = (tmp_path / "model.onnx").read_bytes()
    again = do(model, samples, tmp_path, finetune="gap").content  # from the checkpoint, not trained again
    assert again["repair"] == report["repair"]
    assert (tmp_path / "model.onnx").read_bytes() == content
