import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_spdy.models import find_layers
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.latency import LatencyTable, NoSpeedup, imposed, measure_latency, monotone
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.runtimes import LayerTime, open_runtime
from onnx_spdy.runtimes.fake import FakeRuntime
from onnx_spdy.runtimes.remote import RemoteRuntime
from onnx_spdy.runtimes.ssh import STARTER, Address

LEVELS = levels_for("unstructured")


@pytest.fixture(scope="module")
def table(model: onnx.ModelProto) -> LatencyTable:
    with open_runtime("fake") as runtime:
        return measure_latency(model, runtime, LEVELS, batch=8, rounds=1, rng=np.random.default_rng(0))


def test_prediction_of_a_mixed_profile_equals_what_the_runtime_measures(
    table: LatencyTable, model: onnx.ModelProto, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    layers = [layer for layer in find_layers(model) if layer.prunable]
    choice = rng.integers(0, 42, len(layers))
    onnx.save(
        imposed(model, {layer: LEVELS[i] for layer, i in zip(layers, choice, strict=True)}, rng), tmp_path / "m.onnx"
    )
    with open_runtime("fake") as runtime, runtime.open(tmp_path / "m.onnx", batch=8) as session:
        assert table.predict(choice) == pytest.approx(session.seconds(1)[0], rel=0.05)


def test_dense_and_highest_speedup_are_consistent(table: LatencyTable) -> None:
    assert table.dense_seconds == pytest.approx(table.dense.median, rel=1e-6)
    fastest = table.predict(table.seconds.argmin(axis=1))
    assert table.highest_speedup == pytest.approx(table.dense_seconds / fastest)
    budget = table.budget(table.highest_speedup * 0.999)
    assert budget >= table.seconds.min(axis=1).sum()


def test_the_impossible_is_refused_with_the_highest_reachable_speedup(table: LatencyTable) -> None:
    with pytest.raises(NoSpeedup, match=rf"highest reachable is {table.highest_speedup:.2f}"):
        table.budget(50)


def test_a_table_survives_the_disk(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "latency.json")
    again = LatencyTable.load(tmp_path / "latency.json")
    for name in ("seconds", "measured_seconds", "spread", "sparse"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    for name in ("layers", "levels", "kernels", "base_seconds", "others", "dense", "environment", "model_sha256"):
        assert getattr(again, name) == getattr(table, name)


def test_a_damaged_table_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    table.save(path)
    path.write_text(path.read_text()[:500])
    with pytest.raises(ArtifactError, match="not JSON"):
        LatencyTable.load(path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match=r"not onnx_spdy\.latency"):
        LatencyTable.load(path)


def test_a_runtime_without_sparse_kernels_promises_nothing(model: onnx.ModelProto) -> None:
    with open_runtime("onnxruntime") as runtime:
        table = measure_latency(model, runtime, LEVELS[:4], batch=2, rounds=1, rng=np.random.default_rng(0))
    assert not table.sparse.any()
    assert table.highest_speedup == pytest.approx(1.0)
    with pytest.raises(NoSpeedup):
        table.budget(1.5)


class Recorder(FakeRuntime):
    """Keeps what it is asked to profile."""

    def layer_seconds(self, model: Path, **options: Any) -> list[LayerTime]:  # type: ignore[override]
        self.asked = [*getattr(self, "asked", []), (model.read_bytes(), options["zeros"], options["seed"])]
        return super().layer_seconds(model, **options)


def test_unstructured_levels_are_zeros_in_one_file(model: onnx.ModelProto) -> None:
    runtime = Recorder()
    measure_latency(model, runtime, LEVELS[:5], batch=1, rounds=2, rng=np.random.default_rng(0))
    weights = [layer.weight for layer in find_layers(model) if layer.prunable]
    expected = [dict.fromkeys(weights, level.sparsity) if level.sparsity else {} for level in LEVELS[:5]] * 2
    assert len({file for file, _, _ in runtime.asked}) == 1
    assert sorted(map(str, expected)) == sorted(str(zeros) for _, zeros, _ in runtime.asked)
    assert len({seed for _, _, seed in runtime.asked}) == 10


def test_a_table_that_is_measured_elsewhere_is_the_same(model: onnx.ModelProto) -> None:
    here = FakeRuntime()
    there = RemoteRuntime(Address("nowhere", None, "fake"), here, {}, command=[sys.executable, "-c", STARTER])
    tables = []
    for runtime in (here, there):
        with runtime:
            rng = np.random.default_rng(0)
            tables.append(measure_latency(model, runtime, LEVELS[:6], batch=2, rounds=1, rng=rng))
    np.testing.assert_array_equal(tables[0].measured_seconds, tables[1].measured_seconds)
    assert tables[0].environment == tables[1].environment


def test_other_patterns_are_files_of_their_own(model: onnx.ModelProto) -> None:
    runtime = Recorder()
    table = measure_latency(model, runtime, levels_for("2:4"), batch=1, rounds=1, rng=np.random.default_rng(0))
    assert len({file for file, _, _ in runtime.asked}) == len(levels_for("2:4"))
    assert not any(zeros for _, zeros, _ in runtime.asked)
    assert (table.seconds[1:, 1] < table.seconds[1:, 0]).all()  # the first layer has only 3 input channels


def test_cleaning_makes_sparse_runs_monotone_and_keeps_their_means() -> None:
    rng = np.random.default_rng(0)
    noisy = np.linspace(5, 1, 20) + rng.normal(0, 0.5, (3, 20))
    sparse = np.ones((3, 20), bool)
    sparse[:, :4] = False
    cleaned = monotone(noisy, sparse)
    assert (np.diff(cleaned[:, 4:], axis=1) <= 1e-12).all()
    np.testing.assert_allclose(cleaned[:, 4:].mean(axis=1), noisy[:, 4:].mean(axis=1))
    np.testing.assert_allclose(cleaned[:, :4], np.median(noisy[:, :4], axis=1)[:, None].repeat(4, axis=1))


def test_cleaning_is_the_best_monotone_fit() -> None:
    values = np.array([[3.0, 1.0, 2.0, 2.5, 0.5]])
    np.testing.assert_allclose(monotone(values, np.ones((1, 5), bool)), [[3.0, 5.5 / 3, 5.5 / 3, 5.5 / 3, 0.5]])


def test_a_real_dip_into_a_dense_kernel_is_not_smoothed_away() -> None:
    values = np.array([[4.0, 4.0, 9.0, 8.0, 2.0]])  # the sparse kernel is slower than the dense one at first
    sparse = np.array([[False, False, True, True, True]])
    np.testing.assert_array_equal(monotone(values, sparse), values)
