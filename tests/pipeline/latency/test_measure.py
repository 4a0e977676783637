import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared, find_layers
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.latency import measure
from onnx_spdy.pipeline.latency.measure import MachineBusy, measure_latency
from onnx_spdy.pipeline.latency.sampling import NETWORKS, imposed
from onnx_spdy.pipeline.latency.table import NoSpeedup
from onnx_spdy.pipeline.level import Level, LevelError, levels_for
from onnx_spdy.runtimes import EngineCrashed, LayerTime, Workload, open_runtime
from onnx_spdy.runtimes.fake import FakeRuntime, FakeSession
from onnx_spdy.runtimes.worker.remote import RemoteRuntime
from onnx_spdy.runtimes.worker.ssh import STARTER, Address

LEVELS = levels_for("unstructured")


def relative(model: onnx.ModelProto, runtime: FakeRuntime, choice: np.ndarray, folder: Path) -> float:
    """What the runtime measures for a mixed network, relative to the dense one."""
    layers = [layer for layer in find_layers(model) if layer.prunable]
    mixed = imposed(
        model, {layer: LEVELS[i] for layer, i in zip(layers, choice, strict=True)}, np.random.default_rng(0)
    )
    onnx.save(model, folder / "d.onnx")
    onnx.save(mixed, folder / "m.onnx")
    with runtime.open(folder / "m.onnx", Workload(8)) as one, runtime.open(folder / "d.onnx", Workload(8)) as dense:
        return one.seconds(1)[0] / dense.seconds(1)[0]


class Converting(FakeRuntime):
    """Each layer costs more after a dense one: what an engine's change of layout costs."""

    CONVERSION = 15e-6
    LAYERS = ("a", "b", "c", "d")

    def _rows(self, fixed: Any) -> list[LayerTime]:
        rows = super()._rows(fixed)
        after_dense = False
        for number, row in enumerate(rows):
            if row.outputs[0] in self.LAYERS:
                if after_dense:
                    rows[number] = LayerTime(
                        row.outputs, row.kernel, row.seconds + self.CONVERSION, row.sparse, row.kernel_sparsity
                    )
                after_dense = not row.sparse
        return rows


@pytest.mark.parametrize("make", [FakeRuntime, Converting])
def test_mixed_networks_are_predicted(make: type[FakeRuntime], model: onnx.ModelProto, tmp_path: Path) -> None:
    runtime = make()
    table = measure_latency(Prepared(model), runtime, LEVELS, Workload(8))
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(12):
        choice = np.where(rng.random(4) < 0.4, 0, rng.integers(1, 42, 4))
        predicted = table.predict(choice) / table.dense_seconds
        errors.append(abs(predicted / relative(model, runtime, choice, tmp_path) - 1))
    assert max(errors) < 0.1  # random zeros in layers of a few hundred weights scatter
    assert np.median(errors) < 0.025
    assert table.prediction is not None
    assert table.prediction.median < 0.03


def test_noise_is_averaged_out(model: onnx.ModelProto, tmp_path: Path) -> None:
    table = measure_latency(Prepared(model), FakeRuntime(noise=0.05), LEVELS, Workload(8))
    exact = FakeRuntime()
    rng = np.random.default_rng(1)
    choices = [rng.integers(0, 42, 4) for _ in range(12)]
    errors = [table.predict(c) / table.dense_seconds / relative(model, exact, c, tmp_path) - 1 for c in choices]
    assert np.median(np.abs(errors)) < 0.03
    assert table.prediction is not None
    assert 0 < table.prediction.median < 0.1


def test_levels_below_the_kernel_change_cost_what_dense_costs(model: onnx.ModelProto) -> None:
    """An engine that takes its dense kernel up to 80 % sparsity: nothing may be gained below."""
    table = measure_latency(Prepared(model), FakeRuntime(break_even=0.8), LEVELS, Workload(8))
    below = np.array([level.sparsity < 0.78 for level in LEVELS])
    above = np.array([level.sparsity > 0.82 for level in LEVELS])
    for row in range(1, len(table.layers)):  # random zeros of a small layer scatter
        assert not table.sparse[row][below].any()
        assert table.sparse[row][above].all()
        assert len(set(table.seconds[row][below])) == 1
        assert table.kernels[row][0] == "fake_dense"
        assert table.kernels[row][-1] == "fake_sparse"


def test_a_runtime_without_sparse_kernels_promises_nothing(model: onnx.ModelProto) -> None:
    with open_runtime("onnxruntime") as runtime:
        table = measure_latency(Prepared(model), runtime, LEVELS[:4], Workload(2), allow_busy=True)
    assert not table.sparse.any()
    assert table.highest_speedup == pytest.approx(1.0)
    assert table.prediction is None
    with pytest.raises(NoSpeedup):
        table.budget(1.5)


class Recorder(FakeRuntime):
    """Keeps what it is asked to open."""

    def open(self, model: Path, workload: Workload, **options: Any) -> FakeSession:  # type: ignore[override]
        self.asked = [*getattr(self, "asked", []), (model.read_bytes(), options.get("zeros"), options.get("seed"))]
        return super().open(model, workload, **options)


def test_unstructured_levels_are_zeros_in_one_file(model: onnx.ModelProto) -> None:
    runtime = Recorder()
    measure_latency(Prepared(model), runtime, LEVELS, Workload(1))
    assert len({file for file, _, _ in runtime.asked}) == 1
    networks = runtime.asked[1:]
    assert len(networks) >= NETWORKS + measure.CHOSEN_NETWORKS
    assert len({seed for _, _, seed in networks}) == len(networks)


def test_a_table_that_is_measured_elsewhere_is_the_same(model: onnx.ModelProto) -> None:
    here = FakeRuntime()
    there = RemoteRuntime(Address("nowhere", None, "fake"), here, {}, command=[sys.executable, "-c", STARTER])
    tables = []
    for runtime in (here, there):
        with runtime:
            tables.append(measure_latency(Prepared(model), runtime, LEVELS[:6], Workload(2)))
    np.testing.assert_array_equal(tables[0].seconds, tables[1].seconds)
    assert tables[0].environment == tables[1].environment


def test_other_patterns_are_files_of_their_own(model: onnx.ModelProto) -> None:
    runtime = Recorder()
    table = measure_latency(Prepared(model), runtime, levels_for("2:4"), Workload(1))
    assert len({file for file, _, _ in runtime.asked}) > 2
    assert not any(zeros for _, zeros, _ in runtime.asked)
    assert (table.seconds[1:, 1] < table.seconds[1:, 0]).all()  # the first layer has only 3 input channels


def test_several_patterns_of_zeros_are_one_table(model: onnx.ModelProto) -> None:
    levels = levels_for("unstructured,2:4")
    table = measure_latency(Prepared(model), FakeRuntime(break_even=0.45), levels, Workload(8))
    alone = measure_latency(Prepared(model), FakeRuntime(break_even=0.45), levels_for("unstructured"), Workload(8))
    column = levels.index(Level.parse("2:4"))
    single = [number for number, level in enumerate(levels) if number != column]
    np.testing.assert_array_equal(table.sparse[:, single], alone.sparse)
    np.testing.assert_allclose(table.seconds[:, single], alone.seconds, rtol=0.05)
    nearest = np.abs([level.sparsity - 0.5 for level in alone.levels]).argmin()  # the same zeros, to this formula
    assert table.sparse[1:, column].all()
    np.testing.assert_allclose(table.seconds[1:, column], alone.seconds[1:, nearest], rtol=0.1)
    assert table.prediction is not None
    assert table.prediction.median < 0.02


def test_widths_and_zeros_in_one_table_are_refused(model: onnx.ModelProto) -> None:
    levels = (*levels_for("unstructured"), *levels_for("channels")[1:])
    with pytest.raises(LevelError, match=r"one latency table of channels, unstructured"):
        measure_latency(Prepared(model), FakeRuntime(), levels, Workload(1))


class Busy(FakeRuntime):
    """Somebody else uses a core during some of the measurements."""

    def __init__(self, busy_calls: range) -> None:
        super().__init__()
        self.busy_calls, self.calls = busy_calls, 0

    def foreign_cores(self) -> float | None:
        self.calls += 1
        return 1.0 if self.calls in self.busy_calls else 0.0


def test_a_busy_machine_is_noticed_and_what_was_measured_is_kept(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "BUSY_WAITS_SECONDS", (0.001, 0.001))
    save, keep = tmp_path / "latency.json", tmp_path / "latency.partial.json"
    workload = Workload(2)
    with pytest.raises(MachineBusy, match=r"1\.0 of the \d+ cores.*networks are kept"):
        measure_latency(Prepared(model), Busy(range(10, 10_000)), LEVELS, workload, save=save)
    kept = keep.read_text()
    assert '"observations"' in kept
    again = Recorder()
    table = measure_latency(Prepared(model), again, LEVELS, workload, save=save)
    assert not keep.exists()
    assert save.exists()
    expected = measure_latency(Prepared(model), FakeRuntime(), LEVELS, Workload(2))
    np.testing.assert_allclose(table.seconds, expected.seconds)
    assert len(again.asked) < NETWORKS + measure.CHOSEN_NETWORKS  # those that were kept weren't repeated


def test_a_passing_disturbance_is_measured_again(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "BUSY_WAITS_SECONDS", (0.001, 0.001))
    notes = []
    table = measure_latency(
        Prepared(model), Busy(range(10, 12)), LEVELS, Workload(2), progress=lambda done, total, note: notes.append(note)
    )
    assert any("other programs keep 1.0 cores busy" in note for note in notes)
    assert table.foreign_cores == 0.0


def test_a_busy_machine_may_be_allowed_and_is_told(model: onnx.ModelProto) -> None:
    table = measure_latency(Prepared(model), Busy(range(1, 10_000)), LEVELS, Workload(2), allow_busy=True)
    assert table.foreign_cores == 1.0


class Dying(FakeRuntime):
    """Its process dies after some networks."""

    left = 20

    def layer_seconds(self, model: Path, workload: Workload, **options: Any) -> list[LayerTime]:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise EngineCrashed("fake died during 'layers': killed by SIGKILL")
        return super().layer_seconds(model, workload, **options)


def test_what_was_measured_before_the_engine_died_is_used(model: onnx.ModelProto, tmp_path: Path) -> None:
    save = tmp_path / "latency.json"
    with pytest.raises(EngineCrashed, match=r"SIGKILL; \d measured networks are kept in .*start again") as caught:
        measure_latency(Prepared(model), Dying(), LEVELS, Workload(2), save=save)
    assert "\n" not in str(caught.value)
    table = measure_latency(Prepared(model), FakeRuntime(), LEVELS, Workload(2), save=save)
    np.testing.assert_allclose(
        table.seconds, measure_latency(Prepared(model), FakeRuntime(), LEVELS, Workload(2)).seconds
    )
    assert list(tmp_path.iterdir()) == [save]


def test_what_was_kept_for_another_question_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    save, keep = tmp_path / "latency.json", tmp_path / "latency.partial.json"
    with pytest.raises(EngineCrashed):
        measure_latency(Prepared(model), Dying(), LEVELS, Workload(2), save=save)
    with pytest.raises(ArtifactError, match="batch"):
        measure_latency(Prepared(model), FakeRuntime(), LEVELS, Workload(3), save=save)
    assert keep.exists()


def test_what_was_kept_damaged_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    save, keep = tmp_path / "latency.json", tmp_path / "latency.partial.json"
    with pytest.raises(EngineCrashed):
        measure_latency(Prepared(model), Dying(), LEVELS, Workload(2), save=save)
    keep.write_text(keep.read_text().replace('"choice"', '"chosen"'))
    with pytest.raises(ArtifactError, match=r"partial\.json is not as it was written: its checksum differs; delete it"):
        measure_latency(Prepared(model), FakeRuntime(), LEVELS, Workload(2), save=save)


def images(samples: int, size: int) -> dict[str, np.ndarray]:
    return {"input": np.zeros((samples, 3, size, size), np.float32)}


def test_what_was_kept_for_inputs_of_another_size_is_refused(any_size: onnx.ModelProto, tmp_path: Path) -> None:
    save = tmp_path / "latency.json"
    with pytest.raises(EngineCrashed):
        measure_latency(Prepared(any_size), Dying(), LEVELS, Workload(2, inputs=images(2, 12)), save=save)
    with pytest.raises(ArtifactError, match=r"partial.json was measured with .*input float32\[2, 3, 16, 16\]"):
        measure_latency(Prepared(any_size), FakeRuntime(), LEVELS, Workload(2, inputs=images(2, 16)), save=save)
    # One sample, repeated to the batch, is the same work as two.
    measure_latency(Prepared(any_size), FakeRuntime(), LEVELS, Workload(2, inputs=images(1, 12)), save=save)
    assert save.exists()
