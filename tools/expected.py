"""Expected failures: one line on stderr and exit code 1. Everything else is a bug and shows its traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from onnx_spdy.runtimes import OnnxSpdyError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that our own code raises on purpose, and files that can't be read or written, into one line."""
    try:
        yield
    except (OnnxSpdyError, OSError) as exc:
        print("error: " + " ".join(str(exc).split()), file=sys.stderr)
        sys.exit(1)
