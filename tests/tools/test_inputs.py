"""Networks whose inputs aren't samples first, or that take only some inputs: all the way through the commands."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import fixed_batch, load_model
from onnx_spdy.tools.cli import main

WIDTH, HIDDEN, CLASSES, COUNT = 64, 1024, 10, 48
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
node = helper.make_node
rng = np.random.default_rng(0)
UP = [node("MatMul", ["h", "w1"], ["a"], "up"), node("Relu", ["a"], ["b"]), node("MatMul", ["b", "w2"], ["y"], "down")]
X = rng.standard_normal((COUNT, WIDTH)).astype(np.float32)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    output: Sequence[int | str] = ("batch", CLASSES),
    **constants: np.ndarray,
) -> Path:
    """The nodes to "h", and two layers that can be pruned."""
    constants |= {
        "w1": (rng.standard_normal((WIDTH, HIDDEN)) / 8).astype(np.float32),
        "w2": (rng.standard_normal((HIDDEN, CLASSES)) / 16).astype(np.float32),
    }
    graph = helper.make_graph(
        [*nodes, *UP],
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, output)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


def prune(folder: Path, batch: int, *more: object) -> int:
    return call(
        "run", folder / "net.onnx", "--data", folder / "data.npz", "--runtime", "fake", "--search", "dp", "--pruner",
        "magnitude", "--batch", batch, "--speedup", 1.01, "--out", folder / "out", *more,
    )  # fmt: skip


def test_a_network_that_no_random_input_suits_is_prepared_on_the_data(tmp_path, capsys):
    """Its tokens are numbers from 1000 on, and its last position is looked up in a table."""
    nodes = [
        node("Sub", ["ids", "first"], ["index"]),
        node("Gather", ["table", "index"], ["vectors"]),
        node("ReduceMean", ["vectors"], ["h"], axes=[1], keepdims=0),
    ]
    table = rng.standard_normal((20, WIDTH)).astype(np.float32)
    net = save(
        tmp_path / "net.onnx", nodes, {"ids": (INT64, ["batch", "length"])}, table=table, first=np.array(1000, np.int64)
    )
    data = tmp_path / "data.npz"
    np.savez(data, ids=rng.integers(1000, 1020, (COUNT, 12)))
    for command in (("inspect", net), ("prepare", net, "--out", tmp_path / "prepared.onnx")):
        assert call(*command) == 1
        assert "give example inputs that do (--data)" in capsys.readouterr().err
        assert call(*command, "--data", data) == 0
    assert prune(tmp_path, 4) == 0
    common = ("--data", data, "--out")
    out = tmp_path / "out"
    assert call("measure", net, "--runtime", "fake", *common, tmp_path / "latency.json") == 0
    assert call("database", net, "--pruner", "magnitude", *common, tmp_path / "database") == 0
    assert call(
        "search", net, "--latency", tmp_path / "latency.json", "--database", tmp_path / "database", "--search", "dp",
        "--speedup", 1.01, *common, tmp_path / "profile.json",
    ) == 0  # fmt: skip
    assert call(
        "deploy", net, "--database", tmp_path / "database", "--profile", tmp_path / "profile.json", *common,
        tmp_path / "pruned.onnx",
    ) == 0  # fmt: skip
    assert call("finetune", net, tmp_path / "pruned.onnx", "--epochs", 1, *common, tmp_path / "tuned.onnx") == 0
    assert call(
        "validate", out / "dense.onnx", out / "model.onnx", "--runtime", "fake", "--data", data, "--metric",
        metric(tmp_path),
    ) == 0  # fmt: skip


def metric(folder: Path) -> str:
    (folder / "metric.py").write_text("def mean(outputs, target):\n    return float(outputs['y'].mean())\n")
    return f"{folder / 'metric.py'}:mean"


SHARED = {
    "a scale": ([node("Mul", ["x", "extra"], ["h"])], (FLOAT, []), np.float32(2)),
    "a sampling rate in a list": ([node("Div", ["x", "extra"], ["h"])], (FLOAT, [1]), np.full(COUNT, 2, np.float32)),
    "the same for each sample": ([node("Add", ["x", "extra"], ["h"])], (FLOAT, [WIDTH]), np.ones((COUNT, WIDTH), "f4")),
    "positions": ([node("Mul", ["x", "extra"], ["h"])], (FLOAT, ["width"]), np.arange(WIDTH, dtype=np.float32)),
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("batch", ["batch", 1, 8])
def test_an_input_that_all_samples_share_goes_all_the_way(name, batch, tmp_path):
    nodes, (kind, shape), extra = SHARED[name]
    width = "width" if name == "positions" else WIDTH
    save(tmp_path / "net.onnx", nodes, {"x": (FLOAT, [batch, width]), "extra": (kind, shape)}, (batch, CLASSES))
    np.savez(tmp_path / "data.npz", x=X, extra=extra)
    size = 16 if batch == "batch" else batch
    assert (
        prune(tmp_path, size, "--eval", tmp_path / "data.npz", "--metric", metric(tmp_path), "--finetune", "gap") == 0
    )
    assert fixed_batch(load_model(tmp_path / "out/dense.onnx")) == (None if batch == "batch" else batch)


def test_a_value_of_its_own_for_each_sample_where_the_graph_has_one_fixes_the_batch(tmp_path, caplog):
    """The size of an image, (1, 2): images of a batch share it, so images of different sizes run one by one."""
    nodes = [node("ReduceMean", ["extra"], ["mean"], axes=[1]), node("Mul", ["x", "mean"], ["h"])]
    save(tmp_path / "net.onnx", nodes, {"x": (FLOAT, ["batch", WIDTH]), "extra": (FLOAT, [1, 2])})
    np.savez(tmp_path / "data.npz", x=X, extra=rng.random((COUNT, 2)).astype(np.float32))
    with caplog.at_level(logging.WARNING):
        assert prune(tmp_path, 1) == 0
    assert "right for a batch of 1 only" in caplog.text
    dense = load_model(tmp_path / "out/dense.onnx")
    assert fixed_batch(dense) == 1


STATES = {
    "a recurrent state": (
        [node("ReduceMean", ["extra"], ["mean"], axes=[0], keepdims=0), node("Add", ["x", "mean"], ["h"])],
        {"x": ["batch", WIDTH], "extra": [3, "batch", WIDTH]},
        {"x": X, "extra": rng.standard_normal((3, COUNT, WIDTH)).astype(np.float32)},
        ["batch", CLASSES],
    ),
    "a recurrent state whose axes have no names": (
        [node("ReduceMean", ["extra"], ["mean"], axes=[0], keepdims=0), node("Add", ["x", "mean"], ["h"])],
        {"x": [None, WIDTH], "extra": [3, None, WIDTH]},
        {"x": X, "extra": rng.standard_normal((3, COUNT, WIDTH)).astype(np.float32)},
        [None, CLASSES],
    ),
    "a recurrent state of a fixed batch": (
        [node("ReduceMean", ["extra"], ["mean"], axes=[0], keepdims=0), node("Add", ["x", "mean"], ["h"])],
        {"x": [4, WIDTH], "extra": [3, 4, WIDTH]},
        {"x": X, "extra": rng.standard_normal((3, COUNT, WIDTH)).astype(np.float32)},
        [4, CLASSES],
    ),
    "time first": (
        [node("Tanh", ["x"], ["h"])],
        {"x": ["time", "batch", WIDTH]},
        {"x": rng.standard_normal((5, COUNT, WIDTH)).astype(np.float32)},
        ["time", "batch", CLASSES],
    ),
    "time first, of a fixed length, without names": (
        [node("Tanh", ["x"], ["h"])],
        {"x": [5, None, WIDTH]},
        {"x": rng.standard_normal((5, COUNT, WIDTH)).astype(np.float32), "target": np.arange(COUNT)},
        [5, None, CLASSES],
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_samples_on_the_second_axis_go_all_the_way(name, tmp_path):
    nodes, shapes, arrays, output = STATES[name]
    path = save(tmp_path / "net.onnx", nodes, {key: (FLOAT, shape) for key, shape in shapes.items()}, output)
    np.savez(tmp_path / "data.npz", **arrays)
    size = 4 if "fixed batch" in name else 16
    (tmp_path / "whole.py").write_text(
        "def whole(outputs, target):\n    y = outputs['y']\n    print(y.shape)\n    return float(abs(y).sum())\n"
    )
    more = ("--eval", tmp_path / "data.npz", "--metric", f"{tmp_path / 'whole.py'}:whole", "--finetune", "gap")
    assert prune(tmp_path, size, *more) == 0
    dense = onnx.load(path)
    if "fixed batch" not in name:  # the metric of the dense network is that of all samples at once
        (expected,) = ort.InferenceSession(dense.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"x": arrays["x"]} | ({"extra": arrays["extra"]} if "extra" in arrays else {})
        )
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert report["metric_dense"] == pytest.approx(float(abs(expected).sum()), rel=1e-3)


BATCH = 8


@pytest.mark.parametrize("count", [5, 8, 20])
def test_samples_that_do_not_fill_the_batch_of_a_graph_go_all_the_way(count, tmp_path):
    """Its reshape fails for any other batch."""
    nodes = [
        node("Reshape", ["x", "heads"], ["split"]),
        node("Tanh", ["split"], ["t"]),
        node("Reshape", ["t", "back"], ["h"]),
    ]
    save(
        tmp_path / "net.onnx", nodes, {"x": (FLOAT, [BATCH, WIDTH])}, (BATCH, CLASSES),
        heads=np.array([BATCH, 2, WIDTH // 2]), back=np.array([BATCH, WIDTH]),
    )  # fmt: skip
    np.savez(tmp_path / "data.npz", x=X[:count], target=np.arange(count) % CLASSES)
    assert prune(tmp_path, BATCH, "--eval", tmp_path / "data.npz", "--finetune", "gap") == 0
    out = tmp_path / "out"
    assert call(
        "finetune", out / "dense.onnx", out / "model.onnx", "--data", tmp_path / "data.npz", "--epochs", 1, "--out",
        tmp_path / "tuned.onnx",
    ) == 0  # fmt: skip


def test_another_batch_than_the_one_that_is_written_into_the_graph_is_one_line(tmp_path, capsys):
    nodes = [node("Reshape", ["x", "flat"], ["one"]), node("Reshape", ["one", "back"], ["h"])]
    save(
        tmp_path / "net.onnx", nodes, {"x": (FLOAT, ["batch", WIDTH])},
        flat=np.array([1, WIDTH]), back=np.array([1, WIDTH]),
    )  # fmt: skip
    np.savez(tmp_path / "data.npz", x=X)
    assert prune(tmp_path, 16) == 1
    assert "fixed batch of 1, not 16" in capsys.readouterr().err
    assert prune(tmp_path, 1) == 0
