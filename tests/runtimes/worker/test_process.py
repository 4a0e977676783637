"""Faults of an engine's process, with the real worker and a stand-in for the engine."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from onnx_spdy.runtimes import (
    EngineCrashed,
    EngineHung,
    ModelRefused,
    RuntimeUnavailable,
    Workload,
    open_runtime,
    zero_randomly,
)
from onnx_spdy.runtimes.deepsparse.client import WORKER, DeepSparse
from onnx_spdy.runtimes.deepsparse.log import fallback_reasons
from onnx_spdy.runtimes.model_file import fix_model
from onnx_spdy.runtimes.worker.loop import Kept, decode_array, encode_array
from onnx_spdy.runtimes.worker.process import WorkerProcess, describe_exit
from onnx_spdy.runtimes.worker.uv_command import find_uv


def python_worker(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(text)
    return [sys.executable, str(path)]


def gone(pid: int) -> bool:
    """The process has ended, or is a zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_the_engine_is_imported_without_analytics_and_its_noise_is_no_reply(stub_runtime):
    assert stub_runtime().check() == "stub, analytics disabled: 1"


def test_a_session_runs_in_the_worker(stub_runtime, conv_net):
    with stub_runtime().open(conv_net(), Workload(2)) as session:
        x = np.arange(2 * 8 * 12 * 12, dtype=np.float32).reshape(2, 8, 12, 12)
        np.testing.assert_allclose(session.run({"x": x})["y"], x.sum(axis=(1, 2, 3)))
        assert session.environment.instruction_set == "avx512_vnni"
        assert session.environment.threads == 3


def test_a_refusal_is_one_line_without_source_locations(stub_runtime, conv_net):
    runtime = stub_runtime()
    with pytest.raises(ModelRefused) as caught:
        runtime.open(conv_net(note="refuse me"), Workload(1))
    assert str(caught.value) == "deepsparse: Failed: Unsupported thing 7"
    runtime.open(conv_net(), Workload(1)).close()  # the worker lives on


def test_a_fallback_is_told_with_its_reason(stub_runtime, conv_net):
    with stub_runtime().open(conv_net(note="fall back"), Workload(1)) as session:
        assert session.fallback == (
            "only 25% of the operators run optimised, ONNX Runtime runs the rest: Pad is not constant"
        )


def test_a_worker_killed_while_busy_is_a_crash_and_the_next_one_works(stub_runtime, conv_net):
    runtime = stub_runtime()
    session = runtime.open(conv_net(note="be slow"), Workload(1))
    killer = threading.Timer(0.5, os.kill, (runtime.worker().pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(EngineCrashed, match=r"died during 'seconds': killed by SIGKILL; its last words: last words"):
        session.seconds(1)
    killer.join()
    with pytest.raises(EngineCrashed, match="open the model again"):
        session.seconds(1)
    session.close()
    with runtime.open(conv_net(), Workload(1)) as again:
        assert len(again.seconds(2)) == 2


def test_a_hang_is_killed(stub_runtime, conv_net):
    runtime = stub_runtime(request_seconds=0.5)
    session = runtime.open(conv_net(note="be slow"), Workload(1))
    pid = runtime.worker().pid
    with pytest.raises(EngineHung, match=r"no answer to 'seconds' within 0.5 s"):
        session.seconds(1)
    assert gone(pid)


def test_a_hang_before_the_request_is_read_is_killed(tmp_path):
    worker = WorkerProcess("sleeper", python_worker(tmp_path, "import time; time.sleep(60)"))
    with pytest.raises(EngineHung):
        worker.request("open", timeout_seconds=0.5, model="x" * 10_000_000)


def test_garbage_instead_of_a_reply_is_told(tmp_path):
    worker = WorkerProcess(
        "babbler", python_worker(tmp_path, "print('Segmentation violated, sorry'); input(); input()")
    )
    with pytest.raises(EngineCrashed, match=r"no reply to 'hello' and was killed: 'Segmentation violated, sorry'"):
        worker.request("hello", timeout_seconds=10)
    assert not worker.alive


def test_a_worker_that_ends_gives_its_exit_code_and_last_line(tmp_path):
    text = "import sys; print('first', file=sys.stderr); print('no such wheel', file=sys.stderr); sys.exit(3)"
    worker = WorkerProcess("quitter", python_worker(tmp_path, text))
    with pytest.raises(EngineCrashed, match=r"exit code 3; its last words: no such wheel"):
        worker.request("hello", timeout_seconds=10)


def test_a_worker_of_another_version_is_not_used(tmp_path):
    text = "import json; print(json.dumps({'id': 1, 'result': {'version': '1.8.0'}}), flush=True); input()"
    with pytest.raises(RuntimeUnavailable, match=r"speaks version None of the protocol, this package version \d"):
        DeepSparse(command=python_worker(tmp_path, text)).check()


def test_a_model_and_its_samples_cross_once(stub_runtime, conv_net):
    runtime, path = stub_runtime(), conv_net()
    profile = {"workload": Workload(4), "iterations": 1, "warmup": 0}
    runtime.layer_seconds(path, **profile)
    sent = runtime.worker().sent_bytes
    assert sent > path.stat().st_size
    for seed in range(5):
        runtime.layer_seconds(path, **profile, zeros={"w0": 0.5}, seed=seed)
    with runtime.open(path, Workload(4)) as session:
        session.seconds(2)
    assert runtime.worker().sent_bytes - sent < 10_000


def test_the_worker_draws_the_zeros_that_are_drawn_here(stub_runtime, conv_net):
    zeros = {"w0": 0.9, "w2": 0.4}
    rows = stub_runtime().layer_seconds(conv_net(opset=19), Workload(2), iterations=1, warmup=0, zeros=zeros, seed=7)
    fixed = fix_model(conv_net(opset=19), Workload(2))
    fixed.proto.ir_version = 9
    zero_randomly(fixed.proto.graph, zeros, 7)
    assert rows[0].kernel == hashlib.sha256(fixed.to_bytes()).hexdigest()


def kept(store: Kept, *values: bytes) -> list[bytes]:
    """Send values as `supply` does; returns those that had to be sent."""
    names = {hashlib.sha256(value).hexdigest(): value for value in values}
    missing = store.missing({"sha256s": list(names)})["sha256s"]
    for name in missing:
        store.keep({"sha256": name, "data": base64.b64encode(names[name]).decode()})
    assert all(store[name] == value for name, value in names.items())
    return [names[name] for name in missing]


def test_what_was_named_longest_ago_is_forgotten_first():
    store = Kept(limit_bytes=3)
    assert kept(store, b"a", b"b", b"c") == [b"a", b"b", b"c"]
    assert kept(store, b"a") == []
    assert kept(store, b"d") == [b"d"]
    assert kept(store, b"a", b"c") == []
    assert kept(store, b"b") == [b"b"]
    assert kept(store, b"larger than all", b"a") == [b"larger than all"]


def test_damaged_bytes_are_not_kept():
    with pytest.raises(ValueError, match="try again"):
        Kept().keep({"sha256": "0" * 64, "data": ""})


def test_uv_is_found_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uv", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_uv() is None
    for folder in (".cargo/bin", ".local/bin", "bin"):
        uv = tmp_path / folder / "uv"
        uv.parent.mkdir(parents=True)
        uv.touch(mode=0o755)
        assert find_uv() == str(uv)


def test_a_worker_ends_with_its_parent_even_when_busy(stub_runtime, conv_net, tmp_path):
    runtime = stub_runtime()
    parent = f"""
import os, sys, threading, time
from pathlib import Path
from onnx_spdy.runtimes import Workload
from onnx_spdy.runtimes.deepsparse.client import DeepSparse
runtime = DeepSparse(command={runtime._command!r})
session = runtime.open(Path({str(conv_net(note="be slow"))!r}), Workload(1))
threading.Thread(target=session.seconds, args=(1,), daemon=True).start()
time.sleep(0.5)
print(runtime.worker().pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=30, check=True)
    deadline = time.monotonic() + 10
    while not gone(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_python_without_the_engine_is_unavailable():
    with DeepSparse(python=sys.executable) as runtime, pytest.raises(RuntimeUnavailable, match="deepsparse"):
        runtime.check()


def test_a_missing_interpreter_is_unavailable(tmp_path):
    with pytest.raises(RuntimeUnavailable, match="can't start"):
        DeepSparse(python=str(tmp_path / "python")).check()


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_other_machines_are_unavailable(monkeypatch, system, machine):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(RuntimeUnavailable, match=f"this is {system} on {machine}; measure on another"):
        DeepSparse().check()


def test_an_old_cpu_is_unavailable(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("onnx_spdy.runtimes.host.instruction_set", lambda: "avx")
    with pytest.raises(RuntimeUnavailable, match="needs a CPU with AVX2, this one has avx"):
        DeepSparse().check()


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<i8", "|b1", "|u1"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_arrays_survive_the_transport(dtype, shape):
    array = np.ones(shape, dtype)
    again = decode_array(encode_array(array))
    assert (again.dtype, again.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize(
    ("code", "words"),
    [(-11, "killed by SIGSEGV"), (137, "killed by SIGKILL"), (255, "exit code 255"), (1, "exit code 1")],
)
def test_exit_codes_have_words(code, words):
    assert describe_exit(code) == words


def test_reasons_are_read_from_the_engines_log():
    log = """
[nm_ort 1 >DIAGNOSE< operator() src/onnxruntime_neuralmagic/nm_execution_provider.cc:287] == GetCapability ==
Printing GraphViewer g:
Node 0: Conv a_n
Node 1: Sin 
Node 2: ReduceMean /mean
Node 3: Conv c_n

[nm_ort 1 >DIAGNOSE< unsupported src/onnxruntime_neuralmagic/supported/ops.cc:130] Unsupported ReduceMean, keepdims != 1
[nm_ort 1 >DIAGNOSE< supported_subgraphs src/onnxruntime_neuralmagic/supported/subgraphs.cc:826] Printing subgraph:
Node 0: Conv a_n
[nm_ort 1 >DIAGNOSE< supported_subgraphs src/onnxruntime_neuralmagic/supported/subgraphs.cc:826] Printing subgraph:
Node 3: Conv c_n
[nm_ort 1 >DIAGNOSE< supported_subgraphs src/onnxruntime_neuralmagic/supported/subgraphs.cc:1028] == FAILED ==
Message: Unsupported operation in node c_n: odd stride
""".splitlines()
    assert fallback_reasons(log) == [
        "ReduceMean, keepdims != 1",
        "Unsupported operation in node c_n: odd stride",
        "operators not supported here: Sin",
    ]


@pytest.mark.engine
def test_the_real_engine_killed_while_busy_is_a_crash(conv_net):
    with open_runtime("deepsparse") as runtime:
        try:
            runtime.check()
        except RuntimeUnavailable as exc:
            pytest.skip(str(exc))
        session = runtime.open(conv_net(), Workload(1))
        engine_pid = runtime._hello["pid"]  # not the launcher's: uv reports the death as 128 + 9
        killer = threading.Timer(0.5, os.kill, (engine_pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(EngineCrashed, match="killed by SIGKILL"):
            session.seconds(10_000_000)
        killer.join()


def test_the_worker_pins_everything_below_the_engine():
    header = WORKER.read_text().split("# ///")[1]
    pins = [line.strip('#", ') for line in header.splitlines() if '",' in line]
    assert len(pins) > 20
    assert all("==" in pin for pin in pins)
