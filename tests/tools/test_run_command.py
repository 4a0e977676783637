"""`run` with what it chooses by measuring: the runtime, and the opponent that the target is against."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_spdy.pipeline.alternatives import DENSE, Alternative, Alternatives, Candidate
from onnx_spdy.runtimes import Environment, Measurement
from onnx_spdy.tools import run_command
from onnx_spdy.tools.cli import main
from tests.tools.test_cli import NETWORK


def dense(spec: str, precision: str, seconds: float) -> Alternative:
    environment = Environment(spec, "1", precision, "cpu", "avx512", 2, 2, 16, "host")
    candidate = Candidate(DENSE, f"{spec} {precision}", spec, Path("dense.onnx"))
    return Alternative(candidate, Measurement((seconds,) * 6), environment)


MEASURED = (dense("onnxruntime", "fp32", 0.002), dense("fake", "fp32", 0.006), dense("openvino", "bf16", 0.005))
FOUND = Alternatives(MEASURED, {"deepsparse": "it is not installed"})
RUN = ("run", "user.py:network", "--data", "user.py:data", "--runtime", "auto", "--against", "best", "--batch", "16",
       "--speedup", "1.05", "--search", "dp", "--pruner", "magnitude", "--out", "out")  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def exit_code() -> int:
    with pytest.raises(SystemExit) as caught:
        main(RUN)
    return int(caught.value.code or 0)


def test_the_runtime_and_the_opponent_are_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_command, "measure_dense", lambda *_, **__: replace(FOUND, measured=MEASURED[1:]))
    assert exit_code() == 0
    printed = capsys.readouterr().out
    assert "--runtime auto: fake, the fastest that gains by unstructured" in printed
    assert "1.05x as fast as the best dense alternative (openvino bf16, 5 ms) is 1.260x as fast as the dense" in printed
    report = json.loads((folder / "out" / "report.json").read_text())
    assert (report["target_speedup"], report["against"]["asked_speedup"]) == (pytest.approx(1.26), 1.05)
    assert report["headline"] in printed
    assert "1.05x against the best dense alternative, openvino bf16" in (folder / "out" / "report.html").read_text()


def test_where_no_runtime_gains_by_the_pattern_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_command, "measure_dense", lambda *_, **__: replace(FOUND, measured=MEASURED[:1]))
    assert exit_code() == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert "no runtime that works here has kernels for unstructured" in errors[-1]
