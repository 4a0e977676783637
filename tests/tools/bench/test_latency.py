"""The benchmark of latency tables, on a small network and a runtime of formulas."""

from pathlib import Path

import numpy as np
import pytest

from onnx_spdy.models import save_model
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.tools.bench import latency
from onnx_spdy.tools.bench.latency import bench
from onnx_spdy.tools.results import read_results
from tests.pipeline.conftest import build_model


@pytest.mark.parametrize("pattern", ["unstructured", "channels"])
def test_it_compares_the_model_and_the_plain_sum_with_what_is_measured(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(build_model(), tmp_path / "model.onnx")
    bench(
        str(tmp_path / "model.onnx"), "fake", tmp_path / "latency.json", batch=8, pattern=pattern, networks=9,
        json=tmp_path / "rows.json",
    )  # fmt: skip
    found = read_results(tmp_path / "rows.json", "bench_latency")
    measured, model = np.array(found["measured"]).mean(axis=1), np.array(found["predicted"]["model"])
    plain = np.array(found["predicted"]["plain sum"])
    assert measured.shape == (9,)
    assert np.abs(model / measured - 1).max() < 0.1
    assert np.median(np.abs(model / measured - 1)) <= np.median(np.abs(plain / measured - 1)) + 0.005
    assert "two visits of one network differ by 0.0% (median)" in capsys.readouterr().out


def test_a_table_of_other_levels_is_refused(tmp_path: Path) -> None:
    save_model(build_model(), tmp_path / "model.onnx")
    given = (str(tmp_path / "model.onnx"), "fake", tmp_path / "latency.json")
    bench(*given, networks=2)
    with pytest.raises(ArtifactError, match="other levels than those of pattern channels"):
        bench(*given, pattern="channels", networks=2)


def test_widths_are_drawn_from_all_over() -> None:
    levels = latency.levels_for("channels")
    drawn = latency.random_choices(levels, 7, 40, np.random.default_rng(0))
    assert drawn.shape == (40, 7)
    assert drawn.min() == 0
    assert drawn.max() == len(levels) - 1
