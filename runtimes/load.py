"""Who else uses the CPU: a timing on a busy machine is wrong, and nothing in its numbers says so.

An engine whose threads wait for each other suffers out of proportion: with both cores taken by another program,
DeepSparse became 17 times slower, and its sparse kernels no faster than its dense ones. So the load is looked at,
not guessed from the spread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import psutil

from . import host
from .base import Closing, Runtime

BUSY_SHARE = 0.1  # of the cores: a program that uses more spoils a measurement
BUSY_KINDS = ("user", "nice", "system", "irq", "softirq", "steal")  # of a CPU's time, where the system tells them apart

Found = TypeVar("Found")


@dataclass(frozen=True)
class _Counters:
    """Seconds since some moment in the past."""

    wall: float
    busy: float  # CPU time of the CPUs that this process may use, whoever used it
    own: float  # CPU time of this process and its descendants

    @classmethod
    def now(cls) -> _Counters | None:
        """None where the system doesn't tell which CPU is which."""
        busy = _busy_seconds()
        return None if busy is None else cls(time.monotonic(), busy, _own_seconds())


class ForeignLoad:
    """CPU time that others than this process and its descendants use on the CPUs that it may use, from its making on.

    Example:
        load = ForeignLoad()
        ...  # measure
        if load.cores() > 0.1: ...  # measure again
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._before = _Counters.now()

    def cores(self) -> float | None:
        """Mean number of cores that others kept busy since then; None where the system doesn't tell.

        What a virtual machine's host took away (steal) counts too. A descendant that nobody waited for when it ended
        counts as a stranger.
        """
        before, now = self._before, _Counters.now()
        if before is None or now is None:
            return None
        foreign = now.busy - before.busy - max(0.0, now.own - before.own)
        return max(0.0, foreign) / max(1e-9, now.wall - before.wall)


class WatchesLoad(Closing):
    """`Runtime.foreign_cores` for an engine on this machine."""

    _load: ForeignLoad | None = None

    def foreign_cores(self) -> float | None:
        """See `Runtime.foreign_cores`."""
        if self._load is None:
            self._load = ForeignLoad()
            return 0.0
        cores = self._load.cores()
        self._load.restart()
        return cores


class UnknownLoad(Closing):
    """`Runtime.foreign_cores` of an engine on a GPU: the CPU's load doesn't matter there, the GPU's isn't known."""

    _asked = False

    def foreign_cores(self) -> float | None:
        """See `Runtime.foreign_cores`."""
        first, self._asked = not self._asked, True
        return 0.0 if first else None


def is_busy(foreign_cores: float | None, cores: int) -> bool:
    """Whether other programs use so many of the cores that what was measured meanwhile can't be trusted."""
    return (foreign_cores or 0.0) > BUSY_SHARE * cores


def measure_undisturbed(
    runtime: Runtime,
    measure: Callable[[], Found],
    cores: Callable[[Found], int],
    waits: Iterator[float],
    waiting: Callable[[float], None] = lambda load: None,
) -> tuple[Found, float | None]:
    """Measure; again while other programs disturb, after a wait each time.

    Args:
        runtime: in which it is measured.
        measure: returns what was found.
        cores: of the machine on which that was found.
        waits: seconds; when there are no more, the last attempt counts however disturbed it was.
        waiting: called with the cores that other programs keep busy, before each wait.
    Returns:
        What was found, and `Runtime.foreign_cores` meanwhile.
    """
    while True:
        runtime.foreign_cores()  # the count starts
        found = measure()
        load = runtime.foreign_cores()
        wait = next(waits, None) if load is not None and is_busy(load, cores(found)) else None
        if load is None or wait is None:
            return found, load
        waiting(load)
        time.sleep(wait)


def _busy_seconds() -> float | None:
    """Busy time of the CPUs that this process may use; None where the system doesn't tell which these are."""
    every, allowed = psutil.cpu_times(percpu=True), host.allowed_cpus()
    if len(every) == len(allowed):  # some containers show only these
        ours = every
    elif max(allowed) < len(every):
        ours = [every[cpu] for cpu in allowed]
    else:
        return None
    return sum(getattr(times, kind, 0.0) for times in ours for kind in BUSY_KINDS)


def _own_seconds() -> float:
    """CPU time of this process, of its descendants, and of those of them that have ended."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])  # user and system, its own and those of its children that ended
        except psutil.NoSuchProcess:  # it has ended meanwhile, and counts for its parent from now on
            continue
    return total
