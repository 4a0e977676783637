"""Who else uses the CPU: a timing on a busy machine is wrong, and nothing in its numbers says so.

An engine whose threads wait for each other suffers out of proportion: with both cores taken by another program,
DeepSparse became 17 times slower, and its sparse kernels no faster than its dense ones. So the load is looked at,
not guessed from the spread.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from .base import Closing

PROC = Path("/proc")
_AFTER_NAME = 2  # /proc/PID/stat: fields after the name in parentheses start with field 3
_STEAL = 8  # /proc/stat, first line
BUSY_SHARE = 0.1  # of the cores: a program that uses more spoils a measurement
STOLEN = (0, 0)  # the key of the host among those of processes
_PARENT, _USER, _SYSTEM, _STARTED = 4, 14, 15, 22


class ForeignLoad:
    """CPU time that processes other than this one and its descendants use, from its making on.

    Example:
        load = ForeignLoad()
        ...  # measure
        if load.cores() > 0.1: ...  # measure again
    """

    def __init__(self) -> None:
        self._ticks = os.sysconf("SC_CLK_TCK")
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._before = _foreign_ticks()
        self._since = time.monotonic()

    def cores(self) -> float | None:
        """Mean number of cores that others kept busy since then; None where the system doesn't tell (no /proc).

        What a virtual machine's host took away (steal) counts too. Processes that came and went in between aren't seen.
        """
        now = _foreign_ticks()
        if now is None or self._before is None:
            return None
        used = sum(max(0, ticks - self._before.get(process, 0)) for process, ticks in now.items())
        return used / self._ticks / max(1e-9, time.monotonic() - self._since)


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


def _foreign_ticks() -> dict[tuple[int, int], int] | None:
    """(process id, start time) -> CPU ticks, of processes that don't descend from this one, and of the host."""
    if not (PROC / "self" / "stat").exists():
        return None
    parents: dict[int, int] = {}
    ticks: dict[tuple[int, int], int] = {}
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text(encoding="utf8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        number = {key: int(fields[key - _AFTER_NAME - 1]) for key in (_PARENT, _USER, _SYSTEM, _STARTED)}
        process = int(folder.name)
        parents[process] = number[_PARENT]
        ticks[process, number[_STARTED]] = number[_USER] + number[_SYSTEM]
    strangers = {key: value for key, value in ticks.items() if not _descends(key[0], parents)}
    return {**strangers, STOLEN: _stolen_ticks()}


def _stolen_ticks() -> int:
    """Ticks in which a virtual CPU wanted to run and its host ran something else, of all CPUs."""
    fields = (PROC / "stat").read_text(encoding="utf8").split("\n", 1)[0].split()
    return int(fields[_STEAL]) if len(fields) > _STEAL else 0


def _descends(process: int, parents: dict[int, int]) -> bool:
    own = os.getpid()
    while process and process != own:
        process = parents.get(process, 0)
    return process == own
