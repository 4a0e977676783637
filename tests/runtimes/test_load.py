from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from onnx_spdy.runtimes import host, load, measure_undisturbed
from onnx_spdy.runtimes.fake import FakeRuntime
from onnx_spdy.runtimes.load import ForeignLoad

TOLERANCE = 0.15  # of a core: the system counts in ticks, and not all counters at once
SPIN = """
import sys, time
from pathlib import Path
ready, stop, used = map(Path, sys.argv[1:])
started = time.process_time()
ready.touch()
while not stop.exists():
    sum(range(10_000))
used.with_suffix(".part").write_text(str(time.process_time() - started))
used.with_suffix(".part").rename(used)
"""


@dataclass
class Busy:
    """Seconds of a process that did nothing but work, as it counted them itself, and of the whole machine meanwhile."""

    process: float
    machine: float
    foreign: float  # cores
    wall: float


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def busy_seconds_of_the_machine() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def spin(folder: Path, start) -> Busy:
    """What `ForeignLoad` sees while a process works that `start` makes of a command line, and waits for in the end."""
    ready, stop, used = (folder / name for name in ("ready", "stop", "used"))
    watch = ForeignLoad()
    if watch.cores() is None:
        pytest.skip("this system doesn't tell which CPU is which")
    process = start([sys.executable, "-c", SPIN, *map(str, (ready, stop, used))])
    wait_for(ready)
    watch.restart()
    before, since = busy_seconds_of_the_machine(), time.monotonic()
    time.sleep(1.0)
    stop.touch()
    wait_for(used)
    process.wait()
    foreign, wall = watch.cores(), time.monotonic() - since
    assert foreign is not None
    return Busy(float(used.read_text()), busy_seconds_of_the_machine() - before, foreign, wall)


def orphan(command: list[str]) -> subprocess.Popen:
    """A process in a session of its own whose parent has ended, so that it descends from nobody here."""
    code = f"import subprocess; subprocess.Popen({command!r}, start_new_session=True)"
    return subprocess.Popen([sys.executable, "-c", code])


def test_what_strangers_use_is_seen(tmp_path) -> None:
    busy = spin(tmp_path, orphan)
    assert busy.process / busy.wall > 0.1
    assert busy.foreign > busy.process / busy.wall - TOLERANCE


def test_what_our_children_use_is_not_even_when_they_have_ended(tmp_path) -> None:
    busy = spin(tmp_path, subprocess.Popen)
    assert busy.process / busy.wall > TOLERANCE
    assert busy.foreign < (busy.machine - busy.process) / busy.wall + TOLERANCE


@dataclass
class Times:
    user: float
    steal: float
    idle: float
    iowait: float = 0.0


def test_only_the_cpus_that_we_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container that sees four CPUs and may use two, others don't matter; what the host takes away does."""
    monkeypatch.setattr(host, "allowed_cpus", lambda: [1, 3])
    monkeypatch.setattr(load, "_own_seconds", lambda: 0.0)
    clock = [0.0]
    rates = [Times(1.0, 0.0, 0.0), Times(0.25, 0.0, 0.75), Times(1.0, 0.0, 0.0), Times(0.0, 0.5, 0.25, 0.25)]
    monkeypatch.setattr(load.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        psutil,
        "cpu_times",
        lambda percpu: [Times(*(clock[0] * value for value in vars(rate).values())) for rate in rates],
    )
    watch = ForeignLoad()
    clock[0] = 8.0
    assert watch.cores() == pytest.approx(0.75)
    monkeypatch.setattr(load, "_own_seconds", lambda: 2.0)
    assert watch.cores() == pytest.approx(0.5)
    watch.restart()
    clock[0] = 10.0
    assert watch.cores() == pytest.approx(0.75)


@pytest.mark.parametrize(("shown", "known"), [(2, True), (9, True), (8, False)])
def test_cpus_without_numbers_are_not_guessed(monkeypatch: pytest.MonkeyPatch, shown: int, known: bool) -> None:
    monkeypatch.setattr(host, "allowed_cpus", lambda: [7, 8])
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [Times(1.0, 0.0, 0.0)] * shown)
    assert (ForeignLoad().cores() is not None) == known


class Company(FakeRuntime):
    """Other programs keep so many cores busy during each attempt."""

    def __init__(self, *loads: float) -> None:
        super().__init__()
        self.loads = [value for load in loads for value in (0.0, load)]

    def foreign_cores(self) -> float | None:
        return self.loads.pop(0)


def test_a_disturbed_measurement_is_repeated_while_there_are_waits() -> None:
    numbers, told = iter(range(9)), []

    def measure(runtime: Company, waits) -> tuple[int, float | None]:
        return measure_undisturbed(runtime, lambda: next(numbers), lambda found: 4, waits, told.append)

    waits = iter([0.0, 0.001, 0.001])
    assert measure(Company(0.3), waits) == (0, 0.3)  # less than a tenth of four cores
    assert measure(Company(2.0, 1.0, 0.1), waits) == (3, 0.1)
    assert measure(Company(3.0, 2.5), waits) == (5, 2.5)
    assert measure(Company(3.0), waits) == (6, 3.0)
    assert told == [2.0, 1.0, 3.0]
