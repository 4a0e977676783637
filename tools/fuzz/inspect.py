"""One damaged file through `onnx-spdy inspect`, in a process of its own, and what became of it."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_spdy.runtimes.atomic import WORK, WorkFolder
from onnx_spdy.tools.fuzz.damage import DATA_FILE, Files, damaged

MEMORY_BYTES = 2 << 30
SECONDS = 10.0
KILLED_AFTER_SECONDS = 4 * SECONDS
FOUND_IN_CHILD = {90: "traceback", 91: "several lines", 92: "wrote a file", 93: "silent failure"}


@dataclass(frozen=True)
class Outcome:
    """What became of one file; `trouble` is None when all was as it should be."""

    trouble: str | None
    accepted: bool
    seconds: float
    memory_bytes: int
    text: str


def inspected(files: Files, folder: Path) -> Outcome:
    """Run `inspect` on a model in a process of its own, in a folder that it must leave as it is."""
    path = folder / "inside" / "model.onnx"
    path.parent.mkdir(parents=True)
    given = write(files, path)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _inspect(path, folder / "output")
    overdue = False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > KILLED_AFTER_SECONDS and not overdue:
            overdue = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    seconds, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    code = os.waitstatus_to_exitcode(status)
    text = (folder / "output").read_text(encoding="utf8", errors="replace")
    strange = [str(p) for p in folder.rglob("*") if p.is_file() and p not in (*given, folder / "output")]
    trouble = FOUND_IN_CHILD.get(code) if code in FOUND_IN_CHILD else None
    if overdue or seconds > SECONDS:
        trouble = "hang"
    elif code < 0:
        trouble = f"crash ({signal.Signals(-code).name})"
    elif memory > MEMORY_BYTES:
        trouble = "memory"
    elif strange:
        trouble = "wrote a file"
    elif trouble is None and code not in (0, 1):
        trouble = f"exit code {code}"
    return Outcome(trouble, code == 0, seconds, memory, text)


def write(files: Files, path: Path) -> list[Path]:
    """Put a model at a path and its data beside it; returns what was written."""
    path.write_bytes(files.model)
    if files.data is None:
        return [path]
    path.with_name(DATA_FILE).write_bytes(files.data)
    return [path, path.with_name(DATA_FILE)]


def _inspect(path: Path, output: Path) -> None:
    """In the child: `onnx-spdy inspect`, everything that it prints into `output`, and a verdict as exit code."""
    from onnx_spdy.tools.cli import main

    written: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            written.append(arguments[0])

    with output.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.chdir(path.parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    code, errors = 0, io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            main(["inspect", str(path)])
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException as exc:
        errors.write(f"Traceback: {type(exc).__name__}: {exc}")
        code = 90
    message = errors.getvalue()
    os.write(2, message.encode(errors="replace"))
    work = f"{tempfile.gettempdir()}/{WORK}"  # folders of ours, where graphs are tried; they have to be gone now
    left = [name for name in written if not name.startswith(work) or Path(name).exists()]
    own = [name for name in left if not name.startswith("/dev/")]
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith("WARNING")]
    if own:
        os.write(2, f"\nwrote {own}".encode())
        code = 92
    elif code == 1:
        code = 93 if not lines else 91 if len(lines) > 1 else 90 if "Traceback" in message else 1
    os._exit(code)


def fuzz(
    models: Sequence[onnx.ModelProto],
    count: int,
    seed: int,
    first: int = 0,
    workers: int = 1,
    keep: Path | None = None,
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of `count` damaged files from number `first` on; a number's file is the same in every run of a seed."""
    import onnxruntime  # noqa: F401  # before the forks: imported once instead of in each
    import onnxslim  # noqa: F401
    import torch

    import onnx_spdy.tools.commands  # noqa: F401

    torch.set_num_threads(1)

    def one(number: int) -> tuple[int, Outcome]:
        rng = np.random.default_rng([seed, number])
        files = damaged(models[number % len(models)], rng)
        with WorkFolder() as folder:
            outcome = inspected(files, Path(folder) / "case")
        if outcome.trouble and keep is not None:
            (keep / f"{number}").mkdir(parents=True, exist_ok=True)
            write(files, keep / f"{number}" / "model.onnx")
        return number, outcome

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, range(first, first + count))
