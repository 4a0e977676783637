"""Expected failures: one line on stderr and exit code 1. What else there is is a bug and shows its traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from onnx_spdy.runtimes import OnnxSpdyError
from onnx_spdy.tools.interrupt import INTERRUPTED

NO_MEMORY = "can't allocate memory"  # what PyTorch says, in a RuntimeError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that our own code raises on purpose, files that can't be read or written, and too little memory, into
    one line, and Ctrl-C into no word at all.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (OnnxSpdyError, OSError, MemoryError, RuntimeError) as exc:
        if type(exc) is RuntimeError and NO_MEMORY not in str(exc):
            raise
        print("error: " + " ".join(_words(exc).split()), file=sys.stderr)
        sys.exit(1)


def _words(exc: BaseException) -> str:
    if isinstance(exc, OnnxSpdyError):
        return str(exc)
    if isinstance(exc, MemoryError | RuntimeError):
        return (
            f"there is too little memory ({str(exc) or 'no more is granted'}); take a smaller --batch or fewer samples"
        )
    if isinstance(exc, OSError) and exc.filename is not None:
        return f"{os.fsdecode(exc.filename)}: {exc.strerror}"
    return str(exc) or type(exc).__name__
