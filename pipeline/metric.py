"""Metrics of a whole network on evaluation samples, computed by ONNX Runtime on the written file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.data import Samples
from onnx_spdy.runtimes.errors import OnnxSpdyError

Metric = Callable[[Mapping[str, np.ndarray], np.ndarray | None], float]


class MetricError(OnnxSpdyError, ValueError):
    """The metric does not fit the network's outputs or the data."""


def top1(outputs: Mapping[str, np.ndarray], target: np.ndarray | None) -> float:
    """Fraction of samples whose largest class score is the target's.

    Args:
        outputs: output name -> array; the first is (samples, classes).
        target: (samples,) class numbers.
    """
    name, scores = next(iter(outputs.items()))
    if target is None:
        raise MetricError("metric 'top1' needs labels; add an array 'target' to the evaluation data")
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise MetricError(
            f"metric 'top1' needs (samples, classes) and (samples,); {name!r} is {scores.shape}, target {target.shape}"
        )
    return float((scores.argmax(axis=1) == target).mean())


METRICS: dict[str, Metric] = {"top1": top1}


@dataclass(frozen=True)
class Evaluation:
    """What a network is judged by: samples that nothing was tuned on, and a metric with its name."""

    samples: Samples
    metric: Metric
    name: str


@dataclass(frozen=True)
class Metrics:
    """The metric of the dense and of the pruned network."""

    name: str
    dense: float
    pruned: float
