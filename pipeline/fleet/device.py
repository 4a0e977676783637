"""A device: a runtime on a machine, and the folder for what was measured there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from onnx_spdy.pipeline.aim import Against
from onnx_spdy.runtimes import Runtime, location
from onnx_spdy.runtimes.errors import OnnxSpdyError

T = TypeVar("T")


class FleetError(OnnxSpdyError, ValueError):
    """Devices that make no fleet."""


@dataclass(frozen=True)
class Device:
    """Where a network is to run.

    Attributes:
        runtime: of the device.
        name: of its folder in that of a run; "" where it is the only one, and needs none.
        against: where the target is one against the best dense alternative there.
    """

    runtime: Runtime
    name: str = ""
    against: Against | None = None

    def at(self, speedup: float) -> Device:
        """The same, for a target."""
        return replace(self, against=self.against and replace(self.against, speedup=speedup))

    def folder(self, of: Path) -> Path:
        """Where in a folder what belongs to the device is."""
        return of / self.name

    def stage(self, name: str) -> str:
        """What a stage is called here."""
        return f"{name} {self.name}".rstrip()

    @property
    def times(self) -> float:
        """How many times as fast as the dense network here a network is that is as fast as what targets are against."""
        return self.against.times if self.against else 1.0


def device_names(specs: Sequence[str]) -> list[str]:
    """The folders of several runtimes, as for `open_runtime`: "ssh-phone-onnxruntime" for "ssh://phone/onnxruntime".

    Raises:
        FleetError: two of them are the same.

    >>> device_names(["openvino:bf16", "ssh://me@phone:2222/onnxruntime"])
    ['openvino-bf16', 'ssh-me-phone-2222-onnxruntime']
    """
    names = [re.sub(r"[^A-Za-z0-9._]+", "-", spec).strip("-.") for spec in specs]
    for name, spec in zip(names, specs, strict=True):
        if names.count(name) > 1:
            raise FleetError(
                f"--runtime {spec} is given {names.count(name)} times; each device needs a name of its own"
            )
    return names


def side_by_side(devices: Sequence[Device], do: Callable[[Device], T]) -> list[T]:
    """What is done on each device, in their order: on different machines at the same time, on one machine in turns.

    An error of one machine is raised when the others have ended, whose work is kept; Ctrl-C doesn't wait for them.
    """
    machines: dict[str, list[int]] = {}
    for place, device in enumerate(devices):
        machines.setdefault(location(device.runtime), []).append(place)
    if len(machines) == 1:  # in this thread, where signals arrive
        return [do(device) for device in devices]

    def on_machine(places: list[int]) -> list[T]:
        return [do(devices[place]) for place in places]

    threads = ThreadPoolExecutor(len(machines))
    try:
        done = [threads.submit(on_machine, places) for places in machines.values()]
        wait(done)
    finally:
        threads.shutdown(wait=False)  # they are done, or end when their runtimes are closed
    found: dict[int, T] = {}
    for places, part in zip(machines.values(), done, strict=True):
        found |= zip(places, part.result(), strict=True)
    return [found[place] for place in range(len(devices))]
