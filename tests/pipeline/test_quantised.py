"""Networks in int8 by the engines' own tools: what they compute, what is kept, and what becomes of a failure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnx_spdy.models import export_module, load_model, prepare
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.quantised import make
from onnx_spdy.pipeline.quantised.make import QUANTISERS, QuantisationFailed, Quantiser, quantise, quantise_all
from onnx_spdy.pipeline.quantised.worker import FEWEST, Batches, is_transformer
from onnx_spdy.runtimes import RuntimeUnavailable, Workload, open_runtime
from tests.encoder import encoder, sentences


def by_name(name: str) -> Quantiser:
    return next(one for one in QUANTISERS if one.name == name)


def spec_of(quantiser: Quantiser) -> str:
    """The runtime in which the rest stays as it is."""
    return quantiser.specs[quantiser.name]


def outputs(path: Path, samples: Samples, spec: str) -> np.ndarray:
    with open_runtime(spec) as runtime, runtime.open(path, Workload(len(samples), 1, samples.inputs)) as session:
        return session.run(samples.inputs)["output"]


@pytest.mark.parametrize(("name", "opset"), [("onnxruntime int8", 11), ("openvino int8", 17)])
def test_a_network_in_int8_computes_nearly_the_same_and_is_kept(
    name: str, opset: int, model: onnx.ModelProto, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old opset, which can't have scales of channels, is raised."""
    quantiser = by_name(name)
    pytest.importorskip(quantiser.packages[0])
    try:
        open_runtime(spec_of(quantiser)).check()
    except RuntimeUnavailable as exc:
        pytest.skip(str(exc))
    dense, stem = tmp_path / "dense.onnx", tmp_path / "alternatives" / "dense"
    old = onnx.ModelProto()
    old.CopyFrom(model)
    old.opset_import[0].version = opset
    onnx.save(old, dense)
    told: list[tuple[int, int, str]] = []
    found = quantise_all(dense, samples, stem, [quantiser], lambda *one: told.append(one))
    assert told[-1] == (96, 96, name)
    file = found.files[name]
    assert file == tmp_path / "alternatives" / f"dense-{name.replace(' ', '-')}.onnx"
    stored = load_model(file).graph.initializer
    assert sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1 for tensor in stored) == 4
    expected, values = outputs(dense, samples, "onnxruntime"), outputs(file, samples, spec_of(quantiser))
    assert 0 < np.linalg.norm(values - expected) < 0.15 * np.linalg.norm(expected)
    with open_runtime(spec_of(quantiser)) as runtime:
        session = runtime.open(file, Workload(4, 1))
        assert f"{runtime.name} {session.environment.precision}" == name

    monkeypatch.setattr(make, "LONGEST_SECONDS", 0.01)
    assert quantise_all(dense, samples, stem, [quantiser]) == found
    with pytest.raises(QuantisationFailed, match=r"longer than 0\.01 s"):  # so it is made anew for other samples
        quantise(dense, samples.take(slice(0, 20)), file, quantiser)


def test_a_tool_that_is_missing_or_fails_is_a_reason(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "dense.onnx")
    absent = Quantiser("a int8", "ort_static", ("no_such_package",), "onnx-spdy[int8]", {})
    broken = Quantiser("b int8", "no_such_tool", ("onnx",), "onnx", {})
    found = quantise_all(tmp_path / "dense.onnx", samples, tmp_path / "dense", [absent, broken])
    assert found.files == {}
    assert found.missing["a int8"] == "no_such_package is not installed; pip install 'onnx-spdy[int8]'"
    assert found.missing["b int8"].startswith(
        "ModuleNotFoundError: No module named 'onnx_spdy.pipeline.quantised.no_such"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["dense.onnx"]


def test_calibration_ends_early_where_it_takes_too_long() -> None:
    images = np.arange(40.0).reshape(40, 1)
    assert len(list(Batches({"input": images}, 60, lambda read, of: None))) == 40
    late = Batches({"input": images}, 0, lambda read, of: None)
    assert [float(one["input"][0]) for one in late] == list(range(FEWEST))
    assert len(late) == 40


def test_transformers_are_told_by_their_attention(model: onnx.ModelProto) -> None:
    assert not is_transformer(model.graph)
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"]),
        helper.make_node("MatMul", ["weights", "v"], ["output"]),
    ]
    assert is_transformer(helper.make_graph(nodes, "attention", [], []))


def test_nothing_is_left_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's shape inference leaves what it doesn't finish in the working folder."""
    pytest.importorskip("onnxruntime")
    module, example = encoder()
    network = prepare(export_module(module, example, {name: {1: "length"} for name in example})).proto
    (tmp_path / "here").mkdir()
    onnx.save(network, tmp_path / "dense.onnx")
    monkeypatch.chdir(tmp_path / "here")
    found = quantise_all(
        tmp_path / "dense.onnx", Samples(sentences(32)), tmp_path / "dense", [by_name("onnxruntime int8")]
    )
    assert found.files and not [*Path.cwd().iterdir()]
