"""Databases on local clusters, and how many workers would pay."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.tools.bench.cluster import Row, bench, makespan, simulate
from onnx_spdy.tools.results import read_results
from tests.pipeline.conftest import build_model


def test_lists_are_scheduled_longest_first() -> None:
    assert makespan([1, 2, 3, 4], 1) == 10
    assert makespan([1, 2, 3, 4], 2) == 5
    assert makespan([2, 3, 2, 3, 2], 2) == 7  # 3 + 3 and 2 + 2 + 2 would end at 6
    assert makespan([1, 5], 64) == 5


def test_what_is_not_in_tasks_stays() -> None:
    rows = simulate(Row(1, 10.0), {"shards": [1.0, 1.0], "sites": [1.0, 2.0, 3.0]})
    assert [row["workers"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert [row["seconds"] for row in rows[:3]] == [10.0, 2 + 1 + 3, 2 + 1 + 3]


def test_the_table_tells_what_workers_gain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(build_model(), tmp_path / "network.onnx")
    images = np.random.default_rng(0).normal(size=(64, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "data.npz", input=images)
    bench(
        str(tmp_path / "network.onnx"), str(tmp_path / "data.npz"), "unstructured", "magnitude", "1",
        tmp_path / "rows.json",
    )  # fmt: skip
    content = read_results(tmp_path / "rows.json", "bench_cluster")
    here, there = content["rows"]
    assert (here["workers"], there["workers"]) == (0, 1)
    assert 0 < there["task_seconds"] < there["seconds"]
    assert there["sent_bytes"] > images.nbytes
    assert there["received_bytes"] > 0
    assert (len(content["tasks"]["shards"]), len(content["tasks"]["sites"])) == (1, 4)
    printed = capsys.readouterr().out
    assert "A layer database, measured" in printed and "twice as many workers gain less than 10%" in printed
