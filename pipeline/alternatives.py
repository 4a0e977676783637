"""Alternatives: would the network as it was, in another engine or precision, be faster than the pruned one?

A speedup is told against the dense network in the same runtime and precision. That is what pruning won, but not what a
user should deploy: on a CPU with bf16 or int8 instructions the dense network in one of those may well beat a sparse one
in fp32. So the pruned network and every dense choice of this machine are measured side by side. A network of fewer
units runs everywhere, so it is measured everywhere too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx_spdy.pipeline.metric import Evaluation
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.quantised.make import QUANTISERS, Quantised
from onnx_spdy.pipeline.validate import judge
from onnx_spdy.runtimes import (
    FORMULA,
    Environment,
    Measurement,
    Runtime,
    RuntimeFailure,
    Session,
    Workload,
    local_spec,
    measure_interleaved,
    open_runtime,
)
from onnx_spdy.runtimes.errors import OnnxSpdyError

VISITS = 6
ROUNDS = 3  # of each visit
ITERATIONS = 2
WARMUP = 2
LONG_SECONDS = 0.03  # of a run that is timed once a round
HOPELESS = 1.5  # times as slow as what is at least as good: measured once
DENSE, PRUNED = "dense", "pruned"
FULL_PRECISION = ("fp32", FORMULA)
BASELINES = ("deepsparse", "onnxruntime", "openvino:fp32", "openvino:bf16")


class AlternativesError(OnnxSpdyError, RuntimeError):
    """No engine runs a network."""


@dataclass(frozen=True)
class Candidate:
    """A network as it could be deployed.

    Attributes:
        role: "dense" or "pruned"; or the name of a file, where files are compared.
        name: runtime and precision, for people.
        spec: the runtime, as for `open_runtime`, without its machine; None for the one that was asked for.
        path: an ONNX file.
        quantiser: the tool that made its file of one in floating point; None where none did.
    """

    role: str
    name: str
    spec: str | None
    path: Path
    quantiser: str | None = None

    @property
    def label(self) -> str:
        """What it is called where it is missing; of a dense one that is its name alone."""
        return self.name if self.role == DENSE else f"{self.role} {self.name}"


@dataclass(frozen=True)
class Alternative:
    """What one of them measured.

    Attributes:
        candidate: what it is.
        seconds: one median for each visit; in a visit, all alternatives are opened and measured in turns.
        environment: in which it was measured.
        fallback: which part the engine doesn't optimise and why, or None.
        metric: on the evaluation samples, computed by that engine; None without them.
    """

    candidate: Candidate
    seconds: Measurement
    environment: Environment
    fallback: str | None = None
    metric: float | None = None

    @property
    def role(self) -> str:
        return self.candidate.role

    @property
    def name(self) -> str:
        """Runtime and precision, such as "openvino bf16", and who quantised it where that wasn't done here."""
        by = f" by {self.candidate.quantiser}" if self.candidate.quantiser and self.role == PRUNED else ""
        return f"{self.environment.runtime} {self.environment.precision}{by}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "spec": self.candidate.spec,
            "median_seconds": self.seconds.median,
            **self.seconds.to_json(),
            "metric": self.metric,
            "environment": self.environment.to_json(),
            "fallback": self.fallback,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any], path: Path) -> Alternative:
        """The one that `to_json` wrote, of this file."""
        return cls(
            Candidate(document["role"], document["name"], document["spec"], path),
            Measurement(tuple(document["seconds"]), tuple(document["warmup_seconds"])),
            Environment.from_json(document["environment"]),
            document["fallback"],
            document["metric"],
        )

    def in_short(self) -> dict[str, Any]:
        """What tells it from others, for a report."""
        return {
            "runtime": self.environment.runtime,
            "precision": self.environment.precision,
            "seconds": self.seconds.median,
            "metric": self.metric,
        }


@dataclass(frozen=True)
class Alternatives:
    """What was measured, and why others were not.

    Attributes:
        measured: those in the runtime that was asked for come first.
        missing: label of a candidate -> why it wasn't measured: its runtime isn't there or refuses the network, or
            the network couldn't be made.
    """

    measured: tuple[Alternative, ...]
    missing: Mapping[str, str]

    @property
    def pruned(self) -> Alternative:
        """The pruned network in the runtime that was asked for."""
        return next(one for one in self.measured if one.role == PRUNED)

    def of(self, role: str) -> list[Alternative]:
        """The dense ones, or the pruned ones."""
        return [one for one in self.measured if one.role == role]

    def without(self, missing: Mapping[str, str]) -> Alternatives:
        """These, and why others couldn't be made."""
        return replace(self, missing={**self.missing, **missing})

    def to_json(self) -> dict[str, Any]:
        return {"measured": [one.to_json() for one in self.measured], "missing": dict(self.missing)}


def here(role: str, path: Path, runtime: Runtime) -> Candidate:
    """A network in the runtime that was asked for."""
    return Candidate(role, local_spec(runtime).replace(":", " "), None, path)


def elsewhere(role: str, path: Path, quantised: Quantised, runtime: Runtime | None = None) -> list[Candidate]:
    """A network in every other runtime and precision of a CPU: in floating point, and in int8 where there is a file."""
    floating = [
        Candidate(role, spec.replace(":", " "), spec, path)
        for spec in BASELINES
        if runtime is None or spec != local_spec(runtime)
    ]
    return floating + [
        Candidate(role, name, spec, quantised.files[one.name], one.packages[0])
        for one in QUANTISERS
        if one.name in quantised.files
        for name, spec in one.specs.items()
    ]


def measure_alternatives(
    candidates: Sequence[Candidate],
    runtime: Runtime | None,
    workload: Workload,
    *,
    where: str = "",
    visits: int = VISITS,
    progress: Progress = ignore,
) -> Alternatives:
    """Measure networks in turns.

    Args:
        candidates: those of `runtime` first.
        runtime: the one that was asked for; None where no candidate needs it.
        workload: as in `Runtime.open`; the same for all.
        where: what stands before the name of every other runtime: "", or "ssh://HOST/".
        visits: in each, every network is opened anew; see `validate`. What can't be the best after the first one,
            because something that loses no more is much faster, is left out of the others.
        progress: called with (visits done, visits, note).
    Raises:
        RuntimeFailure: of `runtime`; another one that fails is in `missing`.
    """
    missing: dict[str, str] = {}
    measured: dict[Candidate, Alternative] = {}
    hopeless: set[Candidate] = set()
    done = 0
    while done < visits:
        with contextlib.ExitStack() as stack:
            sessions: dict[Candidate, Session] = {}
            longest = 0.0
            engines: dict[str | None, Runtime | None] = {None: runtime}
            for one in candidates:
                # Times of a formula compare with nothing else.
                if one.spec and any(s.environment.is_formula for s in sessions.values()):
                    continue
                if one.label in missing or one in hopeless:
                    continue
                try:
                    if one.spec not in engines:
                        engines[one.spec] = stack.enter_context(open_other(f"{where}{one.spec}"))
                    sessions[one], seconds = _open(stack, engines[one.spec], one.path, workload)
                    longest = max(longest, seconds)
                except RuntimeFailure as exc:
                    if one.spec is None:
                        raise
                    missing[one.label] = str(exc)
            if not sessions:
                return Alternatives((), missing)
            try:
                times = measure_interleaved(
                    {str(number): session for number, session in enumerate(sessions.values())},
                    rounds=ROUNDS, iterations=1 if longest > LONG_SECONDS else ITERATIONS, warmup=WARMUP,
                )  # fmt: skip
            except RuntimeFailure:
                if not (ended := _ended(sessions)):
                    raise
                missing |= ended
                continue  # this visit again, without them
            measured |= {
                one: _alternative(one, session, times[str(number)], measured.get(one))
                for number, (one, session) in enumerate(sessions.items())
            }
        measured = {one: found for one, found in measured.items() if one.label not in missing}
        if done == 0:
            hopeless = _hopeless(measured.values())
        done += 1
        progress(done, visits, "every runtime and precision")
    return Alternatives(tuple(measured.values()), missing)


def open_other(spec: str) -> Runtime:
    """A runtime to compare with; nobody is made to fetch one, nor to agree to its licence."""
    options = {"download": False} if spec.rpartition("/")[2] == "deepsparse" else {}
    return open_runtime(spec, **options)


def judged(
    found: Alternatives,
    evaluation: Evaluation,
    known: Mapping[Path, float],
    runtime: Runtime | None,
    *,
    where: str = "",
    progress: Progress = ignore,
) -> Alternatives:
    """Each with its metric, computed by the engine that it was measured in.

    One that has no metric there is no alternative, and is in `missing`.

    Args:
        evaluation: samples and metric.
        known: the metric of files that were evaluated in the precision that they are stored in: it serves for all
            engines that compute in fp32, and where the runtime that was asked for can't run these samples.
        runtime, where: as in `measure_alternatives`.
        progress: called with (alternatives done, alternatives, name).
    """
    measured, missing = [], dict(found.missing)
    for number, one in enumerate(found.measured):
        progress(number, len(found.measured), one.candidate.label)
        path, spec = one.candidate.path, one.candidate.spec
        try:
            if path in known and one.environment.precision in FULL_PRECISION:
                metric = known[path]
            elif spec is None:
                metric = judge(path, evaluation, runtime=runtime)
            else:
                with open_other(f"{where}{spec}") as engine:
                    metric = judge(path, evaluation, runtime=engine)
        except OnnxSpdyError as exc:
            if spec is not None:
                missing[one.candidate.label] = f"no {evaluation.name}: {exc}"
                continue
            metric = known[path]
        measured.append(replace(one, metric=metric))
    return Alternatives(tuple(measured), missing)


def _hopeless(measured: Iterable[Alternative]) -> set[Candidate]:
    """Those that are much slower than one that loses no more: the dense network in full precision, the pruned one in
    the runtime that was asked for."""
    found: set[Candidate] = set()
    for role in (DENSE, PRUNED):
        several = [one for one in measured if one.role == role]
        safe = [
            one
            for one in several
            if one.candidate.spec is None or (role == DENSE and one.environment.precision in FULL_PRECISION)
        ]
        bound = HOPELESS * min((one.seconds.median for one in safe), default=math.inf)
        found |= {one.candidate for one in several if one.candidate.spec and one.seconds.median > bound}
    return found


def _open(
    stack: contextlib.ExitStack, runtime: Runtime | None, path: Path, workload: Workload
) -> tuple[Session, float]:
    """A network in a runtime, which has run it, and the seconds of a run."""
    assert runtime is not None, "a candidate without a runtime of its own needs the one that was asked for"
    session = stack.enter_context(runtime.open(path, workload))
    (seconds,) = session.seconds(1)  # some refuse a network only when it runs
    return session, seconds


def _ended(sessions: Mapping[Candidate, Session]) -> dict[str, str]:
    """Label of each candidate whose engine ended while it was measured -> why.

    Raises:
        RuntimeFailure: of the runtime that was asked for.
    """
    found = {}
    for one, session in sessions.items():
        try:
            session.seconds(1)
        except RuntimeFailure as exc:
            if one.spec is None:
                raise
            found[one.label] = str(exc)
    return found


def _alternative(candidate: Candidate, session: Session, times: Measurement, before: Alternative | None) -> Alternative:
    """What was measured before, and this visit."""
    visits = (*(before.seconds.seconds if before else ()), times.median)
    return Alternative(candidate, Measurement(visits), session.environment, session.fallback)
