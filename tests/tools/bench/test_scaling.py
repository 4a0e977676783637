"""Searches on networks of formulas."""

from pathlib import Path

import numpy as np
import pytest

from onnx_spdy.pipeline.search.methods import SEARCHES
from onnx_spdy.tools.bench.scaling import bench
from onnx_spdy.tools.bench.synthetic import STAGES, SyntheticNetwork
from onnx_spdy.tools.results import read_results


def test_the_table_tells_what_each_size_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench("3,6", "thompson", 2.0, 0, tmp_path / "rows.json", tmp_path / "rows.svg")
    small, large = read_results(tmp_path / "rows.json", "bench_scaling")["rows"]
    assert (small["layers"], large["layers"]) == (3, 6)
    for row in (small, large):
        assert row["loss"] <= row["dp_loss"]
        assert 0 <= row["solve_gap"] < 0.01
        assert 0 < row["samples_run"] < row["spdy_samples_run"]
    assert (tmp_path / "rows.svg").read_text().rstrip().endswith("</svg>")
    assert "Searches by the number of layers" in capsys.readouterr().out


def test_samples_are_counted_once_and_few_samples_are_part_of_all() -> None:
    network = SyntheticNetwork(8)
    choice = np.full(8, 20)
    few = network.loss(choice, STAGES[0])
    assert network.samples_run == STAGES[0]
    assert network.loss(choice) != few == network.loss(choice, STAGES[0])
    assert (network.samples_run, network.profiles) == (STAGES[-1], 1)


@pytest.mark.parametrize("coupling", [0.0, 1.0])
def test_the_default_is_better_than_the_database_alone(coupling: float) -> None:
    network = SyntheticNetwork(10, coupling=coupling)
    alone, found = (SEARCHES[name](network.problem(2.5)).choice for name in ("dp", "thompson"))
    assert network.true_loss(found) < 0.9 * network.true_loss(alone)
