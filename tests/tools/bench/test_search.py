"""The benchmark of searches, on a small network and a runtime of formulas."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

from onnx_spdy.models import save_model
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import build_database
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.runtimes import Workload, open_runtime
from onnx_spdy.tools.bench.search import Row, _reached, bench
from onnx_spdy.tools.results import read_results
from onnx_spdy.tools.specs import load_network
from tests.pipeline.conftest import build_model

LEVELS = levels_for("unstructured")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    images = rng.normal(size=(160, 3, 12, 12)).astype(np.float32).cumsum(axis=3)
    save_model(build_model(), tmp_path / "model.onnx")
    model = load_network(str(tmp_path / "model.onnx"))
    np.savez(tmp_path / "data.npz", input=images, target=rng.integers(0, 10, 160))
    with open_runtime("fake", layer_overhead_seconds=0.0, node_seconds=1e-9) as runtime:
        measure_latency(model, runtime, LEVELS, Workload(8)).save(tmp_path / "latency.json")
    samples = Samples({"input": images})
    build_database(Network(model), samples, Compression(LEVELS, pruner_named("magnitude")), tmp_path / "database")
    return tmp_path


def run(folder: Path, search: str, **more) -> list[Row]:
    bench(
        str(folder / "model.onnx"), folder / "latency.json", folder / "database", str(folder / "data.npz"),
        speedup="2", search=search, seeds="0", search_samples=64, json=folder / "rows.json", **more,
    )  # fmt: skip
    return [Row(**row) for row in read_results(folder / "rows.json", "bench_search")["rows"]]


def test_rows_are_judged_and_what_was_done_is_not_done_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (uniform,) = run(folder, "uniform", evaluation=str(folder / "data.npz"))
    assert uniform.deployed_loss is not None and uniform.deployed_loss > 0
    assert uniform.top1 is not None and 0 <= uniform.top1 <= 1
    with pytest.raises(typer.BadParameter, match="at 2x with seed 0"):
        run(folder, "thompson", share=0.1)
    first, second, third = run(folder, "spdy,thompson", share=0.1)
    assert first == uniform
    assert second.search == "spdy" and second.limit is None
    assert third.limit == round(0.1 * second.samples_run)
    assert third.samples_run <= third.limit + 64
    assert run(folder, "spdy,thompson", share=0.1) == [first, second, third]
    assert "Cost of spdy's final loss" in capsys.readouterr().out


def test_a_loss_on_fewer_samples_is_not_taken_for_one_on_all() -> None:
    trace = [(64, 0.1, 0.5), (128, 0.2, 0.3)]
    row = Row("thompson", 2.0, 0, 64, 256, 256, 4, 0.4, loss=0.3, trace=trace)
    assert _reached(row, 0.5) == (64, 0.1)
    assert _reached(row, 0.3) == (128, 0.2)
    assert _reached(row, 0.2) is None
    by_fewer = replace(row, loss=0.4)  # on all samples, though it saw 0.3 on its own
    assert _reached(by_fewer, 0.35) is None
    assert _reached(by_fewer, 0.4) == (256, 0.4)
