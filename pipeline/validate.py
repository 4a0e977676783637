"""Validation: the whole network, dense and pruned, measured in turns in the runtime; the metric on both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_spdy.models import fixed_batch, load_model
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.metric import Metric, MetricError
from onnx_spdy.runtimes import Environment, Measurement, Runtime, measure_interleaved, open_runtime, ratio_confidence

ROUNDS = 40
ITERATIONS = 2
CONFIDENCE = 0.95
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Validation:
    """A measured speedup.

    Attributes:
        speedup: median over the rounds of dense seconds / pruned seconds.
        lower, upper: distribution-free 95 % bounds of that median.
        dense, pruned: the raw rounds.
        environment: in which both were measured.
        fallback: which part of the pruned network the engine doesn't optimise, or None.
        foreign_cores: that other programs kept busy meanwhile; None if that isn't known.
    """

    speedup: float
    lower: float
    upper: float
    dense: Measurement
    pruned: Measurement
    environment: Environment
    fallback: str | None
    foreign_cores: float | None = None

    def with_more(self, other: Validation) -> Validation:
        """This one and another measurement of the same networks together."""
        dense = Measurement((*self.dense.seconds, *other.dense.seconds), self.dense.warmup_seconds)
        pruned = Measurement((*self.pruned.seconds, *other.pruned.seconds), self.pruned.warmup_seconds)
        bounds = ratio_confidence(dense, pruned, CONFIDENCE)
        loads = [one for one in (self.foreign_cores, other.foreign_cores) if one is not None]
        return Validation(*bounds, dense, pruned, other.environment, other.fallback, max(loads, default=None))

    def to_json(self) -> dict[str, Any]:
        return {
            "measured_speedup": self.speedup,
            "measured_speedup_lower": self.lower,
            "measured_speedup_upper": self.upper,
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
    *,
    batch: int,
    threads: int | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Measure the speedup of a pruned network over its dense original, end to end, in interleaved rounds.

    Args:
        dense, pruned: ONNX files.
        runtime, batch, threads, inputs: as in `Runtime.open`; the same for both.
        rounds: in each, both networks are timed.
        progress: called with (rounds done, rounds).
    """
    arguments: dict[str, Any] = {"batch": batch, "threads": threads, "inputs": inputs}
    with runtime.open(dense, **arguments) as one, runtime.open(pruned, **arguments) as other:
        runtime.foreign_cores()  # the count starts
        times = measure_interleaved(
            {"dense": one, "pruned": other}, rounds=rounds, iterations=ITERATIONS, progress=progress
        )
        speedup, lower, upper = ratio_confidence(times["dense"], times["pruned"], CONFIDENCE)
        return Validation(
            speedup, lower, upper, times["dense"], times["pruned"], other.environment, other.fallback,
            runtime.foreign_cores(),
        )  # fmt: skip


def evaluate(
    model: Path,
    samples: Samples,
    metric: Metric,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """The metric of a network on evaluation samples, computed by ONNX Runtime in the file's own precision.

    Args:
        model: an ONNX file.
        samples: all of them are used.
        metric: called once with all outputs and the target.
        progress: called with (samples done, samples).
    Raises:
        MetricError: the metric returned something that isn't a finite number.
    """
    parts: list[dict[str, np.ndarray]] = []
    done = 0
    with open_runtime("onnxruntime") as runtime:
        size = fixed_batch(load_model(model)) or min(EVALUATION_BATCH, len(samples))
        with runtime.open(model, batch=size, inputs=samples.take(slice(0, size)).inputs) as session:
            for chunk in samples.batches(size):
                parts.append(_run_padded(session.run, chunk, size))
                done += len(chunk)
                if progress:
                    progress(done, len(samples))
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    value = float(metric(outputs, samples.target))
    if not np.isfinite(value):
        raise MetricError(f"the metric returned {value}; it must be a finite number")
    return value


def _run_padded(run: Callable[..., dict[str, np.ndarray]], chunk: Samples, size: int) -> dict[str, np.ndarray]:
    """Run a chunk in a session of fixed batch: the last one is filled up with its own last sample."""
    count = len(chunk)
    filled = chunk.take(np.minimum(np.arange(size), count - 1)) if count < size else chunk
    return {name: value[:count] if value.shape[:1] == (size,) else value for name, value in run(filled.inputs).items()}
