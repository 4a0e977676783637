"""Seconds and what may be said of them: distribution-free bounds, and rounds that interleave sessions.

Run times are skewed, drift, and have outliers that no model describes, so nothing here assumes a
distribution: bounds of a median are order statistics of the samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .base import MeasurementError, Session

SETTLE_WINDOW_ROUNDS = 4
SETTLE_TOLERANCE = 0.03
MAD_TO_SIGMA = 1.4826  # so that `spread` of normal noise is its relative standard deviation


@dataclass(frozen=True)
class Measurement:
    """Raw wall seconds of one network, one value a round; the warm-up is kept apart and never used."""

    seconds: tuple[float, ...]
    warmup_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.seconds:
            raise MeasurementError("a measurement of 0 rounds; measure at least one")
        if wrong := [value for value in self.seconds if not (math.isfinite(value) and value > 0)]:
            raise MeasurementError(f"a measurement with {wrong[0]} seconds; times are finite and positive")

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """1.4826 * median absolute deviation / median: relative noise, deaf to outliers."""
        median = self.median
        return MAD_TO_SIGMA * statistics.median(abs(value - median) for value in self.seconds) / median

    @classmethod
    def joined(cls, parts: Iterable[Measurement]) -> Measurement:
        """All rounds of several measurements, and all their warm-ups."""
        several = list(parts)
        return cls(
            tuple(value for one in several for value in one.seconds),
            tuple(value for one in several for value in one.warmup_seconds),
        )

    def to_json(self) -> dict[str, Any]:
        """This measurement as a dict that `json.dumps` accepts."""
        return {"seconds": list(self.seconds), "warmup_seconds": list(self.warmup_seconds)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_json` wrote.

        Raises:
            MeasurementError: a field is missing or unknown; the message names it.
        """
        if wrong := {"seconds", "warmup_seconds"} ^ set(document):
            raise MeasurementError(f"a measurement with missing or unknown fields {sorted(wrong)}; measure again")
        return cls(tuple(document["seconds"]), tuple(document["warmup_seconds"]))


def median_bounds(values: Sequence[float], level: float) -> tuple[float, float]:
    """Order statistics x(k), x(n - k + 1) around the median, with the largest k that keeps `level`.

    The number of values below the true median is Binomial(n, 1/2) whatever the distribution, so
    the interval misses with probability 2 * P(Binomial(n, 1/2) < k).
    Raises:
        MeasurementError: too few values for that level; the message says how many are needed.

    Source: David & Nagaraja, Order Statistics (3rd edition), section 7.1.
    """
    if not 0 < level < 1:
        raise MeasurementError(f"confidence level {level} is not between 0 and 1")
    allowed_miss = (1 - level) / 2
    count, ways, k = len(values), 0, 0
    while k < count // 2 and (ways + math.comb(count, k)) / 2**count <= allowed_miss:
        ways += math.comb(count, k)
        k += 1
    if k == 0:
        needed = math.ceil(1 - math.log2(1 - level))
        raise MeasurementError(f"{count} rounds can't give {level:.0%} confidence; measure at least {needed}")
    ordered = sorted(values)
    return ordered[k - 1], ordered[count - k]


def ratio_confidence(dense: Measurement, pruned: Measurement, level: float = 0.95) -> tuple[float, float, float]:
    """Speedup of `pruned` over `dense` from paired rounds, with distribution-free bounds.

    Round i of both was measured back to back, so drift of the machine cancels in its ratio.

    Returns:
        (ratio, lower, upper): the median of the per-round dense / pruned, and bounds that hold the
        true median with at least `level` confidence.
    Raises:
        MeasurementError: the rounds don't pair up, or are too few for that level.
    """
    if len(dense.seconds) != len(pruned.seconds):
        raise MeasurementError(
            f"{len(dense.seconds)} dense and {len(pruned.seconds)} pruned rounds don't pair up; measure interleaved"
        )
    logs = [math.log(slow / fast) for slow, fast in zip(dense.seconds, pruned.seconds, strict=True)]
    lower, upper = median_bounds(logs, level)
    return math.exp(statistics.median(logs)), math.exp(lower), math.exp(upper)


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float]:
    """Median of slow / fast over rounds that pair up, and its standard error by the log's median absolute deviation.

    Returns:
        (ratio, error): `error` is relative, and that of the median of normal values.
    """
    logs = [math.log(one / other) for one, other in zip(slow, fast, strict=True)]
    middle = statistics.median(logs)
    deviation = MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in logs)
    return math.exp(middle), deviation * math.sqrt(math.pi / 2 / len(logs))


def measure_interleaved(
    sessions: Mapping[str, Session],
    *,
    rounds: int,
    iterations: int = 1,
    warmup: int = 30,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measurement]:
    """Time several sessions in turns, so that whatever disturbs the machine disturbs all of them.

    Every turn starts with one untimed run: the other sessions have just emptied the caches, and what
    counts is a network that runs again and again.

    Args:
        sessions: by name; a rotating one goes first in each round.
        rounds: measured rounds; value i of every measurement belongs to round i.
        iterations: timed runs a turn; the turn counts with their median.
        warmup: at most this many rounds before, until every session's median over
            SETTLE_WINDOW_ROUNDS rounds is within SETTLE_TOLERANCE of the one before.
        progress: called with (measured rounds done, rounds).
    Raises:
        MeasurementError: no session, or fewer than one round or iteration.
    """
    if not sessions or rounds < 1 or iterations < 1 or warmup < 0:
        raise MeasurementError(f"can't measure {len(sessions)} sessions in {rounds=} of {iterations=} after {warmup=}")
    names = list(sessions)

    def one_round(number: int, into: dict[str, list[float]]) -> None:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            into[name].append(statistics.median(sessions[name].seconds(iterations, warmup=1)))

    warm: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup):
        one_round(number, warm)
        if all(_settled(values) for values in warm.values()):
            break
    measured: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        one_round(number, measured)
        if progress:
            progress(number + 1, rounds)
    return {name: Measurement(tuple(measured[name]), tuple(warm[name])) for name in names}


def _settled(values: Sequence[float]) -> bool:
    if len(values) < 2 * SETTLE_WINDOW_ROUNDS:
        return False
    before = statistics.median(values[-2 * SETTLE_WINDOW_ROUNDS : -SETTLE_WINDOW_ROUNDS])
    return abs(statistics.median(values[-SETTLE_WINDOW_ROUNDS:]) / before - 1) <= SETTLE_TOLERANCE
