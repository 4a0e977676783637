from __future__ import annotations

import itertools
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from onnx_spdy.runtimes import Environment, Measurement, measure_interleaved, ratio_confidence
from onnx_spdy.runtimes.measurement import median_bounds

ENVIRONMENT = Environment("r", "1", "fp32", "cpu", "avx2", 2, 2, 1, "host", (("NM_ARCH", "avx2"),))


@pytest.mark.parametrize("count", range(1, 13))
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_median_bounds_are_the_tightest_that_keep_the_level(count, level):
    """Brute force over every way in which the samples fall below or above the true median."""

    def coverage(k):
        below = [sum(way) for way in itertools.product((0, 1), repeat=count)]
        return sum(k <= number <= count - k for number in below) / len(below)

    ranks = [k for k in range(1, count // 2 + 1) if coverage(k) >= level]
    if ranks:
        assert median_bounds(range(1, count + 1), level) == (max(ranks), count + 1 - max(ranks))
    else:
        with pytest.raises(ValueError, match="measure at least"):
            median_bounds(range(count), level)


def test_the_number_of_rounds_asked_for_is_enough():
    with pytest.raises(ValueError, match="at least 6"):
        median_bounds((1.0,) * 5, 0.95)
    assert median_bounds((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 0.95) == (1.0, 6.0)


def test_paired_bounds_hold_the_speedup_under_skewed_noise_and_drift():
    random = np.random.default_rng(0)
    speedup, rounds, held = 2.0, 25, 0
    for _ in range(400):
        drift = np.exp(np.cumsum(0.1 * random.standard_normal(rounds)))
        dense = 2.0 * drift * np.exp(0.05 * random.exponential(size=rounds))
        pruned = 1.0 * drift * np.exp(0.05 * random.exponential(size=rounds))
        ratio, lower, upper = ratio_confidence(Measurement(tuple(dense)), Measurement(tuple(pruned)))
        assert lower <= ratio <= upper
        assert upper / lower < 1.2  # the drift of about exp(0.5) has cancelled
        held += lower <= speedup <= upper
    assert held / 400 >= 0.94


def test_unpaired_rounds_are_an_error():
    with pytest.raises(ValueError, match="6 dense and 7 pruned"):
        ratio_confidence(Measurement((1.0,) * 6), Measurement((1.0,) * 7))


def test_statistics_of_a_measurement():
    measured = Measurement((1.0, 2.0, 3.0, 4.0, 100.0), (9.0,))
    assert measured.median == 3.0
    assert measured.spread == pytest.approx(1.4826 * 1.0 / 3.0)
    assert Measurement.from_json(json.loads(json.dumps(measured.to_json()))) == measured
    other = Measurement((6.0,), (8.0, 7.0))
    assert Measurement.joined((measured, other)) == Measurement((*measured.seconds, 6.0), (9.0, 8.0, 7.0))
    noise = np.random.default_rng(0).normal(1, 0.05, 4000)
    assert Measurement(tuple(noise)).spread == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("seconds", [(), (0.0,), (1.0, math.nan), (-1.0,)])
def test_impossible_times_are_refused(seconds):
    with pytest.raises(ValueError, match="measurement"):
        Measurement(seconds)


def test_a_mismatch_names_everything_but_the_host():
    assert ENVIRONMENT.mismatch(replace(ENVIRONMENT, host="other")) == {}
    other = replace(ENVIRONMENT, batch=2, options=())
    assert ENVIRONMENT.mismatch(other) == {"batch": (ENVIRONMENT.batch, 2), "options": (ENVIRONMENT.options, ())}


def test_a_foreign_environment_is_refused():
    document = ENVIRONMENT.to_json()
    del document["threads"]
    with pytest.raises(ValueError, match="threads"):
        Environment.from_json(document)


class Scripted:
    """A session that gives the times it was told, and notes who was asked."""

    def __init__(self, name, log, times):
        self.name, self.log, self.times = name, log, iter(times)

    def seconds(self, iterations, warmup=0):
        self.log.append((self.name, iterations, warmup))
        return [next(self.times) for _ in range(iterations)]


def test_sessions_take_turns_and_a_turn_counts_with_its_median():
    log, progress = [], []
    sessions = {name: Scripted(name, log, itertools.cycle([1.0, 5.0, 2.0])) for name in "abc"}
    measured = measure_interleaved(
        sessions, rounds=4, iterations=3, warmup=0, progress=lambda *state: progress.append(state)
    )
    assert "".join(name for name, _, _ in log) == "abcbcacababc"
    assert all(turn[1:] == (3, 1) for turn in log)
    assert all(value == Measurement((2.0,) * 4) for value in measured.values())
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_warm_up_goes_on_until_every_session_is_steady():
    falling = [1 / (1 + number) for number in range(12)]
    sessions = {
        "steady": Scripted("steady", [], itertools.repeat(1.0)),
        "late": Scripted("late", [], itertools.chain(falling, itertools.repeat(0.05))),
    }
    measured = measure_interleaved(sessions, rounds=2, warmup=100)
    warm = measured["late"].warmup_seconds
    assert 16 <= len(warm) <= 20
    assert statistics.median(warm[-4:]) == pytest.approx(statistics.median(warm[-8:-4]), rel=0.03)
    assert measured["late"].seconds == (0.05, 0.05)


def test_warm_up_is_bounded():
    growing = Scripted("growing", [], (1.1**number for number in itertools.count()))
    measured = measure_interleaved({"growing": growing}, rounds=1, warmup=9)
    assert len(measured["growing"].warmup_seconds) == 9


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="0 sessions"):
        measure_interleaved({}, rounds=1)
