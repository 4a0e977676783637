"""Networks in int8 by the command line: what can't be ends in one line, and leaves nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.models import load_model
from onnx_spdy.models.graph import check_model
from onnx_spdy.tools.cli import main
from tests.models.narrowing import network

NETWORK = """
g (float[n, 3, 24, 24] input) => (float[n, 10] y)
<float[64, 3, 3, 3] w1, float[64] b1, float[64, 64, 3, 3] w2, float[64] b2, float[64, 64, 3, 3] w3, float[10, 64] w4>
{
    [one] a = Conv <pads = [1, 1, 1, 1]> (input, w1, b1)
    [relu] b = Relu (a)
    [two] c = Conv <pads = [1, 1, 1, 1]> (b, w2, b2)
    [relu2] d = Relu (c)
    [three] e = Conv <pads = [1, 1, 1, 1]> (d, w3)
    [mean] m = GlobalAveragePool (e)
    [flat] f = Flatten (m)
    [last] y = Gemm <transB = 1> (f, w4)
}"""
USER = """
import numpy as np

def data():
    rng = np.random.default_rng(0)
    return {"input": rng.normal(size=(32, 3, 24, 24)).astype(np.float32), "target": rng.integers(0, 10, 32)}

def not_numbers():
    found = data()
    found["input"][3, 0, 1, 2] = np.nan
    return found
"""
RUN = ("run", "net.onnx", "--pattern", "channels+int8", "--batch", "8", "--speedup", "1.2", "--search", "dp",
       "--pruner", "magnitude", "--out", "out")  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user.py").write_text(USER)
    onnx.save(network(NETWORK, opset=13), tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def only_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line, which is the only one that is an error."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = printed.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines[-1]


@pytest.mark.parametrize("runtime", ["deepsparse", "cusparselt"])
@pytest.mark.parametrize("against", ["same", "best"])
def test_a_runtime_that_runs_no_int8(
    runtime: str, against: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(*RUN, "--data", "user.py:data", "--runtime", runtime, "--against", against) == 1
    assert f"{runtime} can't be given networks in int8; take one of fake, onnxruntime" in only_error(capsys)
    assert not (folder / "out" / "dense.onnx").exists()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("channels+int8,2:4", "widths, int8 and zeros are searched one kind at a time"),
        ("int8,unstructured", "widths, int8 and zeros are searched one kind at a time"),
        ("channels+int4", "unknown pattern 'channels+int4'"),
    ],
)
def test_patterns_that_are_none(pattern: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [pattern if one == "channels+int8" else one for one in RUN]
    assert code(*arguments, "--data", "user.py:data", "--runtime", "fake") == 1
    assert words in only_error(capsys)
    assert not list((folder / "out").glob("*.onnx"))


def test_samples_that_are_no_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code(*RUN, "--data", "user.py:not_numbers", "--runtime", "fake") != 0
    assert "NaN or infinite" in only_error(capsys)
    assert not (folder / "out" / "model.onnx").exists()


def test_a_file_of_an_older_opset_is_raised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = network(NETWORK, opset=13)
    old.opset_import[0].version = 11
    onnx.save(old, folder / "net.onnx")
    assert code(*RUN, "--data", "user.py:data", "--runtime", "fake") == 0, capsys.readouterr().err
    written = load_model(folder / "out" / "model.onnx")
    check_model(written, "model.onnx")
    assert {one.data_type for one in written.graph.initializer} >= {onnx.TensorProto.INT8}
    report = json.loads((folder / "out" / "report.json").read_text())
    assert all("int8" in row["level"] for row in report["layers"])
    assert "int8" in (folder / "out" / "report.html").read_text()
    # By hand it is written with the data and the runtime that it is for, and never in floating point instead.
    steps = ("--database", "out/database", "--profile", "out/profile.json", "--out", "by_hand.onnx")
    assert code("deploy", "out/dense.onnx", *steps) == 2
    assert not (folder / "by_hand.onnx").exists()
    assert code("deploy", "out/dense.onnx", *steps, "--data", "user.py:data", "--runtime", "fake") == 0
    assert {one.data_type for one in load_model(folder / "by_hand.onnx").graph.initializer} >= {onnx.TensorProto.INT8}


def test_a_network_without_a_layer_for_int8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = network(NETWORK, opset=13)
    for tensor in half.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.save(half, folder / "net.onnx")
    (folder / "user.py").write_text(USER.replace("np.float32", "np.float16"))
    assert code(*RUN, "--data", "user.py:data", "--runtime", "fake") != 0
    assert "its weight is FLOAT16, not float32" in only_error(capsys)
    assert not (folder / "out" / "model.onnx").exists()
