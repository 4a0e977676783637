"""A runtime at the other end of a pipe: a process of this machine, and one that `ssh` starts over its loopback."""

from __future__ import annotations

import base64
import getpass
import io
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from onnx_spdy.runtimes import (
    EngineCrashed,
    EngineHung,
    ModelRefused,
    Runtime,
    RuntimeFailure,
    RuntimeUnavailable,
    UnknownRuntime,
    Workload,
    location,
    open_runtime,
    runtime_spec,
)
from onnx_spdy.runtimes.worker import bootstrap
from onnx_spdy.runtimes.worker.process import ERROR_KINDS
from onnx_spdy.runtimes.worker.remote import RemoteRuntime
from onnx_spdy.runtimes.worker.serve import error_kind
from onnx_spdy.runtimes.worker.ssh import STARTER, Address, far_command, first_request, requirements
from tests.ssh_server import SshServer

PROFILE = {"workload": Workload(2, 1), "iterations": 1, "warmup": 0}
ZEROS = {"w0": 0.9, "w1": 0.8}
SHELLS = ("sh", "bash", "dash", "zsh", "fish", "csh", "tcsh")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the other end makes its temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def remote(temporary: Path) -> Iterator[Callable[..., RemoteRuntime]]:
    """A maker of remote runtimes whose other end is a process of this machine."""
    made = []

    def make(engine: str = "fake", *, start: list[str] | None = None, **options) -> RemoteRuntime:
        address = Address("nowhere", None, engine)
        command = start or [sys.executable, "-c", STARTER]
        made.append(RemoteRuntime(address, open_runtime(engine, **options), options, command=command))
        return made[-1]

    yield make
    for runtime in made:
        runtime.close()


def eventually(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def gone(pid: int) -> bool:
    """The process has ended, or is a zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def children(pid: int) -> list[int]:
    stats = [(int(path.parent.name), path.read_text()) for path in Path("/proc").glob("[0-9]*/stat")]
    return [child for child, stat in stats if int(stat.rpartition(")")[2].split()[1]) == pid]


@pytest.mark.parametrize(
    ("text", "target", "port", "engine"),
    [
        ("ssh://board/fake", "board", None, "fake"),
        ("ssh://me@board.local:2222/deepsparse", "me@board.local", 2222, "deepsparse"),
        ("ssh://Alias_1/onnxruntime", "Alias_1", None, "onnxruntime"),
        ("ssh://me@[fe80::1%eth0]:22/fake", "me@fe80::1%eth0", 22, "fake"),
    ],
)
def test_addresses(text, target, port, engine):
    assert Address.parse(text) == Address(target, port, engine)
    assert open_runtime(text.rpartition("/")[0] + "/fake").name == "fake"


@pytest.mark.parametrize(
    "text",
    ["ssh://", "ssh://board", "ssh://board/", "ssh:///fake", "ssh://-oProxyCommand=x/fake", "ssh://-l@b/fake",
     "ssh://a:b/fake", "ssh://a b/fake", "ssh://a/ssh://b/fake"],
)  # fmt: skip
def test_what_is_no_address_is_an_unknown_runtime(text):
    with pytest.raises(UnknownRuntime, match=r"is not ssh://\[USER@\]HOST\[:PORT\]/RUNTIME"):
        open_runtime(text)


def test_an_unknown_runtime_elsewhere_lists_the_known_ones():
    with pytest.raises(UnknownRuntime, match=r"'abacus'.*deepsparse, fake, onnxruntime"):
        open_runtime("ssh://board/abacus")


def test_making_one_connects_to_nothing(monkeypatch):
    monkeypatch.setenv("ONNX_SPDY_SSH", "no-such-program")
    with open_runtime("ssh://board/deepsparse") as runtime:
        assert (runtime.name, runtime.patterns) == ("deepsparse", {"unstructured"})
    with open_runtime("ssh://board/onnxruntime") as runtime:
        assert (runtime.name, runtime.patterns) == ("onnxruntime", frozenset())


def test_the_other_end_computes_what_is_computed_here(remote, conv_net):
    options = {"seconds_per_mac": 1e-9, "break_even": 0.3}
    with open_runtime("fake", **options) as here:
        there = remote(**options)
        for zeros in ({}, ZEROS):
            expected = here.layer_seconds(conv_net(), **PROFILE, zeros=zeros, seed=5)
            assert there.layer_seconds(conv_net(), **PROFILE, zeros=zeros, seed=5) == expected
        with here.open(conv_net(), Workload(2)) as one, there.open(conv_net(), Workload(2)) as other:
            assert other.environment == one.environment
            assert other.seconds(3) == one.seconds(3)


def test_samples_to_time_with_are_used_there(remote, conv_net):
    samples = {"x": np.zeros((1, 8, 12, 13), np.float32)}
    with pytest.raises(ValueError, match=r"fake on nowhere: .*\[1, 8, 12, 13\]"):
        remote().open(conv_net(), Workload(2, inputs=samples))


def test_a_model_and_its_samples_travel_once(remote, conv_net):
    runtime, path, inputs = remote(), conv_net(), {"x": np.ones((2, 8, 12, 12), np.float32)}
    workload = Workload(2, 1, inputs)
    profile = {**PROFILE, "workload": workload}
    runtime.check()
    before = runtime.worker().sent_bytes
    runtime.layer_seconds(path, **profile)
    once = runtime.worker().sent_bytes
    assert once - before > path.stat().st_size + inputs["x"].nbytes
    for seed in range(10):
        runtime.layer_seconds(path, **profile, zeros=ZEROS, seed=seed)
    with runtime.open(path, workload) as session:
        session.seconds(1)
    assert runtime.worker().sent_bytes - once < 20_000


def test_the_other_end_runs_the_sources_that_it_was_sent(tmp_path):
    carried = first_request()
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(carried["package"]))) as package:
        package.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from onnx_spdy.runtimes.worker import serve; print(serve.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    there, here = tmp_path / "onnx_spdy" / "runtimes", Path(bootstrap.__file__).parent.parent
    assert Path(done.stdout.strip()) == there / "worker" / "serve.py"
    sent = {path.relative_to(there) for path in there.rglob("*.py")}
    # runtimes/sparse is a distribution of its own, that an interpreter has or has not.
    assert sent == {path.relative_to(here) for path in here.rglob("*.py") if here / "sparse" not in path.parents}


@pytest.mark.parametrize(
    "error", [ModelRefused, RuntimeUnavailable, EngineCrashed, EngineHung, RuntimeFailure, UnknownRuntime]
)
def test_errors_arrive_as_the_class_that_they_left_as(error):
    arrived = ERROR_KINDS[error_kind(error("message"))]
    assert arrived is (ValueError if error is UnknownRuntime else error)


def test_other_errors_arrive_as_failures():
    assert ERROR_KINDS[error_kind(KeyError("x"))] is RuntimeFailure


def test_nothing_is_left_behind(remote, conv_net, temporary):
    runtime = remote("onnxruntime")
    runtime.layer_seconds(conv_net(), **PROFILE)
    session = runtime.open(conv_net(), Workload(1))
    pid = runtime._hello["pid"]
    assert list(temporary.iterdir())
    runtime.close()
    assert gone(pid)
    assert not list(temporary.iterdir())
    with pytest.raises(EngineCrashed, match="open the model again"):
        session.seconds(1)
    session.close()
    with runtime.open(conv_net(), Workload(1)) as again:
        assert len(again.seconds(2)) == 2


def test_the_other_end_ends_even_when_busy(remote, conv_net, temporary):
    runtime = remote("onnxruntime")
    session = runtime.open(conv_net(), Workload(1))
    pid = runtime._hello["pid"]
    hang_up = threading.Timer(0.5, runtime.worker()._process.stdin.close)
    hang_up.start()
    with pytest.raises(EngineCrashed, match=r"onnxruntime on nowhere died during 'seconds'"):
        session.seconds(10_000_000)
    hang_up.join()
    assert eventually(lambda: gone(pid) and not list(temporary.iterdir()))


def test_an_engines_process_there_ends_with_it(remote, stub_command, conv_net, temporary):
    runtime = remote("deepsparse", command=stub_command)
    assert runtime.check().startswith("stub")
    session = runtime.open(conv_net(note="be slow"), Workload(1))
    (engine,) = children(runtime._hello["pid"])
    hang_up = threading.Timer(0.5, runtime.worker()._process.stdin.close)
    hang_up.start()
    with pytest.raises(EngineCrashed, match=r"deepsparse on nowhere died during 'seconds'"):
        session.seconds(1)
    hang_up.join()
    assert eventually(lambda: gone(engine) and not list(temporary.iterdir()))


def test_an_engine_that_dies_there_is_a_crash_and_the_next_one_works(remote, stub_command, conv_net):
    runtime = remote("deepsparse", command=stub_command)
    session = runtime.open(conv_net(note="be slow"), Workload(1))
    killer = threading.Timer(0.5, os.kill, (children(runtime._hello["pid"])[0], signal.SIGKILL))
    killer.start()
    with pytest.raises(
        EngineCrashed, match=r"^deepsparse on nowhere: deepsparse died during 'seconds': killed by SIGKILL"
    ):
        session.seconds(1)
    killer.join()
    with runtime.open(conv_net(), Workload(1)) as again:
        assert len(again.seconds(2)) == 2


def test_a_refusal_there_is_one_line_with_the_machine(remote, stub_command, conv_net):
    with pytest.raises(ModelRefused) as caught:
        remote("deepsparse", command=stub_command).open(conv_net(note="refuse me"), Workload(1))
    assert str(caught.value) == "deepsparse on nowhere: deepsparse: Failed: Unsupported thing 7"


def test_a_fallback_there_is_told(remote, stub_command, conv_net):
    with remote("deepsparse", command=stub_command).open(conv_net(note="fall back"), Workload(1)) as session:
        assert session.fallback == (
            "only 25% of the operators run optimised, ONNX Runtime runs the rest: Pad is not constant"
        )


def test_a_python_without_onnx_says_what_is_missing(remote):
    with pytest.raises(
        RuntimeUnavailable, match=r"No module named '\w+'\. That machine needs uv .* ONNX_SPDY_REMOTE_PYTHON"
    ):
        remote(start=[sys.executable, "-S", "-c", STARTER]).check()


def test_an_old_python_says_so(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    with pytest.raises(SystemExit, match=r"Python 3.10 or later is needed, this is 3"):
        bootstrap.start({})


@pytest.mark.parametrize("name", SHELLS)
def test_any_login_shell_starts_it(remote, name):
    shell = shutil.which(name)
    if not shell:
        pytest.skip(f"there is no {name} here")
    assert remote(start=[shell, "-c", far_command("fake", sys.executable)]).check() == "1"


def test_uv_is_found_in_the_home_and_told_the_versions_of_here(remote, tmp_path, monkeypatch):
    uv = tmp_path / ".local" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(
        f'#!/bin/sh\necho "$@" >&2\nwhile [ $1 != python ]; do shift; done\nshift\nexec {sys.executable} "$@"\n'
    )
    uv.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    runtime = remote(start=["sh", "-c", far_command("fake", None)])
    runtime.check()
    said = " ".join(runtime.worker().stderr_lines)
    assert f"--python {sys.version_info.major}.{sys.version_info.minor} " in said
    assert f"--with numpy=={np.__version__} " in said
    assert [name.partition("==")[0] for name in requirements("fake")][-1] == "onnxruntime"


def test_without_uv_it_is_asked_for(remote, tmp_path, monkeypatch):
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match=r"there is no uv\. That machine needs uv \(docs.astral.sh/uv\)"):
        remote(start=["sh", "-c", far_command("fake", None)]).check()


def test_an_interpreter_that_is_not_there_is_named(tmp_path, monkeypatch):
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/bin/sh\nfor command; do :; done\neval "$command"\n')  # runs its last argument here
    stand_in.chmod(0o755)
    monkeypatch.setenv("ONNX_SPDY_SSH", str(stand_in))
    expected = r"fake on board died .*'/.*/python' needs Python 3\.10 or later with onnx"
    with (
        open_runtime("ssh://board/fake", python=str(tmp_path / "python")) as runtime,
        pytest.raises(RuntimeUnavailable, match=expected),
    ):
        runtime.check()


@pytest.mark.parametrize(
    ("ssh", "message"),
    [
        ("echo welcome to", r"wrote something that is no reply to 'hello' .*'welcome to -T"),  # by a login shell, say
        ("no-such-program -v", r"there is no 'no-such-program' here; install an OpenSSH client"),
    ],
)
def test_an_ssh_that_is_none_is_unavailable(monkeypatch, conv_net, ssh, message):
    monkeypatch.setenv("ONNX_SPDY_SSH", ssh)
    with open_runtime("ssh://board/fake") as runtime, pytest.raises(RuntimeUnavailable, match=message):
        runtime.open(conv_net(), Workload(1))


@pytest.fixture(scope="module")
def running_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def sshd(running_sshd: SshServer, monkeypatch: pytest.MonkeyPatch) -> SshServer:
    """An address that `ssh` reaches without a question."""
    monkeypatch.setenv("ONNX_SPDY_SSH", running_sshd.ssh)
    return running_sshd


@pytest.fixture
def over_ssh(sshd: SshServer) -> Iterator[Callable[..., Runtime]]:
    """A maker of runtimes over ssh, whose other end takes this interpreter."""
    made = []

    def make(engine: str, python: str | None = sys.executable) -> Runtime:
        made.append(open_runtime(f"{sshd.address}/{engine}", python=python))
        return made[-1]

    yield make
    for runtime in made:
        runtime.close()


def test_over_ssh_the_fake_gives_what_it_gives_here(over_ssh, conv_net):
    runtime = over_ssh("fake")
    with open_runtime("fake") as here:
        expected = here.layer_seconds(conv_net(), **PROFILE, zeros=ZEROS)
        assert runtime.layer_seconds(conv_net(), **PROFILE, zeros=ZEROS) == expected
        with here.open(conv_net(), Workload(2)) as one, runtime.open(conv_net(), Workload(2)) as other:
            assert other.environment == one.environment


def test_over_ssh_onnx_runtime_computes_and_times(over_ssh, conv_net):
    x = np.random.default_rng(0).standard_normal((2, 8, 12, 12)).astype(np.float32)
    with over_ssh("onnxruntime").open(conv_net(), Workload(2, 1)) as there:
        assert there.environment.host == platform.node()
        assert min(there.seconds(3, warmup=1)) > 0
        with open_runtime("onnxruntime") as runtime, runtime.open(conv_net(), Workload(2, 1)) as here:
            np.testing.assert_array_equal(there.run({"x": x})["y"], here.run({"x": x})["y"])


def test_a_machine_that_goes_away_is_one_line_and_the_next_connection_works(sshd, over_ssh, conv_net):
    runtime = over_ssh("onnxruntime")
    session = runtime.open(conv_net(), Workload(1))
    pid = runtime._hello["pid"]
    killer = threading.Timer(0.5, sshd.start_again)
    killer.start()
    with pytest.raises(EngineCrashed) as caught:
        session.seconds(10_000_000)
    killer.join()
    text = str(caught.value)
    assert text.startswith(f"onnxruntime on {getpass.getuser()}@127.0.0.1 port {sshd.port}: no connection (")
    assert text.endswith(") during 'seconds'; open the model again")
    assert "\n" not in text
    assert eventually(lambda: gone(pid))
    session.close()
    with runtime.open(conv_net(), Workload(1)) as again:
        assert len(again.seconds(2)) == 2


def test_a_machine_that_no_longer_answers_is_noticed(sshd, conv_net, monkeypatch):
    monkeypatch.setenv("ONNX_SPDY_SSH", f"{sshd.ssh} -o ServerAliveInterval=1 -o ServerAliveCountMax=1")
    with open_runtime(f"{sshd.address}/onnxruntime", python=sys.executable) as runtime:
        session = runtime.open(conv_net(), Workload(1))
        freezer = threading.Timer(0.5, sshd.freeze)
        freezer.start()
        with pytest.raises(EngineCrashed, match=r"no connection \(Timeout, server .* during 'seconds'"):
            session.seconds(10_000_000)
        freezer.join()
        sshd.start_again()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda address: address.replace("ssh://", "ssh://nobody-"), "Permission denied"),
        (lambda address: address.replace("127.0.0.1", "host.invalid"), "not resolve hostname"),
    ],
)
def test_what_ssh_refuses_is_one_line(sshd, change, reason):
    with open_runtime(change(sshd.address) + "/fake") as runtime, pytest.raises(RuntimeUnavailable) as caught:
        runtime.check()
    assert reason in str(caught.value)
    assert "must work without a question" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_port_where_nobody_listens_is_unavailable(sshd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # taken, and not listened to
        address = sshd.address.replace(str(sshd.port), str(probe.getsockname()[1]))
        with open_runtime(f"{address}/fake") as runtime, pytest.raises(RuntimeUnavailable, match="Connection refused"):
            runtime.check()


@pytest.mark.engine
@pytest.mark.slow
def test_over_ssh_uv_gets_all_that_is_needed(over_ssh, conv_net):
    runtime = over_ssh("onnxruntime", python=None)
    with open_runtime("onnxruntime") as here:
        assert runtime.check() == here.check()
    assert runtime.layer_seconds(conv_net(), **PROFILE)


@pytest.mark.engine
def test_over_ssh_deepsparse_profiles(over_ssh, conv_net):
    with open_runtime("deepsparse") as here:
        try:
            here.check()
        except RuntimeUnavailable as exc:
            pytest.skip(str(exc))
    rows = over_ssh("deepsparse").layer_seconds(conv_net(), **PROFILE, zeros={"w1": 0.95}, merged=False)
    (sparse,) = [row for row in rows if row.sparse]
    assert sparse.outputs[0] == "c"
    assert sparse.kernel_sparsity == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("spec", ["ssh://me@board:22/openvino:bf16", "ssh://board/deepsparse", "openvino:bf16", "fake"])
def test_a_runtime_tells_its_name_and_where_it_is(spec: str) -> None:
    runtime = open_runtime(spec)
    assert runtime_spec(runtime) == spec
    assert location(runtime) == (spec.rpartition("/")[0] + "/" if "/" in spec else "")
