import numpy as np
import pytest

from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.searches import SEARCHES, SearchProblem, UnknownSearch, search_named
from onnx_spdy.pipeline.solve import Costs, InfeasibleTarget

LEVELS = levels_for("unstructured")
LAYERS = 12


class Scripted:
    """A network whose loss is known: layers differ in how much each level hurts."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weights = [rng.normal(0, scale, 400) for scale in np.geomspace(0.1, 3, LAYERS)]
        self.sensitivity = rng.random(LAYERS) ** 3
        self.asked: list[tuple[int, ...]] = []

    def loss(self, choice: np.ndarray) -> float:
        self.asked.append(tuple(choice))
        return float((self.sensitivity * (choice / 41) ** 2).sum())

    def problem(self, budget: float, seed: int = 0, **more) -> SearchProblem:
        dense = np.linspace(1, 2, LAYERS)[:, None]
        density = np.array([1.2, *(1.3 * (1 - level.sparsity) + 0.1 for level in LEVELS[1:])])
        return SearchProblem(
            levels=LEVELS,
            costs=Costs(dense * density),
            errors=np.square(np.arange(42) / 41) * np.ones((LAYERS, 1)),
            budget_seconds=budget * float(dense.sum()),
            loss=self.loss,
            magnitudes=lambda layer: np.abs(self.weights[layer]),
            rng=np.random.default_rng(seed),
            **more,
        )


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.25])
def test_every_search_keeps_the_budget(name: str, budget: float) -> None:
    problem = Scripted().problem(budget)
    choice = SEARCHES[name](problem).choice
    assert choice.shape == (LAYERS,)
    assert problem.is_feasible(choice)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_refuses_the_impossible(name: str) -> None:
    with pytest.raises(InfeasibleTarget):
        SEARCHES[name](Scripted().problem(0.1))


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_repeats_itself_for_a_seed(name: str) -> None:
    first, second = (SEARCHES[name](Scripted().problem(0.4)).choice for _ in range(2))
    assert (first == second).all()


def test_spdy_beats_the_baselines_where_layers_differ() -> None:
    losses = {name: Scripted().loss(search(Scripted().problem(0.4)).choice) for name, search in SEARCHES.items()}
    assert losses["spdy"] < 0.8 * min(losses["uniform"], losses["global-magnitude"])


def test_spdy_returns_the_best_that_it_evaluated() -> None:
    network = Scripted()
    choice = SEARCHES["spdy"](network.problem(0.4)).choice
    assert network.sensitivity @ (choice / 41) ** 2 == min(
        network.sensitivity @ (np.array(one) / 41) ** 2 for one in network.asked
    )
    assert len(network.asked) >= 100 + 100


def test_spdy_stops_at_the_time_limit_with_what_it_has() -> None:
    network = Scripted()
    problem = network.problem(0.4, is_over=lambda: len(network.asked) >= 7)
    assert problem.is_feasible(SEARCHES["spdy"](problem).choice)
    assert len(network.asked) == 7


def test_the_error_model_of_spdy_leads_to_its_choice_again() -> None:
    problem = Scripted().problem(0.4)
    result = SEARCHES["spdy"](problem)
    assert result.errors is not None
    assert (problem.solve(result.errors) == result.choice).all()


def test_uniform_is_the_lowest_level_that_fits() -> None:
    problem = Scripted().problem(0.5)
    choice = SEARCHES["uniform"](problem).choice
    assert len(set(choice)) == 1
    assert not problem.is_feasible(choice - 1)


def test_global_magnitude_prunes_layers_of_small_weights_more() -> None:
    choice = SEARCHES["global-magnitude"](Scripted().problem(0.5)).choice
    assert choice[0] > choice[-1]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownSearch, match="spdy, uniform, global-magnitude"):
        search_named("best")
