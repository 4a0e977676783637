"""Expected failures: one line on stderr and exit code 1. Everything else is a bug and shows its traceback."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import typer

from onnx_spdy.runtimes import RuntimeFailure


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that our own code raises on purpose, and files that can't be read or written, into one line."""
    try:
        yield
    except (ValueError, RuntimeFailure, OSError) as exc:  # every error of ours is one of these
        if not (type(exc).__module__.startswith("onnx_spdy.") or isinstance(exc, OSError)):
            raise
        print("error: " + " ".join(str(exc).split()), file=sys.stderr)
        sys.exit(1)


def run_command(function: Callable[..., None]) -> None:
    """A function as a command line of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    with one_line_errors():
        app()
