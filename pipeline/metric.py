"""Metrics of a whole network on evaluation samples, computed by ONNX Runtime on the written file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Metric = Callable[[Mapping[str, np.ndarray], np.ndarray | None], float]


class MetricError(ValueError):
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
