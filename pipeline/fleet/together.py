"""One network for several devices: their tables as one, and what they measured as one.

A network is as fast as on the device where it gains least: that decides in both. What devices measured of a network
corrects what their tables say of others, each by a factor of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.solve_within import Limit, fastest, share
from onnx_spdy.pipeline.target import Attempt, Outcome
from onnx_spdy.pipeline.validate import Validation

_HALVINGS = 30  # towards the highest speedup


class Tables:
    """The latency tables of several devices, as `ProfileSearch` and `meet_target` want one.

    Seconds are relative here: 1 is what the target is against. A speedup is that of the device where it is least.

    Args:
        tables: of each device, by its name.
        times: how many times as fast as the dense network there something is that has a speedup of 1.
    Raises:
        ArtifactError: the tables are of different networks, layers or levels.
    """

    dense_seconds = 1.0

    def __init__(self, tables: Mapping[str, LatencyTable], times: Mapping[str, float]) -> None:
        self._tables, self._times = tables, times
        self._factors = dict.fromkeys(tables, 1.0)  # measured speedup / that of the table
        self._first = next(iter(tables.values()))
        for name, one in tables.items():
            for what in ("model_sha256", "layers", "levels"):
                if getattr(one, what) != getattr(self._first, what):
                    raise ArtifactError(f"the latency tables of {next(iter(tables))} and {name} differ in {what}")

    @property
    def layers(self) -> tuple[str, ...]:
        return self._first.layers

    @property
    def levels(self) -> tuple[Level, ...]:
        return self._first.levels

    @property
    def model_sha256(self) -> str:
        return self._first.model_sha256

    @cached_property
    def digest(self) -> str:
        """Hash of all tables and of what speedups are against."""
        text = [f"{name} {one.digest} {self._times[name]:.6g}" for name, one in self._tables.items()]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()

    @property
    def highest_speedup(self) -> float:
        """The highest that is reached on every device by one profile, as far as that was found."""
        low, high = 0.0, min(one.highest_speedup / self._asked(name) for name, one in self._tables.items())
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            limits = self._limits(middle)
            low, high = (middle, high) if share(limits, fastest(limits)) <= 1 else (low, middle)
        return low

    def limits(self, speedup: float) -> Sequence[Limit]:
        """What the layers may take on each device for a speedup on all of them.

        Raises:
            NoSpeedup: more than the tables allow, on one device or on all together.
        """
        for name, one in self._tables.items():
            one.budget(speedup * self._asked(name))
        limits = self._limits(speedup)
        if share(limits, fastest(limits)) > 1:
            raise NoSpeedup(
                f"a speedup of {speedup:g} can't be reached by one network on all of {', '.join(self._tables)}: the "
                f"highest that was found is {self.highest_speedup:.2f} by the latency tables; lower --speedup, or "
                "leave out --one-network"
            )
        return limits

    def predict(self, choice: Sequence[int] | np.ndarray) -> float:
        """Of what the target is against, the time that a choice takes on the device where that is most."""
        return max(one.predict(choice) / one.dense_seconds * self._times[name] for name, one in self._tables.items())

    def corrected(self, choice: Sequence[int] | np.ndarray) -> float:
        """The same, by what the devices measured so far."""
        return max(one.predict(choice) / one.dense_seconds * self._asked(name) for name, one in self._tables.items())

    def learn(self, choice: Sequence[int] | np.ndarray, measured: Together) -> None:
        """Correct every table by what a choice measured."""
        for name, one in self._tables.items():
            self._factors[name] = measured.on[name].lower * one.predict(choice) / one.dense_seconds

    def _asked(self, name: str) -> float:
        """The speedup by a device's table that makes one of 1."""
        return self._times[name] / self._factors[name]

    def _limits(self, speedup: float) -> list[Limit]:
        return [
            Limit(one.costs, one.dense_seconds / (speedup * self._asked(name)) - one.rest_seconds)
            for name, one in self._tables.items()
        ]


class Together:
    """What a network measured on several devices, as `meet_target` wants one validation.

    Args:
        on: of each device, by its name.
        times: as in `Tables`.
    Attributes:
        speedup, lower, upper: on the device where each is least.
        slowest: the device whose lower bound is least.
    """

    def __init__(self, on: Mapping[str, Validation], times: Mapping[str, float]) -> None:
        self.on, self._times = on, times
        self.speedup = min(one.speedup / times[name] for name, one in on.items())
        self.lower = min(one.lower / times[name] for name, one in on.items())
        self.upper = min(one.upper / times[name] for name, one in on.items())
        self.slowest = min(on, key=lambda name: on[name].lower / times[name])

    def with_more(self, other: Together) -> Together:
        """This one and another measurement of the same network together."""
        return Together({name: one.with_more(other.on[name]) for name, one in self.on.items()}, self._times)


def outcome_on(name: str, outcome: Outcome[Together], table: LatencyTable, times: float) -> Outcome[Validation]:
    """How it ended on one of the devices, by its own table and against its own dense network.

    Args:
        name, table: of the device.
        times: as in `Tables`, of this device.
    """

    def here(one: Profile) -> Profile:
        predicted = table.predict([table.levels.index(level) for level in one.levels.values()])
        return replace(
            one,
            target_speedup=one.target_speedup * times,
            table_target=one.table_target * times,
            predicted_seconds=predicted,
            predicted_speedup=table.dense_seconds / predicted,
        )

    attempts = [Attempt(here(one.profile), one.validation.on[name]) for one in outcome.attempts]
    return Outcome(attempts[outcome.attempts.index(outcome.kept)], tuple(attempts), outcome.exhausted)
