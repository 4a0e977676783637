"""Ctrl-C once: a search stops and keeps the best so far; elsewhere, or twice, everything stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # the exit code by which shells know it


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Ctrl-C ends the process meanwhile, without a word: while modules are imported there is nothing to clean up yet.

    An exception wouldn't do: some libraries take one during their import for something else.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Interrupt:
    """Listens for Ctrl-C while it is entered; once asked to stop, it stays asked."""

    def __init__(self) -> None:
        self._asked = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Callable[[], bool]]:
        """A context that gives a function: whether the user pressed Ctrl-C; signals only reach the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield lambda: self._asked
            return
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield lambda: self._asked
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping the search with the best profile so far; Ctrl-C again stops everything", file=sys.stderr)
