"""`onnx-spdy bench`, and the file that runs a result without this project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_spdy.pipeline.usage import write_usage
from onnx_spdy.runtimes import RuntimeUnavailable, Workload, open_runtime
from onnx_spdy.tools import bench_command, cli
from onnx_spdy.tools.bench_command import names
from tests.models.narrowing import network

NETWORK = """
g (float[n, 3, 8, 8] input) => (float[n, 10] y)
<float[16, 3, 3, 3] w1, float[10, 16] w2>
{
    [one] a = Conv <pads = [1, 1, 1, 1]> (input, w1)
    [relu] b = Relu (a)
    [mean] m = GlobalAveragePool (b)
    [flat] f = Flatten (m)
    [last] y = Gemm <transB = 1> (f, w2)
}"""


def called(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *arguments])
    return int(caught.value.code or 0)


@pytest.fixture
def model() -> onnx.ModelProto:
    return network(NETWORK)


@pytest.fixture
def folder(model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_command, "ENGINES", ("onnxruntime", "deepsparse-of-nobody"))
    Path("other").mkdir()
    onnx.save(model, "net.onnx")
    onnx.save(model, "other/net.onnx")
    onnx.save(model, "twin.onnx")
    rng = np.random.default_rng(0)
    np.savez("d.npz", input=rng.normal(size=(8, 3, 8, 8)).astype(np.float32), target=rng.integers(0, 10, 8))
    return tmp_path


def test_files_are_measured_side_by_side(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_command, "ENGINES", ("onnxruntime",))
    assert called("net.onnx", "twin.onnx", "--batch", "2", "--eval", "d.npz", "--json", "f.json") == 0
    shown = capsys.readouterr().out
    assert "net.onnx" in shown and "twin.onnx" in shown and "onnxruntime fp32" in shown and "batch 2" in shown
    measured = json.loads(Path("f.json").read_text())["measured"]
    assert [one["role"] for one in measured] == ["net.onnx", "twin.onnx"]
    assert all(0 <= one["metric"] <= 1 and one["median_seconds"] > 0 for one in measured)
    assert measured[0]["metric"] == measured[1]["metric"]


def test_files_of_one_name_are_told_apart() -> None:
    assert names([Path("a/net.onnx"), Path("b/net.onnx")]) == ["a/net.onnx", "b/net.onnx"]
    assert names([Path("a/net.onnx"), Path("b/other.onnx")]) == ["net.onnx", "other.onnx"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gone.onnx",), "gone.onnx"),
        (("net.onnx", "--batch", "0"), "--batch"),
        (("net.onnx", "--eval", "d.npz", "--metric", "speed"), "unknown metric"),
    ],
)
def test_wrong_input_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert called(*arguments) in (1, 2)
    assert said in capsys.readouterr().err
    assert not Path("f.json").exists()


def test_where_no_engine_runs_it_that_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(spec: str) -> None:
        raise RuntimeUnavailable(f"no {spec} on this machine")

    monkeypatch.setattr("onnx_spdy.pipeline.alternatives.open_other", gone)
    assert called("net.onnx") == 1
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("error"))
    assert "no onnxruntime on this machine" in line


@pytest.mark.engine
@pytest.mark.parametrize("spec", ["onnxruntime", "openvino", "openvino:bf16", "sparse"])
def test_what_is_written_runs_without_this_project(model: onnx.ModelProto, tmp_path: Path, spec: str) -> None:
    with open_runtime(spec) as runtime:
        try:
            runtime.check()
        except RuntimeUnavailable as exc:
            pytest.skip(str(exc))
        onnx.save(model, tmp_path / "model.onnx")
        write_usage(tmp_path, model.graph, runtime, Workload(4), tmp_path / "model.onnx")
    text = (tmp_path / "load.py").read_text()
    assert "onnx_spdy" not in text.replace("onnxruntime_ep_spdy", "")
    done = subprocess.run([sys.executable, "load.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(4, 10)"


def test_an_engine_without_a_python_of_its_own_leaves_no_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    with open_runtime("fake") as runtime:
        write_usage(tmp_path, model.graph, runtime, Workload(4), tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]
