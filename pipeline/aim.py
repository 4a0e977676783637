"""What is settled by measuring the dense network before a run: the runtime to aim in, and the opponent to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.alternatives import (
    DENSE,
    Alternative,
    Alternatives,
    elsewhere,
    here,
    judged,
    measure_alternatives,
    open_other,
)
from onnx_spdy.pipeline.artifact import fields_of, read_json, write_json
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.level import Level, any_int8
from onnx_spdy.pipeline.metric import Evaluation
from onnx_spdy.pipeline.opponent import BEARABLE, fastest
from onnx_spdy.pipeline.progress import Watch
from onnx_spdy.pipeline.quantised.make import NOTHING, QUANTISERS, Quantised, quantise_all
from onnx_spdy.pipeline.validate import judge
from onnx_spdy.runtimes import ANY_ZEROS, Runtime, Workload, local_spec, median_ratio, resolved
from onnx_spdy.runtimes.errors import OnnxSpdyError

AUTO = "auto"
SAME, BEST = "same", "best"
FOLDER = "alternatives"  # in that of a run
VERSION = 1
QUANTISED = frozenset(name for one in QUANTISERS for name in one.specs)


class AimError(OnnxSpdyError, ValueError):
    """There is nothing to aim in, or no such opponent."""


@dataclass(frozen=True)
class Against:
    """A target against the best dense alternative.

    Attributes:
        speedup: against that.
        times: how many times as fast that is as the dense network in the runtime that was asked for.
        best, same: both of these.
    """

    speedup: float
    times: float
    best: Alternative
    same: Alternative

    @property
    def of_same(self) -> float:
        """The same target against the dense network in the runtime that was asked for."""
        return self.speedup * self.times

    def __str__(self) -> str:
        return (
            f"{self.speedup:g}x as fast as the best dense alternative ({self.best.name}, "
            f"{1e3 * self.best.seconds.median:.3g} ms) is {self.of_same:.3f}x as fast as the dense network in "
            f"{self.same.name} ({1e3 * self.same.seconds.median:.3g} ms)"
        )

    def to_json(self) -> dict[str, Any]:
        return {"asked_speedup": self.speedup, "best": self.best.in_short(), "same": self.same.in_short()}


def measure_dense(
    dense: Prepared,
    samples: Samples,
    runtime: Runtime | None,
    workload: Workload,
    model: Path,
    folder: Path,
    *,
    where: str = "",
    evaluation: Evaluation | None = None,
    watch: Watch,
) -> Alternatives:
    """The dense network in every runtime and precision; what an earlier call measured of the same is taken again.

    Args:
        dense: the network.
        samples: calibration samples.
        runtime: the one that was asked for; None for those of a CPU only.
        workload: as in `Runtime.open`.
        model: its file; its int8 files are beside it.
        folder: of the run, or of the device.
        where: what stands before the name of every other runtime: "", or "ssh://HOST/".
        evaluation: what metrics are computed on; None leaves them out.
    """
    kept = folder / FOLDER / "dense.json"
    wanted = None if runtime is None else local_spec(runtime)
    made_from = {
        "model_sha256": dense.sha256,
        "data_sha256": samples.sha256,
        "workload": resolved(dense.proto.graph, workload).digest,
        "threads": workload.threads,
        "where": where,
        "evaluation": evaluation and [evaluation.name, evaluation.samples.sha256],
    }
    quantised = NOTHING
    if runtime is None or not _is_formula(runtime, model, workload):
        quantised = quantise_all(model, samples, model.parent / FOLDER / DENSE, progress=watch.stage("quantise"))
    if kept.exists() and (found := _read(kept, made_from, model, quantised, wanted)):
        return found
    first = [] if runtime is None else [here(DENSE, model, runtime)]
    found = measure_alternatives(
        [*first, *elsewhere(DENSE, model, quantised, runtime)], runtime, workload,
        where=where, progress=watch.stage("dense"),
    )  # fmt: skip
    if evaluation:
        known = {model: judge(model, evaluation, progress=watch.stage("evaluate"))}
        found = judged(found, evaluation, known, runtime, where=where)
    named = [
        replace(one, candidate=replace(one.candidate, spec=one.candidate.spec or wanted)) for one in found.measured
    ]
    found = Alternatives(tuple(named), found.missing).without(quantised.missing)
    write_json(kept, "dense", VERSION, {"made_from": made_from, **found.to_json()})
    return found


def _is_formula(runtime: Runtime, path: Path, workload: Workload) -> bool:
    with runtime.open(path, workload) as session:
        return session.environment.is_formula


def _read(
    kept: Path, made_from: dict[str, Any], path: Path, quantised: Quantised, wanted: str | None
) -> Alternatives | None:
    """What was measured before; None where it is of something else, or not in the runtime that is wanted."""
    document = read_json(kept, "dense", VERSION)
    with fields_of(kept):
        if document["made_from"] != made_from:
            return None
        measured = tuple(
            Alternative.from_json(one, quantised.files.get(one["name"], path)) for one in document["measured"]
        )
        has = wanted is None or any(one.candidate.spec == wanted for one in measured)
        return Alternatives(measured, document["missing"]) if has else None


def fastest_runtime(found: Alternatives, levels: Sequence[Level]) -> str:
    """The fastest runtime for the dense network of those that can gain by these levels, as for `open_runtime`.

    Raises:
        AimError: there is none.
    """
    in_int8 = any_int8(levels)
    patterns = {level.pattern for level in levels if not level.is_width and not level.is_whole}

    def gains(one: Alternative) -> bool:
        if one.candidate.spec is None or (one.candidate.name in QUANTISED) != in_int8:
            return False
        known = open_other(one.candidate.spec).patterns
        return not patterns or ANY_ZEROS in known or patterns <= known

    able = [one for one in found.of(DENSE) if gains(one)]
    if not able:
        missing = "".join(f"; {name}: {why}" for name, why in found.missing.items() if name == "deepsparse")
        raise AimError(
            f"no runtime that works here has kernels for {', '.join(sorted(patterns))}: of those tried, "
            f"{', '.join(one.name for one in found.of(DENSE))} run dense networks only{missing}; "
            "take --pattern channels, or name a --runtime"
        )
    return str(fastest(able).candidate.spec)


def against_best(found: Alternatives, runtime: Runtime) -> Against:
    """A target of 1 against the best dense alternative: the fastest that loses next to nothing by the metric.

    Args:
        found: of `measure_dense`, for this runtime.
    """
    dense, wanted = found.of(DENSE), local_spec(runtime)
    same = next(one for one in dense if one.candidate.spec == wanted)
    able = [
        one
        for one in dense
        if one is same
        or one.metric is None
        or same.metric is None
        or one.metric >= same.metric - BEARABLE * abs(same.metric)
    ]
    best = fastest(able)
    visits = min(len(same.seconds.seconds), len(best.seconds.seconds))
    times = median_ratio(same.seconds.seconds[:visits], best.seconds.seconds[:visits])[0]
    return Against(1.0, max(1.0, times), best, same)
