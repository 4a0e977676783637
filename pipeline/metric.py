"""Metrics of a whole network on evaluation samples, computed by ONNX Runtime on the written file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from onnx_spdy.pipeline.data import Samples
from onnx_spdy.runtimes.errors import OnnxSpdyError

Metric = Callable[[Mapping[str, np.ndarray], np.ndarray | None], float]


class MetricError(OnnxSpdyError, ValueError):
    """The metric does not fit the network's outputs or the data."""


def top1(outputs: Mapping[str, np.ndarray], target: np.ndarray | None) -> float:
    """Fraction of samples whose largest class score is the target's.

    Args:
        outputs: output name -> array; the first one of floating point is (samples, classes).
        target: (samples,) class numbers.
    """
    floating = ((name, values) for name, values in outputs.items() if values.dtype.kind == "f")
    name, scores = next(floating, next(iter(outputs.items())))
    if target is None:
        raise MetricError("metric 'top1' needs labels; add an array 'target' to the evaluation data")
    if scores.ndim != 2 or target.shape != scores.shape[:1]:
        raise MetricError(
            f"metric 'top1' needs (samples, classes) and (samples,); {name!r} is {scores.shape}, target {target.shape}"
        )
    if target.dtype.kind not in "iub" and not (target.dtype.kind == "f" and np.array_equal(target, target.round())):
        raise MetricError(f"metric 'top1' needs class numbers, target holds {target.dtype}; number the classes from 0")
    if not 0 <= target.min() <= target.max() < scores.shape[1]:
        raise MetricError(
            f"metric 'top1' needs class numbers of 0..{scores.shape[1] - 1}, target has {target.min()}..{target.max()}"
        )
    return float((scores.argmax(axis=1) == target).mean())


METRICS: dict[str, Metric] = {"top1": top1}


def value_of(metric: Metric, outputs: Mapping[str, np.ndarray], target: np.ndarray | None) -> float:
    """What the metric gives for copies of the outputs and the target, so that it may change them.

    Raises:
        MetricError: it isn't one finite number.
    """
    result: Any = metric(
        {name: values.copy() for name, values in outputs.items()}, None if target is None else target.copy()
    )
    if isinstance(result, torch.Tensor):
        result = result.detach().cpu().float().numpy()
    array = np.asarray(result) if isinstance(result, (int, float, np.generic, np.ndarray)) else None
    if array is None or array.size != 1 or array.dtype.kind not in "fiu":
        what = f"shape {array.shape}, {array.dtype}" if array is not None else repr(result)[:40]
        raise MetricError(f"the metric returned {type(result).__name__} ({what}); it must return one finite number")
    value = float(array.reshape(()))
    if not np.isfinite(value):
        raise MetricError(f"the metric returned {value}; it must return one finite number")
    return value


@dataclass(frozen=True)
class Evaluation:
    """What a network is judged by: samples that nothing was tuned on, and a metric with its name.

    Attributes:
        known: (sha256 of a network, runtime that computed it) -> metric, so that nothing is computed twice.
    """

    samples: Samples
    metric: Metric
    name: str
    known: dict[tuple[str, str | None], float] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Metrics:
    """The metric of the dense and of the pruned network."""

    name: str
    dense: float
    pruned: float
