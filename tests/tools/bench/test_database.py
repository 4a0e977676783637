"""The database's command line and its benchmark, on a small network."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.pipeline.database.layer_database import open_database
from onnx_spdy.tools.bench.database import bench, slope
from onnx_spdy.tools.cli import main
from onnx_spdy.tools.results import read_results
from onnx_spdy.tools.specs import SpecError, load_pruner

USER = """
import numpy as np
import torch

def largest_rows(weight, hessian, level):
    order = weight.abs().flatten().argsort()
    pruned = weight.flatten().clone()
    pruned[order[: level.zeros(weight.numel())]] = 0
    return pruned.view(weight.shape)

def data():
    rng = np.random.default_rng(0)
    return {"input": rng.normal(size=(32, 24)).astype(np.float32)}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=size).astype(np.float32) for size in ((24, 40), (40, 24))]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["input", "a.weight"], ["a"], "a"),
            onnx.helper.make_node("Relu", ["a"], ["r"], "r"),
            onnx.helper.make_node("MatMul", ["r", "b.weight"], ["output"], "b"),
        ],
        "two",
        [onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 24])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 24])],
        [onnx.numpy_helper.from_array(w, n) for w, n in zip(weights, ("a.weight", "b.weight"), strict=True)],
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "model.onnx",
    )
    (tmp_path / "user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(*options: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["database", "model.onnx", "--data", "user.py:data", "--out", "db", *options])
    return int(caught.value.code or 0)


def test_a_function_in_a_file_is_a_pruner_and_part_of_what_the_database_is(folder: Path) -> None:
    assert build("--pruner", "user.py:largest_rows", "--memory", "64") == 0
    database = open_database(folder / "db")
    assert database.made_from["pruner"].startswith("user.py:largest_rows ")
    assert build("--pruner", "user.py:largest_rows") == 0
    (folder / "user.py").write_text(USER + "\n# changed\n")
    assert build("--pruner", "user.py:largest_rows") == 1


def test_several_patterns_from_the_command_line(folder: Path) -> None:
    assert build("--pattern", "2:4,block4") == 0
    assert [str(level) for level in open_database(folder / "db").levels][:2] == ["dense", "block4@0.4000"]
    assert "2:4" in map(str, open_database(folder / "db").levels)


def test_a_file_that_is_not_there_is_no_pruner() -> None:
    with pytest.raises(SpecError, match="there is no file missing"):
        load_pruner("missing.py:prune")


def test_the_benchmark_reports_each_layer_and_pruner(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(
        "model.onnx", "user.py:data", evaluation="user.py:data", pruner="magnitude,obs", samples="16",
        sparsities="0.5,0.9", json=folder / "found.json", plot=folder / "plot.svg",
    )  # fmt: skip
    found = read_results(folder / "found.json", "bench_database")
    assert [(row["layer"], row["pruner"]) for row in found["layers"]] == [
        ("a", "magnitude"), ("a", "obs"), ("b", "magnitude"), ("b", "obs"),
    ]  # fmt: skip
    assert all(0 < row["errors"][0] < row["errors"][1] < 1.5 for row in found["layers"])
    assert found["layers"][1]["errors"] < found["layers"][0]["errors"]
    assert [one["samples"] for one in found["hessians"]] == [16, 32]
    assert {"seconds of hessians by samples", "seconds a row of obs by width"} <= set(found["exponents"])
    assert (folder / "plot.svg").read_text().rstrip().endswith("</svg>")
    assert "geometric mean" in capsys.readouterr().out


def test_layers_are_made_where_no_network_is_given(tmp_path: Path) -> None:
    bench(widths="64,128", rows=8, samples="4,8", sparsities="0.5,0.9", json=tmp_path / "found.json")
    found = read_results(tmp_path / "found.json", "bench_database")
    assert [(row["width"], row["out"]) for row in found["layers"]] == [(64, 8), (128, 8)]
    assert [one["samples"] for one in found["hessians"]] == [4, 8]
    with pytest.raises(SpecError, match="give MODEL and --data, or --widths"):
        bench()


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    assert slope([10, 20, 40], [3, 3 * 2**2.5, 3 * 4**2.5]) == pytest.approx(2.5)
