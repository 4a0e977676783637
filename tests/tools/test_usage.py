"""Wrong usage, full disks, too little memory and Ctrl-C: each ends shortly, and never with a traceback."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnx_spdy.tools import commands
from onnx_spdy.tools.cli import main
from onnx_spdy.tools.expected import one_line_errors
from onnx_spdy.tools.fuzz.graphs import examples

RUN = "run net.onnx --data d.npz --runtime fake --speedup 1.3 --out out"
MEASURE = "measure net.onnx --runtime fake --out latency.json"
FINETUNE = "finetune net.onnx net.onnx --data d.npz --out tuned.onnx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(examples()[0], tmp_path / "net.onnx")
    (value,) = examples()[0].graph.input
    shape = [one.dim_value for one in value.type.tensor_type.shape.dim][1:]
    np.savez(tmp_path / "d.npz", **{value.name: np.zeros((8, *shape), np.float32)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *((RUN, option, "") for option in ("--out", "--eval", "--data")),
        *((MEASURE, option, "") for option in ("--out", "--data")),
        *((RUN, option, "\udcff") for option in ("--out", "--eval", "--data")),  # bytes that are no UTF-8
        *((RUN, "--time-limit", value) for value in ("nan", "inf", "-1", "0")),
        *((RUN, "--memory", value) for value in ("nan", "inf", "1e300")),
        *((FINETUNE, "--learning-rate", value) for value in ("nan", "inf", "0")),
        (FINETUNE, "--time-limit", "nan"),
        (RUN, "--speedup", "nan"),
        (RUN, "--seed", str(2**64)),
        (RUN, "--threads", str(10**11)),
        (RUN, "--out", "net.onnx"),
        (RUN, "--out", "net.onnx/below"),
        (MEASURE, "--out", "."),
        (MEASURE, "--out", "net.onnx/below.json"),
    ],
)
def test_wrong_usage_is_told_before_any_work(command, option, value, folder, capsys):
    before = sorted(folder.rglob("*"))
    words = command.split()
    if option in words:
        del words[(place := words.index(option)) : place + 2]
    code, err = ended(capsys, *words, option, value)
    assert code == 2 and option in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", [f"{RUN} --batch {10**9}", f"{MEASURE} --batch {10**9}"])
def test_a_batch_beyond_all_memory_is_refused_in_one_line(command, folder, capsys):
    code, err = ended(capsys, *command.split())
    assert code == 1 and "--batch" in err and err.count("\n") == 1


def test_a_home_in_quotes_is_the_home(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    assert ended(capsys, "prepare", "net.onnx", "--out", "~/prepared.onnx")[0] == 0
    assert (folder / "home" / "prepared.onnx").exists()
    assert ended(capsys, "inspect", "~/prepared.onnx")[0] == 0
    assert ended(capsys, "report", "~/x") == (1, f"error: {folder}/home/x/report.json can't be read: "
                                                 f"{os.strerror(errno.ENOENT)}\n")  # fmt: skip


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), "/some/file: No space left on device"),
        (MemoryError("Unable to allocate 3 TiB"), "Unable to allocate 3 TiB"),
        (MemoryError(), "too little memory"),
    ],
)
def test_errors_of_the_machine_are_one_line(error, words, capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    err = capsys.readouterr().err
    assert caught.value.code == 1 and words in err and err.count("\n") == 1


def test_pytorchs_lack_of_memory_is_one_line_and_its_other_errors_are_bugs(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors():
        torch.empty(2**55)
    assert caught.value.code == 1 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(RuntimeError, match="size"), one_line_errors():
        torch.ones(2) + torch.ones(3)


def test_ctrl_c_while_modules_are_imported_ends_quietly(folder):
    """Sent as soon as the command line has started, long before PyTorch is there."""
    code = (
        "import os, signal, sys, threading, onnx_spdy.tools.cli as cli; assert 'torch' not in sys.modules; "
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start(); cli.main(['inspect', 'net.onnx'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_in_a_command_ends_quietly(capsys, monkeypatch):
    def interrupted(arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(commands, "app", interrupted)
    assert ended(capsys, "inspect", "net.onnx") == (130, "")


def test_ctrl_c_in_the_middle_of_a_run_ends_quietly(folder):
    (folder / "user.py").write_text(
        "import os, signal, time\ndef metric(outputs, target):\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(9)\n"
    )
    options = "--eval d.npz --metric user.py:metric"
    command = [sys.executable, "-m", "onnx_spdy.tools.cli", *RUN.split(), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
