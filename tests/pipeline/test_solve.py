import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from onnx_spdy.pipeline.costs import NO_PREDECESSOR, Costs, Product
from onnx_spdy.pipeline.solve import InfeasibleTarget, error_bounds, solve

Make = Callable[[np.random.Generator, int, int], tuple[np.ndarray, Costs]]


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
        choice = solve(errors, Costs(seconds), budget, buckets)
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
                solve(errors, Costs(seconds), budget, buckets=64)
        else:
            assert total(errors, solve(errors, Costs(seconds), budget, buckets=64)) == pytest.approx(exact, abs=1e-12)


def test_never_exceeds_the_budget_on_1000_instances() -> None:
    rng = np.random.default_rng(2)
    for _ in range(1000):
        errors, seconds, budget = random_instance(rng, int(rng.integers(1, 30)), int(rng.integers(1, 43)))
        assert total(seconds, solve(errors, Costs(seconds), budget, buckets=500)) <= budget


def test_the_bounds_hold_the_exact_optimum_and_the_solution_is_near_it() -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        layers, levels = int(rng.integers(2, 6)), int(rng.integers(2, 6))
        errors, seconds, budget = random_instance(rng, layers, levels)
        every = (np.array(one) for one in itertools.product(range(levels), repeat=layers))
        exact = min(total(errors, one) for one in every if total(seconds, one) <= budget)
        lower, upper = error_bounds(errors, Costs(seconds), budget, buckets=3000)
        assert lower - 1e-12 <= exact <= upper + 1e-12


def test_what_rounding_leaves_of_the_budget_is_used() -> None:
    """With many layers and few buckets the rounded times alone would leave several percent."""
    rng = np.random.default_rng(7)
    for _ in range(20):
        errors, seconds = np.sort(rng.random((40, 20)), axis=1), np.sort(rng.random((40, 20)), axis=1)[:, ::-1]
        budget = 0.5 * float(seconds[:, 0].sum())
        costs = Costs(seconds)
        coarse, (lower, _) = solve(errors, costs, budget, buckets=500), error_bounds(errors, costs, budget, 20_000)
        assert budget * 0.99 < costs.total(coarse) <= budget
        assert total(errors, coarse) <= 1.02 * lower


def test_takes_the_fastest_when_only_that_fits() -> None:
    rng = np.random.default_rng(3)
    errors, seconds = rng.random((20, 42)), rng.random((20, 42))
    choice = solve(errors, Costs(seconds), seconds.min(axis=1).sum())
    assert (choice == seconds.argmin(axis=1)).all()


def test_refuses_the_impossible_with_both_numbers() -> None:
    with pytest.raises(InfeasibleTarget, match=r"budget is 1\.5 s.*takes 2 s"):
        solve(np.zeros((2, 2)), Costs(np.array([[1.0, 2.0], [1.0, 2.0]])), 1.5)


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
    with pytest.raises(ValueError, match=r"errors|seconds"):
        solve(errors, Costs(seconds), 10.0)


def test_layers_that_cost_nothing_stay_at_their_best() -> None:
    assert solve(np.array([[1.0, 0.0, 2.0]]), Costs(np.zeros((1, 3))), 0.0)[0] == 1


def random_costs(rng: np.random.Generator, layers: int, levels: int) -> Costs:
    """Whole numbers of seconds, with layers that others wait for, and levels that run dense."""
    seconds = rng.integers(2, 12, (layers, levels)).astype(float)
    transition = rng.integers(-2, 6, (layers, levels)).astype(float)
    predecessor = np.array(
        [rng.integers(NO_PREDECESSOR, layer) if layer else NO_PREDECESSOR for layer in range(layers)]
    )
    dense = rng.random((layers, levels)) < 0.4
    return Costs(seconds, transition, predecessor, dense)


def plain_total(costs: Costs, choice: tuple[int, ...]) -> float:
    """The definition, layer by layer."""
    spent = 0.0
    for layer, level in enumerate(choice):
        source = int(costs.predecessor[layer])
        after_dense = source != NO_PREDECESSOR and costs.dense[source, choice[source]]
        spent += costs.seconds[layer, level] + (costs.transition[layer, level] if after_dense else 0.0)
    return spent


def test_neighbours_are_counted_as_defined_and_the_fastest_profile_is_found() -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        layers, levels = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        costs = random_costs(rng, layers, levels)
        every = list(itertools.product(range(levels), repeat=layers))
        for choice in every[:: max(1, len(every) // 20)]:
            assert costs.total(choice) == pytest.approx(plain_total(costs, choice))
        assert costs.total(costs.fastest()) == pytest.approx(min(plain_total(costs, one) for one in every))


def test_equals_brute_force_where_neighbours_cost() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        layers, levels = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        costs, errors, budget = random_costs(rng, layers, levels), rng.random((layers, levels)), 40.0
        every = [np.array(one) for one in itertools.product(range(levels), repeat=layers)]
        exact = min((total(errors, one) for one in every if costs.total(one) <= budget), default=None)
        if exact is None:
            with pytest.raises(InfeasibleTarget):
                solve(errors, costs, budget, buckets=40)
        else:
            choice = solve(errors, costs, budget, buckets=40)
            assert costs.total(choice) <= budget
            assert total(errors, choice) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize(
    ("transition", "predecessor", "match"),
    [
        (np.zeros((2, 3)), np.array([-1, 0]), "don't fit"),
        (np.full((2, 2), -2.0), np.array([-1, 0]), "negative"),
        (np.zeros((2, 2)), np.array([-1, 1]), "earlier layer"),
        (np.zeros((2, 2)), np.array([-2, 0]), "earlier layer"),
    ],
)
def test_refuses_neighbours_that_make_no_sense(transition: np.ndarray, predecessor: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Costs(np.ones((2, 2)), transition, predecessor)


def random_products(rng: np.random.Generator, layers: int, levels: int) -> tuple[np.ndarray, Costs]:
    """A chain of groups, as convolutions make one, and two that are further apart; errors that grow with what goes."""
    kept = np.sort(rng.uniform(0.05, 1, (layers, levels)), axis=1)[:, ::-1]
    kept[:, 0] = 1
    seconds = rng.random((layers, 1)) * kept + 0.02
    pairs = [*((layer, layer + 1) for layer in range(layers - 1)), (0, layers - 1)]
    errors = rng.random((layers, 1)) * (1 - kept) ** 2
    products = [Product(pair, np.stack([4 * rng.random() * kept[pair[0]], kept[pair[1]]])) for pair in pairs]
    return errors, Costs(seconds, products=tuple(products))


def with_gates(rng: np.random.Generator, layers: int, levels: int) -> tuple[np.ndarray, Costs]:
    """The same, where some layers may go altogether, and what two or three others take with them."""
    errors, costs = random_products(rng, layers, levels)
    seconds, products = costs.seconds.copy(), []
    going = rng.random(layers) < 0.5
    seconds[going, -1] = 0
    for one in costs.products:
        factors = one.factors.copy()
        factors[going[[*one.layers]], -1] = 0
        products.append(Product(one.layers, factors))
    if layers > 2:
        there = np.ones((3, levels))
        there[:, -1] = 0
        products.append(Product((0, 1, 2), there * rng.random((3, 1))))
    return errors, Costs(seconds, products=tuple(products))


def products_total(costs: Costs, choice: tuple[int, ...]) -> float:
    """The definition, product by product."""
    spent = sum(float(costs.seconds[layer, level]) for layer, level in enumerate(choice))
    for product in costs.products:
        spent += math.prod(
            float(one[choice[layer]]) for layer, one in zip(product.layers, product.factors, strict=True)
        )
    return spent


@pytest.mark.parametrize("make", [random_products, with_gates])
def test_products_are_counted_as_defined_and_what_stands_for_them_bounds_them(make: Make) -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        layers, levels = int(rng.integers(2, 6)), int(rng.integers(1, 5))
        _, costs = make(rng, layers, levels)
        below = costs.linear_below()
        here = rng.integers(0, levels, layers)
        above, (linear, constant) = costs.apart_at(here), costs.linear_at(here)
        assert above.total(here) == pytest.approx(costs.total(here))
        assert linear.total(here) + constant == pytest.approx(costs.total(here))
        every = list(itertools.product(range(levels), repeat=layers))
        for choice in every[:: max(1, len(every) // 20)]:
            assert costs.total(choice) == pytest.approx(products_total(costs, choice))
            assert above.total(choice) >= costs.total(choice) * (1 - 1e-12)
            assert all(one.total(choice) + more <= costs.total(choice) + 1e-12 for one, more in below)
        assert costs.total(costs.fastest()) == pytest.approx(min(products_total(costs, one) for one in every))


@pytest.mark.parametrize("make", [random_products, with_gates])
def test_nearly_equals_brute_force_where_widths_multiply(make: Make) -> None:
    rng = np.random.default_rng(9)
    above = []
    for _ in range(100):
        layers, levels = int(rng.integers(2, 6)), int(rng.integers(2, 7))
        errors, costs = make(rng, layers, levels)
        fastest, dense = costs.total(costs.fastest()), costs.total(np.zeros(layers, int))
        budget = fastest + (dense - fastest) * rng.random()
        every = (np.array(one) for one in itertools.product(range(levels), repeat=layers))
        exact = min(total(errors, one) for one in every if costs.total(one) <= budget)
        choice = solve(errors, costs, budget)
        assert costs.total(choice) <= budget
        lower, _ = error_bounds(errors, costs, budget, buckets=1000)
        assert lower - 1e-12 <= exact <= total(errors, choice) + 1e-12
        above.append(total(errors, choice) / exact - 1 if exact else 0.0)
    assert np.mean(np.array(above) < 1e-9) > 0.9
    assert np.mean(above) < 0.01


def test_a_chain_of_products_is_solved_as_well_as_with_the_width_before_as_state() -> None:
    rng = np.random.default_rng(10)
    for _ in range(5):
        errors, costs = random_products(rng, 10, 12)
        costs = Costs(costs.seconds, products=costs.products[:-1])
        budget = costs.total(np.zeros(10, int)) / rng.uniform(1.2, 2.5)
        choice = solve(errors, costs, budget)
        assert costs.total(choice) <= budget
        assert total(errors, choice) <= 1.01 * chain_optimum(errors, costs, budget, buckets=1000)


def chain_optimum(errors: np.ndarray, costs: Costs, budget: float, buckets: int) -> float:
    """Least error for times rounded up to whole buckets, by a programme that carries the level of the layer before."""
    layers, levels = errors.shape

    def buckets_of(seconds: float) -> int:
        return int(np.ceil(seconds * buckets / budget))

    best = np.full((levels, buckets + 1), np.inf)
    for level in range(levels):
        best[level, buckets_of(costs.seconds[0, level]) :] = errors[0, level]
    for layer in range(1, layers):
        following = np.full_like(best, np.inf)
        for level, before in itertools.product(range(levels), repeat=2):
            one, other = costs.products[layer - 1].factors
            spent = buckets_of(costs.seconds[layer, level] + one[before] * other[level])
            reached = best[before, : max(0, buckets + 1 - spent)] + errors[layer, level]
            row = following[level, buckets + 1 - len(reached) :]
            np.minimum(row, reached, out=row)
        best = following
    return float(best[:, -1].min())


def test_the_budget_of_products_is_never_exceeded() -> None:
    rng = np.random.default_rng(11)
    for _ in range(200):
        layers, levels = int(rng.integers(2, 12)), int(rng.integers(1, 20))
        errors, costs = random_products(rng, layers, levels)
        fastest, dense = costs.total(costs.fastest()), costs.total(np.zeros(layers, int))
        budget = fastest + (dense - fastest) * rng.random() ** 2
        assert costs.total(solve(errors, costs, budget, buckets=500)) <= budget
    with pytest.raises(InfeasibleTarget):
        solve(errors, costs, fastest * 0.999)
    assert costs.total(solve(errors, costs, fastest)) == fastest


@pytest.mark.parametrize(
    ("layers", "factors", "match"),
    [
        ((0, 1), np.ones((2, 3)), "2 levels"),
        ((0,), np.ones((1, 2)), "two or more"),
        ((0, 1), -np.ones((2, 2)), "not negative"),
        ((0, 1), np.full((2, 2), np.nan), "finite"),
        ((0, 2), np.ones((2, 2)), "different ones of 2"),
        ((1, 1), np.ones((2, 2)), "different ones of 2"),
    ],
)
def test_refuses_products_that_make_no_sense(layers: tuple[int, ...], factors: np.ndarray, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Costs(np.ones((2, 2)), products=(Product(layers, factors),))
