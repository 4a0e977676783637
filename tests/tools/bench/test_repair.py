"""The benchmark of pruning with very little data, on a small network."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.pipeline.database.layer_database import open_database
from onnx_spdy.pipeline.level import DENSE
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.tools.bench.repair import bench
from onnx_spdy.tools.cli import main
from onnx_spdy.tools.results import read_results

DATA = """
import numpy as np

def data():
    inputs = np.random.default_rng(0).normal(size=(48, 16)).astype(np.float32)
    return {"input": inputs, "target": np.arange(48) % 4}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rng = np.random.default_rng(0)
    sizes = {"a": (16, 32), "b": (32, 32), "c": (32, 32), "d": (32, 4)}
    nodes = [
        onnx.helper.make_node("MatMul", [start, f"{name}.weight"], [name if name != "d" else "output"], name)
        for start, name in zip(("input", "a", "b", "c"), sizes, strict=True)
    ]
    graph = onnx.helper.make_graph(
        nodes, "four",
        [onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 16])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(rng.normal(size=n).astype(np.float32), f"{k}.weight") for k, n in sizes.items()],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "model.onnx")
    (tmp_path / "user.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_step_is_scored_for_every_pruner_and_number_of_samples(folder: Path) -> None:
    bench("model.onnx", "user.py:data", "user.py:data", samples="16,32", epochs=1, json=folder / "found.json")
    rows = read_results(folder / "found.json", "bench_repair")["rows"]
    assert [(row["samples"], row["levels"], row["pruner"]) for row in rows] == [
        (count, "2:4", pruner) for count in (16, 32) for pruner in ("magnitude", "obs")
    ]
    assert all(0 <= row[step] <= 1 for row in rows for step in ("pruned", "corrected", "repaired"))
    # The dense network is whole again before the next pruner starts, which magnitude's weights would spoil.
    bench("model.onnx", "user.py:data", "user.py:data", samples="32", pruner="obs", epochs=1, json=folder / "one.json")
    (alone,) = read_results(folder / "one.json", "bench_repair")["rows"]
    assert alone["error_before"] == pytest.approx(rows[3]["error_before"], rel=1e-4)


def test_profiles_take_the_place_of_one_level_and_a_database_that_of_pruning(folder: Path) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["database", "model.onnx", "--data", "user.py:data", "--out", "database"])
    levels = open_database(folder / "database").levels
    chosen = {"a": DENSE, "b": levels[5], "c": DENSE, "d": levels[20]}
    Profile(chosen, 2, 2, 1, 2, 0.1, "kl", None, "dp", 1, 1, "finished", 0, None, {}).save(folder / "profile.json")
    found = []
    for database in (None, folder / "database"):
        bench(
            "model.onnx", "user.py:data", "user.py:data", profile=[folder / "profile.json"], samples="48",
            pruner="obs", database=database, epochs=1, json=folder / "found.json",
        )  # fmt: skip
        found += read_results(folder / "found.json", "bench_repair")["rows"]
    assert found[0]["levels"].endswith("profile.json")
    assert 0 < found[0]["error_before"] < 1
    assert found[1]["error_before"] == pytest.approx(found[0]["error_before"], rel=1e-4)
