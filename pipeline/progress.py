"""Progress: how far a stage is, in one signature for all of them; and the user's wish to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

Progress = Callable[[int, int, str], None]  # (done, total, note)
Listen = Callable[[], AbstractContextManager[Callable[[], bool]]]  # while it is entered: whether the user wants to stop


def ignore(done: int, total: int, note: str) -> None:
    """Tells nobody."""


@contextlib.contextmanager
def never() -> Iterator[Callable[[], bool]]:
    """Nobody wants to stop."""
    yield lambda: False


@dataclass(frozen=True)
class Watch:
    """Who watches a run.

    Attributes:
        stage: name of a stage -> what its progress is told to.
        listen: a context that a search runs in; what it gives says whether the user asked to stop.
    """

    stage: Callable[[str], Progress] = lambda name: ignore
    listen: Listen = never
