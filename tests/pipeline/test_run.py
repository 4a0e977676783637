import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared, load_model
from onnx_spdy.pipeline.artifact import ArtifactError, FolderInUse
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER, pruner_named
from onnx_spdy.pipeline.deploy import check_deployed
from onnx_spdy.pipeline.latency.load_or_measure import load_or_measure
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.level import DEFAULT_PATTERN, levels_for
from onnx_spdy.pipeline.metric import Evaluation, MetricError, top1
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.run import Target, keep_dense, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.runtimes import open_runtime

OVERHEADLESS = {"layer_overhead_seconds": 0.0, "node_seconds": 1e-9}


def do(
    model: onnx.ModelProto,
    samples: Samples,
    out: Path,
    speedup: float = 1.5,
    pattern: str = DEFAULT_PATTERN,
    pruner: str = DEFAULT_PRUNER,
    **more,
) -> Report:
    with open_runtime("fake", **OVERHEADLESS) as runtime:
        return run(
            Prepared(model), samples, runtime, workload_of(samples, 8), Target(speedup, out),
            compression=Compression(levels_for(pattern), pruner_named(pruner)),
            evaluation=Evaluation(samples, top1, "top1"), **more,
        )  # fmt: skip


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
    assert report["measured_speedup_lower"] >= 1.5
    assert report["measured_speedup"] == pytest.approx(report["predicted_speedup"], rel=0.05)
    assert {stage["name"] for stage in report["stages"]} >= {"measure", "database", "search", "validate", "evaluate"}


def test_a_metric_that_does_not_fit_the_data_is_refused_before_the_long_work(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    unlabelled = Samples({"input": np.zeros((8, 3, 12, 12), np.float32)})
    with pytest.raises(MetricError, match="needs labels"):
        do(model, unlabelled, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "dense.onnx"]


def test_the_report_agrees_with_the_written_file(finished: tuple[Path, Samples]) -> None:
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in load_model(out / "model.onnx").graph.initializer}
    for layer in report["layers"]:
        assert layer["sparsity"] == pytest.approx(float((arrays[layer["initializer"]] == 0).mean()))
    dense = Prepared(load_model(out / "dense.onnx"))
    check_deployed(dense, load_model(out / "model.onnx"), Profile.load(out / "profile.json").levels)


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
    report = do(model, samples, out, speedup=1.2, search=SearchSettings("uniform")).content
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
        run(Prepared(model), samples, runtime, workload_of(samples, 4), Target(1.5, out))


def test_a_table_of_images_of_another_size_is_refused(any_size: onnx.ModelProto, tmp_path: Path) -> None:
    dense = Prepared(any_size)
    keep_dense(dense, tmp_path / "dense.onnx")
    path, levels = tmp_path / "latency.json", levels_for("unstructured")

    def table_for(size: int, samples: int) -> LatencyTable:
        workload = workload_of(Samples({"input": np.zeros((samples, 3, size, size), np.float32)}), 4)
        with open_runtime("fake") as runtime:
            return load_or_measure(dense, runtime, levels, workload, path, tmp_path / "dense.onnx")

    measured = table_for(12, 4)
    assert table_for(12, 1).workload == measured.workload
    with pytest.raises(ArtifactError, match=r"latency.json was measured with .*input float32\[4, 3, 16, 16\]"):
        table_for(16, 4)


@pytest.mark.parametrize("pattern", ["2:4", "block4", "blockout4"])
def test_other_patterns_go_the_same_way(model: onnx.ModelProto, samples: Samples, tmp_path: Path, pattern: str) -> None:
    report = do(model, samples, tmp_path, speedup=1.1, pattern=pattern).content
    levels = {layer["level"] for layer in report["layers"]}
    assert any(level.startswith(pattern) for level in levels)
    assert report["measured_speedup_lower"] >= 1.1
    assert LatencyTable.load(tmp_path / "latency.json").levels[1].pattern == pattern


def test_repair_comes_after_the_measurement_and_keeps_its_zeros(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path
) -> None:
    """With the magnitude pruner, which leaves something to repair."""
    plainly, out = tmp_path / "plain", tmp_path / "repaired"
    do(model, samples, plainly, pruner="magnitude")
    report = do(model, samples, out, pruner="magnitude", finetune="gap").content
    assert [stage["name"] for stage in report["stages"]][3:5] == ["validate", "repair"]
    assert report["repair"]["loss_after"] < report["repair"]["loss_before"]
    plain, repaired = (
        {t.name: onnx.numpy_helper.to_array(t) for t in load_model(folder / "model.onnx").graph.initializer}
        for folder in (plainly, out)
    )
    pruned = [layer["initializer"] for layer in report["layers"] if layer["level"] != "dense"]
    for name in pruned:
        assert ((plain[name] == 0) == (repaired[name] == 0)).all()
        assert not np.array_equal(plain[name], repaired[name])
    check_deployed(
        Prepared(load_model(out / "dense.onnx")), load_model(out / "model.onnx"),
        Profile.load(out / "profile.json").levels,
    )  # fmt: skip
    content = (out / "model.onnx").read_bytes()
    again = do(
        model, samples, out, pruner="magnitude", finetune="gap"
    ).content  # from the checkpoint, not trained again
    assert again["repair"] == report["repair"]  # from the checkpoint, not trained again
    assert (out / "model.onnx").read_bytes() == content


def test_two_runs_in_one_folder_do_not_meet(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    code = "import sys, pathlib; from onnx_spdy.pipeline.artifact import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"locked\n"
        with pytest.raises(FolderInUse, match="another command works in"):
            do(model, samples, tmp_path)
        other.kill()
    do(model, samples, tmp_path, speedup=1.2)  # whoever was killed leaves no lock behind
