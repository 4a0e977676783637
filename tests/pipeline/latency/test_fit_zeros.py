import numpy as np

from onnx_spdy.pipeline.latency.equations import Row, Trial
from onnx_spdy.pipeline.latency.fit_zeros import fit_zeros, monotone
from onnx_spdy.pipeline.latency.sampling import plan_networks
from onnx_spdy.pipeline.level import DENSE, Level, levels_for

ROW_OF = {"a": 0, "b": 1, "c": 2}
SPARSITIES = np.array([0.0, *np.linspace(0.4, 0.98, 20).round(4)])
LEVELS = [DENSE, *(Level("unstructured", float(value)) for value in SPARSITIES[1:])]


def scene(rng: np.random.Generator, noise: float, merged: bool) -> tuple[list[Trial], np.ndarray, np.ndarray]:
    """Trials of three layers in a row whose times are known; the last two may share a row."""
    seconds = np.stack([np.r_[dense, 8 * (1 - SPARSITIES[1:]) + 0.3] for dense in (5.0, 3.0, 4.0)]) * 1e-3
    transition = np.array([[0.0, 0.0], [-0.5, 0.7], [-0.4, 0.9]]) * 1e-3
    trials = []
    for number in range(30):
        choice = np.zeros(3, int) if number % 8 == 0 else np.where(rng.random(3) < 0.3, 0, rng.integers(1, 21, 3))
        times = [seconds[0, choice[0]]]
        for layer in (1, 2):
            more = transition[layer, int(choice[layer] > 0)] if choice[layer - 1] == 0 else 0.0
            times.append(seconds[layer, choice[layer]] + more)
        total = sum(times) + 1e-3
        drift = np.exp(0.2 * rng.standard_normal())
        noisy = [drift * value * np.exp(noise * rng.standard_normal()) for value in times]
        rows = [Row(("a",), noisy[0]), Row(("pool",), 1e-3 * drift)]
        rows += [Row(("b", "c"), noisy[1] + noisy[2])] if merged else [Row(("b",), noisy[1]), Row(("c",), noisy[2])]
        dense = seconds[:, 0].sum() + transition[1:, 0].sum() + 1e-3
        trials.append(
            Trial(tuple(choice), tuple(rows), 0.0, total / dense * np.exp(noise / 5 * rng.standard_normal()), 0.01)
        )
    return trials, seconds, transition


def errors_of(trials: list[Trial], seconds: np.ndarray, transition: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Relative errors of the fit for whole networks that it hasn't seen."""
    dense = seconds[:, 0].sum() + transition[1:, 0].sum() + 1e-3
    sparse = np.tile(np.arange(21) > 0, (3, 1))
    fit = fit_zeros(trials, ROW_OF, np.array([-1, 0, 1]), {"pool": 0}, LEVELS, sparse, dense)
    found = []
    for _ in range(50):
        choice = np.where(rng.random(3) < 0.3, 0, rng.integers(1, 21, 3))
        truth, guess = 1e-3 + seconds[0, choice[0]], fit.rest_seconds + fit.seconds[0, choice[0]]
        for layer in (1, 2):
            after_dense = choice[layer - 1] == 0
            truth += seconds[layer, choice[layer]] + after_dense * transition[layer, int(choice[layer] > 0)]
            guess += fit.seconds[layer, choice[layer]] + after_dense * fit.transition[layer, choice[layer]]
        found.append(guess / truth - 1)
    return np.abs(found)


def test_known_times_are_found_again() -> None:
    rng = np.random.default_rng(0)
    errors = errors_of(*scene(rng, 0.0, merged=False), rng)
    assert np.median(errors) < 0.01
    assert errors.max() < 0.05


def test_merged_rows_are_taken_apart() -> None:
    rng = np.random.default_rng(1)
    errors = errors_of(*scene(rng, 0.0, merged=True), rng)
    assert np.median(errors) < 0.02
    assert errors.max() < 0.08


def test_noise_and_disturbed_runs_do_little_harm() -> None:
    rng = np.random.default_rng(2)
    trials, seconds, transition = scene(rng, 0.05, merged=False)
    rows = trials[5].rows
    spoilt = (Row(rows[0].outputs, 20 * rows[0].seconds), *rows[1:])
    trials[5] = Trial(trials[5].choice, spoilt, 0.0, 3 * trials[5].relative, 0.01)
    errors = errors_of(trials, seconds, transition, rng)
    assert np.median(errors) < 0.04
    assert errors.max() < 0.15


def test_more_zeros_are_never_slower_in_the_same_kind_of_kernel() -> None:
    rng = np.random.default_rng(3)
    trials, *_ = scene(rng, 0.1, merged=False)
    sparse = np.tile(np.arange(21) > 0, (3, 1))
    fit = fit_zeros(trials, ROW_OF, np.array([-1, 0, 1]), {"pool": 0}, LEVELS, sparse, 13e-3)
    assert (np.diff(fit.seconds[:, 1:], axis=1) <= 1e-15).all()
    assert (fit.seconds >= 0).all()
    assert (fit.seconds + fit.transition >= 0).all()
    assert (fit.spread >= 0).all()


def test_cleaning_makes_sparse_runs_monotone_and_keeps_their_means() -> None:
    rng = np.random.default_rng(0)
    noisy = np.linspace(5, 1, 20) + rng.normal(0, 0.5, (3, 20))
    sparse = np.ones((3, 20), bool)
    sparse[:, :4] = False
    cleaned = monotone(noisy, sparse, [range(20)])
    assert (np.diff(cleaned[:, 4:], axis=1) <= 1e-12).all()
    np.testing.assert_allclose(cleaned[:, 4:].mean(axis=1), noisy[:, 4:].mean(axis=1))
    np.testing.assert_allclose(cleaned[:, :4], np.median(noisy[:, :4], axis=1)[:, None].repeat(4, axis=1))


def test_cleaning_is_the_best_monotone_fit() -> None:
    values = np.array([[3.0, 1.0, 2.0, 2.5, 0.5]])
    np.testing.assert_allclose(
        monotone(values, np.ones((1, 5), bool), [range(5)]), [[3.0, 5.5 / 3, 5.5 / 3, 5.5 / 3, 0.5]]
    )


def test_a_real_dip_into_a_dense_kernel_is_not_smoothed_away() -> None:
    values = np.array([[4.0, 4.0, 9.0, 8.0, 2.0]])  # the sparse kernel is slower than the dense one at first
    sparse = np.array([[False, False, True, True, True]])
    np.testing.assert_array_equal(monotone(values, sparse, [range(5)]), values)


def test_each_pattern_is_a_curve_of_its_own() -> None:
    rng = np.random.default_rng(4)
    levels = levels_for("unstructured,blockout4,2:4")
    density = np.array([1 - level.sparsity for level in levels])
    pace = np.array([0.0] + [{"unstructured": 8.0, "blockout4": 4.0, "2:4": 6.0}[one.pattern] for one in levels[1:]])
    seconds = np.where(np.arange(len(levels)), pace * density + 0.3, 5.0) * 1e-3
    trials = []
    sparse = np.tile(np.arange(len(levels)) > 0, (2, 1))
    for choice in plan_networks(sparse, levels, rng):
        rows = [Row((name,), seconds[level]) for name, level in zip("ab", choice, strict=True)]
        trials.append(Trial(tuple(choice), tuple(rows), 0.0, seconds[choice].sum() / 1e-2, 0.01))
    fit = fit_zeros(trials, {"a": 0, "b": 1}, np.array([-1, -1]), {}, levels, sparse, 1e-2)
    np.testing.assert_allclose(fit.seconds, [seconds, seconds], rtol=0.03)
