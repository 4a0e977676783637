"""Validation: the whole network, dense and pruned, measured in turns in the runtime; the metric on both.

A machine has phases of some seconds or minutes, in which a sparse network suffers more than a dense one or less, and a
network that is opened again may find better or worse memory. Rounds that follow each other share all that and can't
see it, so the networks are visited several times, each time opened anew, and the bounds are those of the visits.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_spdy.models import fixed_batch, load_model
from onnx_spdy.models.graph import model_sha256
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.metric import Evaluation, Metric, value_of
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.rows import find_layouts, join
from onnx_spdy.runtimes import (
    Environment,
    Measurement,
    Runtime,
    Workload,
    measure_interleaved,
    measure_undisturbed,
    median_bounds,
    median_ratio,
    open_runtime,
    runtime_spec,
)

VISITS = 9  # the fewest that bound a median with 95 % confidence when one on each side is an outlier
ROUNDS = 4  # of each visit
ITERATIONS = 2
WARMUP = 2  # rounds at the beginning of a visit
BUSY_WAITS_SECONDS = (1, 5, 10)  # before a disturbed visit is repeated, in all of a validation
CONFIDENCE = 0.95
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Validation:
    """A measured speedup.

    Attributes:
        speedup: median over the visits of dense seconds / pruned seconds.
        lower, upper: distribution-free 95 % bounds of that median.
        visits: (visits,) dense seconds / pruned seconds of each.
        dense, pruned: the raw rounds of all of them.
        environment: in which both were measured.
        fallback: which part of the pruned network the engine doesn't optimise, or None.
        foreign_cores: that other programs kept busy meanwhile; None if that isn't known.
    """

    speedup: float
    lower: float
    upper: float
    visits: tuple[float, ...]
    dense: Measurement
    pruned: Measurement
    environment: Environment
    fallback: str | None
    foreign_cores: float | None = None

    def with_more(self, other: Validation) -> Validation:
        """This one and another measurement of the same networks together."""
        return _of_visits(
            (*self.visits, *other.visits),
            Measurement.joined((self.dense, other.dense)),
            Measurement.joined((self.pruned, other.pruned)),
            other.environment,
            other.fallback,
            (self.foreign_cores, other.foreign_cores),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "measured_speedup": self.speedup,
            "measured_speedup_lower": self.lower,
            "measured_speedup_upper": self.upper,
            "visits": list(self.visits),
            "dense_seconds": self.dense.median,
            "pruned_seconds": self.pruned.median,
            "dense": self.dense.to_json(),
            "pruned": self.pruned.to_json(),
            "environment": self.environment.to_json(),
            "fallback": self.fallback,
            "foreign_cores": self.foreign_cores,
        }


def validate(
    dense: Path,
    pruned: Path,
    runtime: Runtime,
    workload: Workload,
    *,
    visits: int = VISITS,
    rounds: int = ROUNDS,
    progress: Progress = ignore,
) -> Validation:
    """Measure the speedup of a pruned network over its dense original, end to end, in interleaved rounds.

    A visit that other programs disturb is repeated, a few times; if they don't end, `foreign_cores` says so.

    Args:
        dense, pruned: ONNX files.
        runtime, workload: as in `Runtime.open`; the same for both.
        visits: in each, both networks are opened.
        rounds: of each visit; in each, both networks are timed.
        progress: called with (rounds done, rounds, name of the file).
    Raises:
        MeasurementError: too few visits for 95 % confidence.
    """

    def visit() -> _Visit:
        with runtime.open(dense, workload) as one, runtime.open(pruned, workload) as other:
            found = measure_interleaved(
                {"dense": one, "pruned": other}, rounds=rounds, iterations=ITERATIONS, warmup=WARMUP
            )
            return _Visit(found["dense"], found["pruned"], other.environment, other.fallback)

    waits = iter(BUSY_WAITS_SECONDS)
    found: list[_Visit] = []
    loads: list[float | None] = []
    for number in range(visits):
        one, load = measure_undisturbed(runtime, visit, lambda visit: visit.environment.cores, waits)
        found.append(one)
        loads.append(load)
        progress(rounds * (number + 1), rounds * visits, pruned.name)
    return _of_visits(
        [median_ratio(one.dense.seconds, one.pruned.seconds)[0] for one in found],
        Measurement.joined(one.dense for one in found),
        Measurement.joined(one.pruned for one in found),
        found[-1].environment,
        found[-1].fallback,
        loads,
    )


@dataclass(frozen=True)
class _Visit:
    """Both networks in turns, opened once."""

    dense: Measurement
    pruned: Measurement
    environment: Environment
    fallback: str | None


def _of_visits(
    ratios: Sequence[float],
    dense: Measurement,
    pruned: Measurement,
    environment: Environment,
    fallback: str | None,
    loads: Sequence[float | None],
) -> Validation:
    bounds = median_bounds(ratios, CONFIDENCE)
    load = max((one for one in loads if one is not None), default=None)
    return Validation(
        statistics.median(ratios), *bounds, tuple(ratios), dense, pruned, environment, fallback, load
    )  # fmt: skip


def evaluate(
    model: Path,
    samples: Samples,
    metric: Metric,
    *,
    runtime: Runtime | None = None,
    progress: Progress = ignore,
) -> float:
    """The metric of a network on evaluation samples.

    Args:
        model: an ONNX file.
        samples: all of them are used.
        metric: called once with all outputs and the target.
        runtime: what computes it; None for ONNX Runtime, in the file's own precision.
        progress: called with (samples done, samples, name of the file).
    Raises:
        MetricError: the metric returned something that isn't a finite number.
        RowsError: more samples than one batch has, and an output that doesn't tell which of it belongs to which.
        RuntimeFailure: the runtime refuses the network.
    """
    parts: list[Mapping[str, np.ndarray]] = []
    counts: list[int] = []
    with contextlib.nullcontext(runtime) if runtime else open_runtime("onnxruntime") as engine:
        size = fixed_batch(load_model(model)) or min(EVALUATION_BATCH, len(samples))
        with engine.open(model, workload_of(samples, size)) as session:
            for chunk in samples.batches(size):
                parts.append(session.run(_filled(chunk, size).inputs))
                counts.append(len(chunk))
                progress(sum(counts), len(samples), model.name)
            if counts == [size]:
                return value_of(metric, parts[0], samples.target)
            backwards = _filled(samples.take(slice(0, size)), size).take(slice(None, None, -1))
            layouts = find_layouts(parts[0], session.run(_contiguous(backwards)), size)
    return value_of(metric, join(parts, counts, layouts), samples.target)


def judge(model: Path, by: Evaluation, *, runtime: Runtime | None = None, progress: Progress = ignore) -> float:
    """The metric of a network, as `evaluate` computes it, once for each network and runtime."""
    key = (model_sha256(load_model(model)), None if runtime is None else runtime_spec(runtime))
    if key not in by.known:
        by.known[key] = evaluate(model, by.samples, by.metric, runtime=runtime, progress=progress)
    return by.known[key]


def _filled(chunk: Samples, size: int) -> Samples:
    """As many samples as a session's batch has: the last one is repeated."""
    count = len(chunk)
    return chunk.take(np.minimum(np.arange(size), count - 1)) if count < size else chunk


def _contiguous(samples: Samples) -> dict[str, np.ndarray]:
    return {name: np.require(array, requirements="C") for name, array in samples.inputs.items()}
