"""The closed loop against engines that the table is wrong about."""

import dataclasses
import statistics

import numpy as np
import pytest

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.target import OVERSHOOT, meet_target
from onnx_spdy.pipeline.validate import CONFIDENCE, Validation
from onnx_spdy.runtimes import Environment, Measurement, median_bounds

ENVIRONMENT = Environment("fake", "1", "formula", "cpu", "none", 1, 1, 1, "host")


def profile(speedup: float, target: float = 2.0) -> Profile:
    """A profile that the table says is so fast; faster ones lose more."""
    levels = {"layer": Level("unstructured", round(1 - 1 / (1 + speedup), 4))}
    return Profile(
        levels, target, speedup, 1 / speedup, speedup, speedup**2, "kl", None, "spdy", 1, 1, "finished", 0, None, {}
    )


class Engine:
    """Measures a fixed factor of what the table predicts, with noise; remembers what it was asked."""

    def __init__(self, factor: float, noise: float = 0.0, highest: float = 10.0) -> None:
        self.factor, self.noise, self.highest = factor, noise, highest
        self.rng = np.random.default_rng(0)
        self.deployed: list[Profile] = []

    def deploy_and_measure(self, one: Profile) -> Validation:
        self.deployed.append(one)
        speedup = one.table_target * self.factor * (1 + self.noise * self.rng.normal())
        times = Measurement((1.0,) * 6), Measurement((1 / speedup,) * 6)
        bounds = speedup * (1 - self.noise), speedup * (1 + self.noise)
        return Validation(speedup, *bounds, (speedup,) * 6, *times, ENVIRONMENT, None)

    def search(self, speedup: float) -> Profile:
        return profile(min(speedup, self.highest))


@pytest.mark.parametrize("factor", [0.7, 0.85, 1.0, 1.02, 1.3])
def test_a_table_that_is_wrong_by_a_factor_is_corrected(factor: float) -> None:
    engine = Engine(factor)
    outcome = meet_target(2.0, profile(2.0), engine.search, engine.deploy_and_measure)
    kept, attempts = outcome.kept, outcome.attempts
    assert 2.0 <= kept.validation.lower <= 2.0 * (1 + OVERSHOOT)
    assert len(attempts) <= 2
    assert engine.deployed[-1] is kept.profile


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_noise_does_not_break_the_promise(factor: float) -> None:
    engine = Engine(factor, noise=0.01)
    kept = meet_target(2.0, profile(2.0), engine.search, engine.deploy_and_measure).kept
    assert kept.validation.lower >= 2.0
    assert dict(engine.deployed[-1].levels) == dict(kept.profile.levels)


def test_what_can_not_be_reached_ends_with_the_fastest_that_was_measured() -> None:
    engine = Engine(0.5, highest=2.5)
    outcome = meet_target(2.0, profile(2.0), engine.search, engine.deploy_and_measure)
    kept, attempts = outcome.kept, outcome.attempts
    assert not kept.meets(2.0)
    assert kept.profile.table_target == 2.5
    assert kept.validation.lower == max(one.validation.lower for one in attempts)
    assert "a speedup of 2 was not reached: the fastest profile measured 1.250" in (outcome.missed(2.0) or "")
    assert outcome.missed(1.25) is None


def test_among_those_that_meet_the_target_the_least_loss_is_kept_and_deployed() -> None:
    answers = iter([1.9, 2.5, 1.95, 2.2, 1.9, 1.9, 9.9])
    deployed = []

    def deploy_and_measure(one: Profile) -> Validation:
        deployed.append(one)
        speedup = next(answers)
        return dataclasses.replace(
            Engine(1.0).deploy_and_measure(one), speedup=speedup, lower=speedup, upper=speedup, visits=(speedup,) * 6
        )

    outcome = meet_target(2.0, profile(2.0), profile, deploy_and_measure, attempts=6)
    kept, attempts = outcome.kept, outcome.attempts
    meeting = [one for one in attempts if one.meets(2.0)]
    assert kept.profile.loss == min(one.profile.loss for one in meeting)
    assert deployed[-1] is kept.profile
    # It was measured afresh at the end, and only that counts.
    assert kept.validation.visits == (9.9,) * 6


def test_what_is_fast_enough_but_not_surely_is_measured_longer() -> None:
    visits = iter([(1.9,) * 3 + (2.04,) * 6, (1.9,) * 3 + (2.03,) * 6, (2.05,) * 9])
    engine = Engine(1.0)

    def deploy_and_measure(one: Profile) -> Validation:
        ratios = next(visits)
        bounds = median_bounds(ratios, CONFIDENCE)
        return dataclasses.replace(
            engine.deploy_and_measure(one),
            speedup=statistics.median(ratios),
            lower=bounds[0],
            upper=bounds[1],
            visits=ratios,
        )

    outcome = meet_target(2.0, profile(2.0), profile, deploy_and_measure)
    assert [one.profile.table_target for one in outcome.attempts] == [2.0]
    assert [one.table_target for one in engine.deployed] == [2.0, 2.0, 2.0]
    assert outcome.kept.validation.lower == 2.03
    assert len(outcome.kept.validation.visits) == 18  # afresh: the first 9 don't count


def test_where_steps_are_coarse_the_next_one_is_taken() -> None:
    """A profile that is a little faster than was asked for, and measures a little too slow: the same again won't do."""
    engine = Engine(0.98)

    def search(speedup: float) -> Profile:
        step = next(one for one in (2.0, 2.2, 2.6, 3.0) if one >= speedup)
        return dataclasses.replace(profile(step), table_target=speedup, predicted_speedup=step)

    def deploy_and_measure(one: Profile) -> Validation:
        return engine.deploy_and_measure(dataclasses.replace(one, table_target=one.predicted_speedup))

    outcome = meet_target(2.0, search(1.9), search, deploy_and_measure)
    assert outcome.kept.validation.lower >= 2.0
    assert outcome.kept.profile.predicted_speedup == 2.2


def test_a_jump_of_the_engine_is_bracketed() -> None:
    """The engine is slower than the table below 2.2, and much faster above: scaling alone would never end."""
    engine = Engine(1.0)
    asked: list[float] = []

    def search(speedup: float) -> Profile:
        asked.append(speedup)
        return profile(speedup)

    def deploy_and_measure(one: Profile) -> Validation:
        engine.factor = 0.93 if one.table_target < 2.06 else 0.95 if one.table_target < 2.13 else 1.2
        return engine.deploy_and_measure(one)

    outcome = meet_target(2.0, profile(2.0), search, deploy_and_measure)
    assert all(one > 2.0 for one in asked)  # 2.0 has missed: less isn't tried again
    assert 2.0 <= outcome.kept.validation.lower <= 2.0 * (1 + OVERSHOOT)


def test_few_promises_are_broken_on_a_clock_that_is_noisy_and_drifts() -> None:
    """A promise: the lower bound is at or above the target. Broken: the true speedup isn't."""
    promised = broken = 0
    for seed in range(300):
        rng, phase = np.random.default_rng(seed), 0.0
        wrong_by = float(np.exp(rng.normal(0, 0.03)))

        def deploy_and_measure(one: Profile, rng=rng, wrong_by=wrong_by) -> Validation:
            nonlocal phase
            visits = []
            for _ in range(9):
                phase = 0.6 * phase + 0.8 * rng.normal(0, 0.02)  # visits resemble those before
                visits.append(one.table_target * wrong_by * float(np.exp(phase)))
            times = Measurement((1.0,)), Measurement((1 / statistics.median(visits),))
            bounds = median_bounds(visits, CONFIDENCE)
            return Validation(statistics.median(visits), *bounds, tuple(visits), *times, ENVIRONMENT, None)

        kept = meet_target(2.0, profile(2.0), profile, deploy_and_measure).kept
        promised += kept.meets(2.0)
        broken += kept.meets(2.0) and kept.profile.table_target * wrong_by < 2.0
    assert promised > 290
    assert broken <= 0.03 * promised


def test_what_was_deployed_in_the_end_counts_where_it_was_measured_again() -> None:
    engine = Engine(0.5, highest=4.0)
    outcome = meet_target(2.0, profile(2.0), engine.search, engine.deploy_and_measure)
    assert outcome.missed(2.0) is None
    slower = dataclasses.replace(outcome.kept.validation, speedup=1.8, lower=1.7, upper=1.9)
    again = outcome.measured_again(slower)
    assert again.kept.profile is outcome.kept.profile
    assert again.kept.validation is slower
    place = outcome.attempts.index(outcome.kept)
    assert [one.validation for one in again.attempts] == [
        slower if number == place else one.validation for number, one in enumerate(outcome.attempts)
    ]
    assert not again.kept.meets(2.0)
    assert dataclasses.replace(again, exhausted=True).missed(2.0)
