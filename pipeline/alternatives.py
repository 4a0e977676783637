"""Dense alternatives: would the network as it was, in another engine or precision, be faster than the pruned one?

A speedup is told against the dense network in the same runtime and precision. That is what pruning won, but
not what a user should deploy: on a CPU with bf16 instructions the dense network in OpenVINO may well beat
a sparse one in fp32. So the pruned network and every dense choice of this machine are measured side by side.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.runtimes import (
    Environment,
    Measurement,
    Runtime,
    RuntimeFailure,
    Session,
    Workload,
    location,
    measure_interleaved,
    open_runtime,
    ratio_confidence,
    runtime_spec,
)

VISITS = 6
ROUNDS = 3  # of each visit
ITERATIONS = 2
WARMUP = 2
CONFIDENCE = 0.95
DENSE, PRUNED = "dense", "pruned"
BASELINES = ("deepsparse", "onnxruntime", "openvino:fp32", "openvino:bf16")


@dataclass(frozen=True)
class Alternative:
    """One network in one runtime and precision.

    Attributes:
        name: runtime and precision, such as "openvino bf16".
        role: "dense" or "pruned".
        seconds: one median for each visit; in a visit, all alternatives are opened and measured in turns.
        environment: in which it was measured.
        fallback: which part the engine doesn't optimise and why, or None.
    """

    name: str
    role: str
    seconds: Measurement
    environment: Environment
    fallback: str | None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "median_seconds": self.seconds.median,
            **self.seconds.to_json(),
            "environment": self.environment.to_json(),
            "fallback": self.fallback,
        }


@dataclass(frozen=True)
class Alternatives:
    """What was measured, the pruned network first, and why others were not.

    Attributes:
        measured: one pruned and at least one dense.
        missing: for each runtime that is missing or refuses the network, its reason.
    """

    measured: tuple[Alternative, ...]
    missing: Mapping[str, str]

    @property
    def pruned(self) -> Alternative:
        """The pruned network in its runtime."""
        return next(one for one in self.measured if one.role == PRUNED)

    def to_json(self) -> dict[str, Any]:
        return {
            "measured": [one.to_json() for one in self.measured],
            "missing": dict(self.missing),
            "verdict": verdict(self),
        }


def measure_alternatives(
    dense: Path,
    pruned: Path,
    runtime: Runtime,
    workload: Workload,
    *,
    visits: int = VISITS,
    progress: Progress = ignore,
) -> Alternatives:
    """Measure the pruned network in its runtime and the dense one in every runtime and precision, in turns.

    Args:
        dense, pruned: ONNX files.
        runtime: the one that will run the pruned network.
        workload: as in `Runtime.open`; the same for all.
        visits: in each, every network is opened anew; see `validate`.
        progress: called with (visits done, visits, note).
    Raises:
        RuntimeFailure: of `runtime`; another one that fails is in `missing`.
    """
    missing: dict[str, str] = {}
    measured: dict[tuple[str, str], Alternative] = {}
    for visit in range(visits):
        with contextlib.ExitStack() as stack:
            sessions = {
                (PRUNED, ""): stack.enter_context(runtime.open(pruned, workload)),
                (DENSE, ""): stack.enter_context(runtime.open(dense, workload)),
            }
            for spec in _others(runtime, sessions[PRUNED, ""].environment):
                name = spec.removeprefix(location(runtime)).replace(":", " ")
                if name in missing:
                    continue
                try:
                    sessions[DENSE, spec] = _open_other(stack, spec, dense, workload)
                except RuntimeFailure as exc:
                    missing[name] = str(exc)
            times = measure_interleaved(
                {" ".join(key): session for key, session in sessions.items()},
                rounds=ROUNDS, iterations=ITERATIONS, warmup=WARMUP,
            )  # fmt: skip
            measured = {
                key: _alternative(key[0], session, times[" ".join(key)], measured.get(key))
                for key, session in sessions.items()
            }
        progress(visit + 1, visits, "the dense network in every runtime")
    return Alternatives(tuple(measured.values()), missing)


def fastest_dense(alternatives: Alternatives) -> Alternative:
    """The dense alternative with the least median seconds."""
    return min((one for one in alternatives.measured if one.role == DENSE), key=lambda one: one.seconds.median)


def verdict(alternatives: Alternatives) -> str:
    """Whether a dense alternative beats the pruned network, and by how much, for people."""
    pruned, dense = alternatives.pruned, fastest_dense(alternatives)
    ratio, lower, upper = ratio_confidence(pruned.seconds, dense.seconds, CONFIDENCE)
    times = f"{_milliseconds(dense)} against {_milliseconds(pruned)} ms"
    bounds = f"{CONFIDENCE:.0%} bounds"
    if lower > 1:
        said = (
            f"The dense network in {dense.name} is {ratio:.2f}x as fast as the pruned one in {pruned.name} "
            f"({times}; {bounds} {lower:.2f} to {upper:.2f}): "
        )
        return said + (
            f"rather deploy that, if its accuracy in {dense.environment.precision} is good enough."
            if dense.environment.precision != pruned.environment.precision
            else "rather deploy that, which loses no accuracy."
        )
    if upper < 1:
        return (
            f"The pruned network in {pruned.name} beats every dense alternative that was measured: it is "
            f"{1 / ratio:.2f}x as fast as the best of them, {dense.name} ({_milliseconds(pruned)} against "
            f"{_milliseconds(dense)} ms; {bounds} {1 / upper:.2f} to {1 / lower:.2f})."
        )
    return (
        f"The pruned network in {pruned.name} and the dense one in {dense.name} can't be told apart "
        f"({_milliseconds(pruned)} against {_milliseconds(dense)} ms; {bounds} of their ratio {1 / upper:.2f} to "
        f"{1 / lower:.2f}): pruning buys no speed over that."
    )


def _others(runtime: Runtime, environment: Environment) -> list[str]:
    if environment.is_formula:  # its seconds are no time: they compare with nothing else
        return []
    return [location(runtime) + spec for spec in BASELINES if location(runtime) + spec != runtime_spec(runtime)]


def _open_other(stack: contextlib.ExitStack, spec: str, dense: Path, workload: Workload) -> Session:
    """The dense network in another runtime, which has run it once."""
    # A comparison must not make a user fetch an engine, nor agree to its licence.
    options = {"download": False} if spec.rpartition("/")[2] == "deepsparse" else {}
    runtime = stack.enter_context(open_runtime(spec, **options))
    session = stack.enter_context(runtime.open(dense, workload))
    session.seconds(1)  # some refuse a network only when it runs
    return session


def _alternative(role: str, session: Session, times: Measurement, before: Alternative | None) -> Alternative:
    """What was measured before, and this visit."""
    environment = session.environment
    visits = (*(before.seconds.seconds if before else ()), times.median)
    name = f"{environment.runtime} {environment.precision}"
    return Alternative(name, role, Measurement(visits), environment, session.fallback)


def _milliseconds(alternative: Alternative) -> str:
    """Three digits."""
    value = 1e3 * alternative.seconds.median
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
