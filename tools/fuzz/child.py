"""A command in a process of its own, forked from this one, which has imported everything: no second to start."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 40.0
POLL_SECONDS = 0.01
TRACEBACK = 90
KNOWN_CODES = (0, 1, 2, 130)
ACCEPTED, REFUSED = "accepted", "refused in one line"
_TOLD = re.compile(r"WARNING: |INFO: |warning: |[\w .:-]+: \d+ done in ")  # lines on stderr that are no errors


@dataclass(frozen=True)
class Outcome:
    """What became of one trial; `trouble` is None when all was as it should be.

    Attributes:
        became: in a few words, to be counted.
        text: what was printed.
        what: was done, to tell the trial apart from others.
    """

    trouble: str | None
    became: str
    text: str
    what: str = ""
    seconds: float = 0.0
    memory_bytes: int = 0

    @property
    def accepted(self) -> bool:
        return self.became == ACCEPTED


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or its signal as a negative number; what it printed, what it took."""

    code: int
    out: str
    err: str
    seconds: float = 0.0
    memory_bytes: int = 0
    overdue: bool = False

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def lines(self) -> list[str]:
        """The lines of its error."""
        return [line for line in self.err.splitlines() if line.strip() and not _TOLD.match(line)]

    @property
    def trouble(self) -> str | None:
        """Why this is no end that a user should see; None where it is one."""
        if self.overdue:
            return "hang"
        if self.code < 0:
            return f"crash ({signal.Signals(-self.code).name})"
        if self.code == TRACEBACK or "Traceback (most recent" in self.text:
            return "traceback"
        if self.code not in KNOWN_CODES:
            return f"exit code {self.code}"
        if self.code == 1 and len(self.lines) != 1:
            return "several lines" if self.lines else "silent failure"
        return None

    @property
    def became(self) -> str:
        return {0: ACCEPTED, 1: REFUSED, 2: "wrong usage"}.get(self.code, f"exit code {self.code}")


def import_everything() -> None:
    """Before forks: what is imported once isn't imported in each of them."""
    import onnxruntime  # noqa: F401
    import onnxslim  # noqa: F401
    import torch

    import onnx_spdy.tools.commands  # noqa: F401

    torch.set_num_threads(1)


def command(arguments: Sequence[str], folder: Path) -> Callable[[], int]:
    """What calls `onnx-spdy` in a folder, and returns its exit code."""

    def work() -> int:
        from onnx_spdy.tools.cli import main

        os.chdir(folder)
        try:
            main(list(arguments))
        except SystemExit as exc:
            return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        except BaseException:
            traceback.print_exc()
            return TRACEBACK
        return 0

    return work


def start(work: Callable[[], int], output: Path) -> int:
    """Begin some work in a process of its own, which prints into two files; returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (output.with_suffix(suffix).open("wb") for suffix in (".out", ".err"))  # there even if it is killed now
    with Path(os.devnull).open("rb") as nothing, out, err:
        child = os.fork()
        if child:
            return child
        for number, stream in enumerate((nothing, out, err)):
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
    os.environ["COLUMNS"] = "9999"  # a warning is one line
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = TRACEBACK
    try:
        code = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, output: Path, seconds: float = SECONDS) -> Ended:
    """Until it ends, or is killed after so many seconds. While this process is stopped no time passes."""
    left, overdue = seconds, False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if left < 0 and not overdue:
            overdue = True
            os.kill(child, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
        left -= POLL_SECONDS
    out, err = (output.with_suffix(suffix).read_text("utf8", errors="replace") for suffix in (".out", ".err"))
    took, memory = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Ended(os.waitstatus_to_exitcode(status), out, err, took, memory, overdue)


def ended(arguments: Sequence[str], folder: Path, output: Path) -> Ended:
    """Call `onnx-spdy` in a folder and wait for its end."""
    return wait(start(command(arguments, folder), output), output)
