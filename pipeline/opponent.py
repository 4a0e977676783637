"""The opponent: the dense network as a user would deploy it, and who of the two is faster."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from onnx_spdy.pipeline.alternatives import DENSE, PRUNED, Alternative, Alternatives
from onnx_spdy.runtimes import ratio_confidence

CONFIDENCE = 0.95
BEARABLE = 0.01  # of the dense metric: what a conversion of the network may cost besides what pruning cost


@dataclass(frozen=True)
class Standing:
    """The pruned network beside the best dense alternative.

    Attributes:
        pruned: it in the runtime where it is fastest; the one that was asked for, unless another is faster for sure.
        dense: the fastest dense alternative that loses no more than that, by the metric; without one, the fastest.
        times, lower, upper: how many times as fast as `dense` it is, and 95 % bounds.
        lossy: a dense alternative that is faster still, and loses more; None where there is none.
        pruned_here, dense_here: both in the runtime that was asked for.
    """

    pruned: Alternative
    dense: Alternative
    times: float
    lower: float
    upper: float
    lossy: Alternative | None
    pruned_here: Alternative
    dense_here: Alternative

    def to_json(self) -> dict[str, object]:
        return {
            "best_pruned": self.pruned.in_short(),
            "best_dense_alternative": self.dense.in_short(),
            "times_as_fast_as_best_dense": self.times,
            "times_as_fast_as_best_dense_lower": self.lower,
            "times_as_fast_as_best_dense_upper": self.upper,
        }


def standing(found: Alternatives) -> Standing:
    """Who is faster. A metric is taken for one of which more is better."""
    here, dense_here = found.pruned, found.of(DENSE)[0]
    floor = None
    if here.metric is not None and dense_here.metric is not None:
        floor = here.metric - BEARABLE * abs(dense_here.metric)
    pruned = fastest(one for one in found.of(PRUNED) if one is here or _reaches(one, floor))
    if ratio_confidence(here.seconds, pruned.seconds, CONFIDENCE)[1] <= 1:  # which can't be told apart
        pruned = here
    floor = None
    if pruned.metric is not None and dense_here.metric is not None:
        floor = min(pruned.metric, dense_here.metric)
    dense = fastest(one for one in found.of(DENSE) if _reaches(one, floor))
    quickest = fastest(found.of(DENSE))
    times, lower, upper = ratio_confidence(dense.seconds, pruned.seconds, CONFIDENCE)
    return Standing(pruned, dense, times, lower, upper, None if quickest is dense else quickest, here, dense_here)


def fastest(several: Iterable[Alternative]) -> Alternative:
    """The one with the least median seconds, of those with most visits: one alone may have met a faster machine."""
    found = list(several)
    visits = max(len(one.seconds.seconds) for one in found)
    return min((one for one in found if len(one.seconds.seconds) == visits), key=lambda one: one.seconds.median)


def _reaches(one: Alternative, floor: float | None) -> bool:
    return floor is None or one.metric is None or one.metric >= floor


def verdict(found: Standing, metric: str | None = None) -> str:
    """Whether the pruned network or a dense alternative should be deployed, in words.

    Args:
        metric: its name.
    """
    pruned, dense = found.pruned, found.dense
    times = f"{_milliseconds(dense)} against {_milliseconds(pruned)} ms"
    bounds = f"{CONFIDENCE:.0%} bounds"
    if found.upper < 1:
        return (
            f"The dense network in {dense.name} is {1 / found.times:.2f}x as fast as the pruned one in {pruned.name} "
            f"({times}; {bounds} {1 / found.upper:.2f} to {1 / found.lower:.2f}): rather deploy that, "
            f"{_at_what_loss(dense, pruned, metric)}."
        )
    if found.lower > 1:
        said = (
            f"The pruned network in {pruned.name} beats every dense alternative that was measured"
            f"{' and loses no more' if found.lossy else ''}: it is {found.times:.2f}x as fast as the best of them, "
            f"{dense.name} ({_milliseconds(pruned)} against {_milliseconds(dense)} ms; {bounds} {found.lower:.2f} to "
            f"{found.upper:.2f})."
        )
    else:
        said = (
            f"The pruned network in {pruned.name} and the dense one in {dense.name} can't be told apart "
            f"({_milliseconds(pruned)} against {_milliseconds(dense)} ms; {bounds} of their ratio {found.lower:.2f} to "
            f"{found.upper:.2f}): pruning buys no speed over that."
        )
    return said + _lossy(found, metric)


def headline(speedup: float, lower: float, upper: float, found: Standing) -> str:
    """The result in one sentence: against the dense network in the same runtime, and against the best alternative.

    Args:
        speedup, lower, upper: measured in the runtime that was asked for.
    """
    elsewhere = "" if found.pruned is found.pruned_here else f" in {found.pruned.name}, where it is fastest,"
    said = f"{speedup:.2f}x as fast as the dense network in {found.dense_here.name} ({lower:.2f} to {upper:.2f});"
    if found.times < 1:
        return (
            f"{said} the best dense alternative, {found.dense.name}, is {1 / found.times:.2f}x as fast as "
            f"this{elsewhere.removesuffix(',')} ({1 / found.upper:.2f} to {1 / found.lower:.2f})"
        )
    return (
        f"{said}{elsewhere} {found.times:.2f}x as fast as the best dense alternative, {found.dense.name} "
        f"({found.lower:.2f} to {found.upper:.2f})"
    )


def _at_what_loss(dense: Alternative, pruned: Alternative, metric: str | None) -> str:
    """Why the dense one may be deployed instead."""
    if dense.metric is not None and pruned.metric is not None:
        return f"which loses no more ({metric or 'metric'} {dense.metric:.4f}, pruned {pruned.metric:.4f})"
    if dense.environment.precision == pruned.environment.precision:
        return "which loses no accuracy"
    return f"if its accuracy in {dense.environment.precision} is good enough"


def _lossy(found: Standing, metric: str | None) -> str:
    """What is to say of a dense alternative that is faster and loses more."""
    if found.lossy is None or found.lossy.metric is None or found.pruned.metric is None:
        return ""
    return (
        f" Dense {found.lossy.name} takes {_milliseconds(found.lossy)} ms and loses more ({metric or 'metric'} "
        f"{found.lossy.metric:.4f}, pruned {found.pruned.metric:.4f})."
    )


def _milliseconds(alternative: Alternative) -> str:
    """Three digits."""
    value = 1e3 * alternative.seconds.median
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
