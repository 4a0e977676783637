"""`run` with what it chooses by measuring: the runtime, and the opponent that the target is against."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from onnx_spdy.pipeline.alternatives import DENSE, Alternative, Alternatives, Candidate
from onnx_spdy.runtimes import Environment, Measurement, open_runtime
from onnx_spdy.tools import run_command
from onnx_spdy.tools.cli import main
from tests.ssh_server import SshServer
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


FLEET = ("run", "user.py:network", "--data", "user.py:data", "--eval", "user.py:data", "--runtime", "near",
         "--runtime", "far", "--batch", "16", "--search", "dp", "--pruner", "magnitude", "--out", "out")  # fmt: skip


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes of two names: formulas, of which one gains less."""
    made = {
        "near": {"layer_overhead_seconds": 0.0, "node_seconds": 1e-9},
        "far": {"layer_overhead_seconds": 1e-4, "node_seconds": 1e-9},
    }
    monkeypatch.setattr(run_command, "open_runtime", lambda name: open_runtime("fake", **made[name]))


def fleet(*more: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main((*FLEET, *more))
    return int(caught.value.code or 0)


def test_a_fleet_has_a_matrix_of_devices_and_targets(
    folder: Path, two_devices: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet("--speedup", "1.1,1.05") == 0
    out = folder / "out"
    printed = capsys.readouterr().out
    matrix = json.loads((out / "fleet.json").read_text())
    assert [*matrix["devices"]] == ["near", "far"]
    for name, front in matrix["devices"].items():
        assert [point["folder"] for point in front["points"]] == [f"{name}/1.05x", f"{name}/1.1x"]
        for point in front["points"]:
            report = json.loads((out / point["folder"] / "report.json").read_text())
            assert report["measured_speedup"] == point["measured_speedup"] >= point["asked_speedup"]
            assert (out / point["folder"] / "model.onnx").exists()
    assert (out / "database").is_dir()
    assert not [*out.glob("*/database")]
    page = (out / "fleet.html").read_text()
    assert "near/1.05x/report.html" in page
    assert matrix["headline"] in page
    assert matrix["headline"] in printed
    assert "A network for each" in printed
    with pytest.raises(SystemExit):
        main(("report", "out"))
    assert matrix["headline"] in capsys.readouterr().out


def test_a_fleet_of_two_machines_by_ssh(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path_factory.mktemp("keys")
    monkeypatch.setenv("ONNX_SPDY_REMOTE_PYTHON", sys.executable)
    with SshServer(keys) as one, SshServer(keys) as other:
        servers = (one, other)
        monkeypatch.setenv("ONNX_SPDY_SSH", one.ssh)
        devices = [part for server in servers for part in ("--runtime", f"{server.address}/fake")]
        others = [part for part in FLEET if part not in ("--runtime", "near", "far")]
        with pytest.raises(SystemExit) as caught:
            main((*others, *devices, "--speedup", "1.1,1.05"))
        assert not caught.value.code
    matrix = json.loads((folder / "out" / "fleet.json").read_text())
    assert all(name.endswith(f"-{one.port}-fake") for name, one in zip(matrix["devices"], servers, strict=True))
    assert [len(front["points"]) for front in matrix["devices"].values()] == [2, 2]


def test_one_network_for_a_fleet(folder: Path, two_devices: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet("--speedup", "1.1", "--one-network") == 0
    out = folder / "out"
    matrix = json.loads((out / "fleet.json").read_text())
    assert matrix["one_network"]
    assert [point["folder"] for front in matrix["devices"].values() for point in front["points"]] == ["near", "far"]
    assert "One network for all" in capsys.readouterr().out
    assert sorted(path.parent.name for path in out.rglob("model.onnx")) == ["out"]
    assert sorted(path.parent.name for path in out.rglob("report.html")) == ["far", "near", "out"]
    assert "One network for 2 devices" in (out / "report.html").read_text()
    assert "One network for 2 devices" not in (out / "near" / "report.html").read_text()


def test_what_one_device_can_not_do_the_others_still_do(
    folder: Path, two_devices: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fleet("--speedup", "2,1.1") == 1
    out, (printed, errors) = folder / "out", capsys.readouterr()
    matrix = json.loads((out / "fleet.json").read_text())
    folders = [point["folder"] for front in matrix["devices"].values() for point in front["points"]]
    assert folders == ["near/1.1x", "near/2x", "far/1.1x"]
    assert "the highest reachable is" in matrix["unreachable"]["far"]
    assert "far: a speedup of 2 can't be reached" in errors.splitlines()[-1]
    assert "far: a speedup of 2 can't be reached" in printed


def test_where_no_device_can_there_is_a_page_all_the_same(folder: Path, two_devices: None) -> None:
    assert fleet("--speedup", "100") == 1
    page = (folder / "out" / "fleet.html").read_text()
    assert "near: a speedup of 100 can" in page
    assert "far: a speedup of 100 can" in page


def test_one_network_needs_several_devices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(("run", "user.py:network", "--data", "user.py:data", "--runtime", "fake", "--speedup", "2", "--out", "out",
              "--one-network"))  # fmt: skip
    assert caught.value.code == 1
    assert "give --runtime once for each" in capsys.readouterr().err
