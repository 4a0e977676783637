"""The solver for several devices against all choices of small problems."""

import itertools

import numpy as np
import pytest

from onnx_spdy.pipeline.costs import Costs, InvalidCosts, Product, weighted_sum
from onnx_spdy.pipeline.solve import InfeasibleTarget, solve
from onnx_spdy.pipeline.solve_within import Limit, fastest, share, solve_within


def total(values: np.ndarray, choice: np.ndarray) -> float:
    return float(values[np.arange(len(choice)), choice].sum())


def instance(rng: np.random.Generator, layers: int, levels: int, devices: int) -> tuple[np.ndarray, list[Limit]]:
    """Errors that grow with the level and times that fall, differently on each device."""
    errors = np.cumsum(rng.random((layers, levels)), axis=1)
    limits = []
    for _ in range(devices):
        seconds = np.cumsum(rng.random((layers, levels)), axis=1)[:, ::-1]
        least, most = seconds.min(axis=1).sum(), seconds.max(axis=1).sum()
        limits.append(Limit(Costs(seconds), least + (most - least) * rng.uniform(0.3, 0.8)))
    return errors, limits


@pytest.mark.parametrize("devices", [2, 3])
def test_near_the_best_of_all_choices_and_never_above_a_limit(devices: int) -> None:
    rng = np.random.default_rng(devices)
    excess = []
    for _ in range(60):
        layers, levels = int(rng.integers(2, 6)), int(rng.integers(2, 6))
        errors, limits = instance(rng, layers, levels, devices)
        every = [np.array(one) for one in itertools.product(range(levels), repeat=layers)]
        exact = min(total(errors, one) for one in every if share(limits, one) <= 1)
        choice = solve_within(errors, limits, buckets=2000)
        assert share(limits, choice) <= 1
        excess.append(total(errors, choice) / exact - 1)
    assert min(excess) >= -1e-12
    assert np.mean(np.array(excess) < 1e-9) > 0.6
    assert np.mean(excess) < 0.05


def test_with_many_layers_it_is_close_to_what_the_relaxation_allows() -> None:
    rng = np.random.default_rng(5)
    for _ in range(3):
        errors, limits = instance(rng, 30, 12, 2)
        found = total(errors, solve_within(errors, limits))
        # Each device's own optimum is a bound from below.
        bound = max(total(errors, solve(errors, one.costs, one.seconds)) for one in limits)
        assert bound * (1 - 1e-9) <= found <= bound * 1.15


def test_a_device_that_decides_alone_has_its_own_optimum() -> None:
    rng = np.random.default_rng(7)
    errors, (one, _) = instance(rng, 8, 6, 2)
    easy = Limit(one.costs, float(one.costs.seconds.max(axis=1).sum()))
    assert total(errors, solve_within(errors, [easy, one])) == pytest.approx(
        total(errors, solve(errors, one.costs, one.seconds)), rel=0.02
    )


def test_one_limit_is_what_solve_does() -> None:
    errors, limits = instance(np.random.default_rng(3), 6, 5, 1)
    assert (solve_within(errors, limits) == solve(errors, limits[0].costs, limits[0].seconds)).all()


def test_what_no_choice_does_on_all_devices_is_refused() -> None:
    errors = np.array([[0.0, 1.0, 1.0]])
    limits = [Limit(Costs(np.array([[3.0, 1.0, 3.0]])), 2.0), Limit(Costs(np.array([[3.0, 3.0, 1.0]])), 2.0)]
    with pytest.raises(InfeasibleTarget, match=r"fast enough on all 2 devices.*1.5 times as long"):
        solve_within(errors, limits)


def test_the_fastest_takes_least_where_it_takes_most() -> None:
    limits = [Limit(Costs(np.array([[4.0, 1.0, 2.0]])), 1.0), Limit(Costs(np.array([[4.0, 3.0, 2.0]])), 1.0)]
    assert fastest(limits).tolist() == [2]


def test_sums_of_costs_are_sums_of_their_totals() -> None:
    rng = np.random.default_rng(11)

    def costs(dense: np.ndarray) -> Costs:
        products = tuple(Product(layers, rng.random((len(layers), 3))) for layers in ((0, 1), (0, 1, 3)))
        return Costs(rng.random((4, 3)), rng.random((4, 3)), np.array([-1, 0, 1, 1]), dense, products)

    alike, other = np.array([[True, False, False]] * 4), np.array([[True, True, False]] * 4)
    one, two, three = costs(alike), costs(alike), costs(other)
    for choice in itertools.product(range(3), repeat=4):
        both = 0.3 * one.total(choice) + 0.7 * two.total(choice)
        assert weighted_sum([one, two], [0.3, 0.7]).total(choice) == pytest.approx(both)
        both = 0.3 * one.total(choice) + 0.7 * three.total(choice)
        assert weighted_sum([one, three], [0.3, 0.7]).total(choice) >= both - 1e-12
    with pytest.raises(InvalidCosts, match="of the same layers"):
        weighted_sum([one, Costs(np.ones((3, 3)))], [0.5, 0.5])
