from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import ARRAYS, LatencyTable, NoSpeedup
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.runtimes import Workload, open_runtime

LEVELS = levels_for("unstructured")


@pytest.fixture(scope="module")
def table(model: onnx.ModelProto) -> LatencyTable:
    with open_runtime("fake") as runtime:
        return measure_latency(Prepared(model), runtime, LEVELS, Workload(8))


def test_dense_and_highest_speedup_are_consistent(table: LatencyTable) -> None:
    assert table.dense_seconds == pytest.approx(table.dense.median, rel=0.01)
    fastest = table.costs.fastest()
    assert table.highest_speedup == pytest.approx(table.dense_seconds / table.predict(fastest))
    assert table.budget(table.highest_speedup * 0.999) >= table.costs.total(fastest)


def test_the_impossible_is_refused_with_the_highest_reachable_speedup(table: LatencyTable) -> None:
    with pytest.raises(NoSpeedup, match=rf"highest reachable is {table.highest_speedup:.2f}"):
        table.budget(50)


def test_break_even_is_where_a_layer_becomes_faster_for_good(table: LatencyTable) -> None:
    rows = [row for row in range(len(table.layers)) if table.seconds[row, -1] < 0.9 * table.seconds[row, 0]]
    assert rows
    for row in rows:
        level = table.break_even(row)
        assert level is not None
        assert level.sparsity < 0.8  # 0.4 by the formula; in layers as tiny as these the gain is small at first
        index = LEVELS.index(level)
        assert (table.seconds[row, index:] < table.seconds[row, 0]).all()


def test_a_layer_that_is_faster_only_in_between_has_no_break_even(table: LatencyTable) -> None:
    changed = LatencyTable(
        **{**vars_of(table), "seconds": table.seconds.copy(), "transition": np.zeros_like(table.transition)}
    )
    changed.seconds[0] = 1.0
    changed.seconds[0, 3] = 0.5
    assert changed.break_even(0) is None
    changed.seconds[0, 3:] = 0.5
    assert changed.break_even(0) == LEVELS[3]


def vars_of(table: LatencyTable) -> dict:
    return {name: getattr(table, name) for name in LatencyTable.__dataclass_fields__}


def test_a_table_survives_the_disk(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "latency.json")
    again = LatencyTable.load(tmp_path / "latency.json")
    for name, value in vars_of(table).items():
        if name in ARRAYS:
            np.testing.assert_array_equal(getattr(again, name), value)
        else:
            assert getattr(again, name) == value
    assert again.predict([0] * len(table.layers)) == table.dense_seconds


def test_a_damaged_table_is_refused(table: LatencyTable, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    table.save(path)
    path.write_text(path.read_text()[:500])
    with pytest.raises(ArtifactError, match="not JSON"):
        LatencyTable.load(path)
    path.write_text("{}")
    with pytest.raises(ArtifactError, match=r"not onnx_spdy\.latency"):
        LatencyTable.load(path)
    table.save(path)
    whole = path.read_text()
    for name in ("workload", "sparse", "options"):
        path.write_text(whole.replace(f'"{name}"', '"nothing"'))
        with pytest.raises(ArtifactError, match=r"latency\.json is not as it was written"):
            LatencyTable.load(path)
