"""Devices at work: what a run asks of all of them, side by side. With one device it is what that one says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx_spdy.models import Prepared
from onnx_spdy.models.int8.form import Form, form_for
from onnx_spdy.pipeline.alternatives import Alternatives
from onnx_spdy.pipeline.compare import Files, compare
from onnx_spdy.pipeline.fleet.device import Device, FleetError, side_by_side
from onnx_spdy.pipeline.fleet.together import Tables, Together, outcome_on
from onnx_spdy.pipeline.latency.load_or_measure import load_or_measure
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.progress import Watch
from onnx_spdy.pipeline.search.profile_search import Times
from onnx_spdy.pipeline.target import Outcome
from onnx_spdy.pipeline.validate import Validation, validate
from onnx_spdy.runtimes import Workload, runtime_spec


def forms_of(devices: Sequence[Device]) -> set[Form]:
    """In which devices want a network in int8."""
    return {form_for(device.runtime.name) for device in devices}


def one_form(devices: Sequence[Device]) -> Form:
    """The form of int8 that all devices run.

    Raises:
        FleetError: there is none.
        NoForm: one of them runs no int8 at all.
    """
    form, *others = forms_of(devices)
    if others:
        raise FleetError(
            f"{', '.join(runtime_spec(device.runtime) for device in devices)} want int8 in different forms; leave out "
            "--one-network"
        )
    return form


def measure_tables(
    dense: Prepared,
    devices: Sequence[Device],
    levels: Sequence[Level],
    workload: Workload,
    model: Path,
    folder: Path,
    *,
    seed: int,
    allow_busy: bool,
    watch: Watch,
) -> list[LatencyTable]:
    """The latency table of each device, in their order; see `load_or_measure`.

    Args:
        model: file of the dense network.
        folder: of the run; each device has its own there.
    """

    def of(device: Device) -> LatencyTable:
        return load_or_measure(
            dense, device.runtime, levels, workload, device.folder(folder) / "latency.json", model,
            seed=seed, allow_busy=allow_busy, progress=watch.stage(device.stage("measure")),
        )  # fmt: skip

    return side_by_side(devices, of)


class Fleet:
    """Devices and their tables.

    Attributes:
        times: what the tables say of profiles, all together.
    """

    def __init__(self, devices: Sequence[Device], tables: Sequence[LatencyTable]) -> None:
        self._devices = devices
        self._tables = {device.name: table for device, table in zip(devices, tables, strict=True)}
        # The target of one device is against the dense network there already.
        self._ratios = {device.name: device.times if len(devices) > 1 else 1.0 for device in devices}
        self._together = Tables(self._tables, self._ratios) if len(devices) > 1 else None
        self.times: Times = self._together or tables[0]

    def validate(self, dense: Path, pruned: Path, workload: Workload, watch: Watch) -> Together:
        """Measure both files on every device."""

        def on(device: Device) -> Validation:
            progress = watch.stage(device.stage("validate"))
            return validate(dense, pruned, device.runtime, workload, progress=progress)

        return self._of(side_by_side(self._devices, on))

    def learnt(self, profile: Profile, measured: Together) -> Together:
        """What was measured of a profile, from which the tables of several devices are corrected."""
        if self._together:
            self._together.learn(self._choice(profile), measured)
        return measured

    def predicted_speedup(self, profile: Profile) -> float:
        """The speedup of a profile by the tables, as they are by now."""
        if self._together is None:
            return profile.predicted_speedup
        return 1 / self._together.corrected(self._choice(profile))

    def compare(self, files: Files, workload: Workload, watch: Watch) -> list[Alternatives]:
        """The networks in every engine of each device, in their order."""

        def on(device: Device) -> Alternatives:
            return compare(files, device.runtime, workload, watch.stage(device.stage("alternatives")))

        return side_by_side(self._devices, on)

    def outcome_on(self, device: Device, outcome: Outcome[Together]) -> Outcome[Validation]:
        """How it ended on one of them."""
        return outcome_on(device.name, outcome, self._tables[device.name], self._ratios[device.name])

    @staticmethod
    def is_formula(measured: Together) -> bool:
        """Whether a device computes its times from a formula."""
        return any(one.environment.is_formula for one in measured.on.values())

    def _of(self, found: Sequence[Validation]) -> Together:
        named = {device.name: one for device, one in zip(self._devices, found, strict=True)}
        return Together(named, self._ratios)

    def _choice(self, profile: Profile) -> list[int]:
        return [self.times.levels.index(level) for level in profile.levels.values()]
