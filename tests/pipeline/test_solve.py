import itertools

import numpy as np
import pytest

from onnx_spdy.pipeline.solve import InfeasibleTarget, solve


def random_instance(rng: np.random.Generator, layers: int, levels: int) -> tuple[np.ndarray, np.ndarray, float]:
    errors, seconds = rng.random((layers, levels)), rng.random((layers, levels))
    fastest, slowest = seconds.min(axis=1).sum(), seconds.max(axis=1).sum()
    return errors, seconds, fastest + (slowest - fastest) * rng.random()


def total(values: np.ndarray, choice: np.ndarray) -> float:
    return float(values[np.arange(len(choice)), choice].sum())


def test_equals_brute_force_on_200_small_instances() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        layers, levels, buckets = int(rng.integers(1, 6)), int(rng.integers(1, 6)), 10_000
        errors, seconds, budget = random_instance(rng, layers, levels)
        choice = solve(errors, seconds, budget, buckets)
        every = [np.array(one) for one in itertools.product(range(levels), repeat=layers)]
        # The best of those that fit when every time is rounded up; the true optimum may use the last buckets.
        rounded = np.ceil(seconds * buckets / budget) * budget / buckets
        fitting = [total(errors, one) for one in every if total(rounded, one) <= budget * (1 + 1e-12)]
        exact = min(total(errors, one) for one in every if total(seconds, one) <= budget)
        assert exact - 1e-12 <= total(errors, choice) <= min(fitting, default=np.inf) + 1e-12


def test_equals_brute_force_exactly_where_times_are_whole_buckets() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        layers, levels = int(rng.integers(1, 6)), int(rng.integers(1, 6))
        errors, seconds = rng.random((layers, levels)), rng.integers(0, 16, (layers, levels)).astype(float)
        budget = 64.0  # with 64 buckets every time is a whole number of them
        every = (np.array(one) for one in itertools.product(range(levels), repeat=layers))
        exact = min((total(errors, one) for one in every if total(seconds, one) <= budget), default=None)
        if exact is None:
            with pytest.raises(InfeasibleTarget):
                solve(errors, seconds, budget, buckets=64)
        else:
            assert total(errors, solve(errors, seconds, budget, buckets=64)) == pytest.approx(exact, abs=1e-12)


def test_never_exceeds_the_budget_on_1000_instances() -> None:
    rng = np.random.default_rng(2)
    for _ in range(1000):
        errors, seconds, budget = random_instance(rng, int(rng.integers(1, 30)), int(rng.integers(1, 43)))
        assert total(seconds, solve(errors, seconds, budget, buckets=500)) <= budget


def test_takes_the_fastest_when_only_that_fits() -> None:
    rng = np.random.default_rng(3)
    errors, seconds = rng.random((20, 42)), rng.random((20, 42))
    choice = solve(errors, seconds, seconds.min(axis=1).sum())
    assert (choice == seconds.argmin(axis=1)).all()


def test_refuses_the_impossible_with_both_numbers() -> None:
    with pytest.raises(InfeasibleTarget, match=r"budget is 1\.5 s.*takes 2 s"):
        solve(np.zeros((2, 2)), np.array([[1.0, 2.0], [1.0, 2.0]]), 1.5)


@pytest.mark.parametrize(
    ("errors", "seconds"),
    [
        (np.zeros((2, 2)), np.zeros((2, 3))),
        (np.zeros((0, 2)), np.zeros((0, 2))),
        (np.array([[np.nan]]), np.array([[1.0]])),
        (np.array([[1.0]]), np.array([[-1.0]])),
        (np.array([[1.0]]), np.array([[np.inf]])),
    ],
)
def test_refuses_tables_that_make_no_sense(errors: np.ndarray, seconds: np.ndarray) -> None:
    with pytest.raises(ValueError, match="errors"):
        solve(errors, seconds, 10.0)


def test_layers_that_cost_nothing_stay_at_their_best() -> None:
    assert solve(np.array([[1.0, 0.0, 2.0]]), np.zeros((1, 3)), 0.0)[0] == 1
