"""Work that is cut into tasks: here, one after the other, or on the workers of a cluster (`cluster.py`).

How work is cut depends on the network and the samples alone, never on who works, and whoever needs an order restores it
(`in_order`): so results have the same bits whatever the number of workers and whoever is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from onnx_spdy.runtimes.errors import OnnxSpdyError

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class ClusterError(OnnxSpdyError, RuntimeError):
    """A cluster can't be used, or was lost."""


class Tasks(Protocol):
    """Does tasks.

    Attributes:
        is_parallel: whether several are done at once: then those that take longest should come first.
    """

    is_parallel: bool

    def map(
        self, function: Callable[[S, T], R], shared: S, items: Iterable[T], needs: Callable[[T], int] | None = None
    ) -> Iterator[tuple[int, R]]:
        """Call `function(shared, item)` for each item.

        Args:
            function: gives the same for the same arguments, wherever and however often it is called.
            shared: what all items have in common; it is sent once. What a call changes in it stays where it was called.
            items: taken when their turn comes.
            needs: bytes of memory that an item's call takes.
        Yields:
            (number of the item, result), as they are done; nothing more is begun when nobody asks for more.
        Raises:
            ClusterError: the work can't be done there.
        """

    def sees(self, folder: Path) -> bool:
        """Whether all who work see the files of this folder."""


class InProcess:
    """Does tasks here, in order, each when its result is asked for."""

    is_parallel = False

    def map(
        self, function: Callable[[S, T], R], shared: S, items: Iterable[T], needs: Callable[[T], int] | None = None
    ) -> Iterator[tuple[int, R]]:
        for number, item in enumerate(items):
            yield number, function(shared, item)

    def sees(self, folder: Path) -> bool:
        return True


IN_PROCESS = InProcess()


def in_order(results: Iterable[tuple[int, R]]) -> Iterator[R]:
    """The results by their number: those that are done early wait for the ones before them.

    >>> list(in_order([(1, "b"), (0, "a"), (2, "c")]))
    ['a', 'b', 'c']
    """
    early: dict[int, R] = {}
    following = 0
    for number, result in results:
        early[number] = result
        while following in early:
            yield early.pop(following)
            following += 1
