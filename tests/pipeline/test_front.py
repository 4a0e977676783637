import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared, load_model
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.deploy import check_deployed
from onnx_spdy.pipeline.front import FILE, Front, meet_all
from onnx_spdy.pipeline.latency.table import NoSpeedup
from onnx_spdy.pipeline.metric import Evaluation, top1
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.runtimes import open_runtime

TARGETS = [1.3, 2.0, 1.6]


def reach_targets(model: onnx.ModelProto, out: Path, targets: list[float]) -> Front:
    rng = np.random.default_rng(1)
    samples = Samples({"input": rng.normal(size=(96, 3, 12, 12)).astype(np.float32)}, rng.integers(0, 10, 96))
    with open_runtime("fake", layer_overhead_seconds=0.0, node_seconds=1e-9) as runtime:

        def meet(speedup: float, folder: Path) -> Report:
            return run(
                Prepared(model), samples, runtime, workload_of(samples, 8), Target(speedup, folder, shared=out),
                compression=Compression(pruner=pruner_named("magnitude")),
                evaluation=Evaluation(samples, top1, "top1"),
            )  # fmt: skip

        return meet_all(targets, out, meet)[0]


@pytest.fixture(scope="module")
def finished(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Front]:
    out = tmp_path_factory.mktemp("front")
    return out, reach_targets(model, out, TARGETS)


def test_every_point_is_a_network_of_its_own_and_meets_its_target(finished: tuple[Path, Front]) -> None:
    out, front = finished
    points = front.content["points"]
    assert [point["target_speedup"] for point in points] == sorted(TARGETS)
    assert [point["loss"] for point in points] == sorted(point["loss"] for point in points)
    for point in points:
        folder = out / point["folder"]
        report = json.loads((folder / "report.json").read_text())
        assert point["measured_speedup"] == report["measured_speedup"]
        assert report["measured_speedup_lower"] >= point["target_speedup"]
        levels = Profile.load(folder / "profile.json").levels
        check_deployed(Prepared(load_model(out / "dense.onnx")), load_model(folder / "model.onnx"), levels)
    assert Front.load(out / FILE).content["points"] == points


def test_table_database_and_scores_are_shared(finished: tuple[Path, Front]) -> None:
    out, front = finished
    assert {path.name for path in out.iterdir()} == {
        ".lock", "1.3x", "1.6x", "2x", "dense.onnx", "latency.json", "database", "search.json", FILE,
    }  # fmt: skip
    run = [Profile.load(out / point["folder"] / "profile.json").samples_run for point in front.content["points"]]
    assert run[0] < run[-1]  # the highest target came first and paid for the probes of the layers


def test_an_impossible_target_is_refused_before_the_long_work_for_the_others(
    model: onnx.ModelProto, tmp_path: Path
) -> None:
    with pytest.raises(NoSpeedup):
        reach_targets(model, tmp_path, [1.3, 500])
    assert not (tmp_path / "database").exists()
