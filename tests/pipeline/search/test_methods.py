import dataclasses

import numpy as np
import pytest

from onnx_spdy.pipeline.costs import Costs
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, SEARCHES, SearchProblem, Seen, UnknownSearch, search_named
from onnx_spdy.pipeline.search.methods.loss_model import fit
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.pipeline.solve_within import Limit

LEVELS = levels_for("unstructured")
LAYERS = 12
STAGES = (32, 64, 128)


class Scripted:
    """A network whose loss is known: layers differ in how much each level hurts."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.weights = [rng.normal(0, scale, 400) for scale in np.geomspace(0.1, 3, LAYERS)]
        self.sensitivity = rng.random(LAYERS) ** 3
        self.asked: list[tuple[int, ...]] = []
        self.known: dict[tuple[int, ...], int] = {}
        self.samples_run = 0

    def loss(self, choice: np.ndarray, samples: int | None = None) -> float:
        """Layers hurt each other; few samples tell less than all of them."""
        samples = STAGES[-1] if samples is None else samples
        known = self.known.get(tuple(choice), 0)
        if samples > known:
            self.asked.append(tuple(choice))
            self.samples_run += samples - known
            self.known[tuple(choice)] = samples
        noise = np.random.default_rng([*choice.tolist(), samples]).normal() * 0.1 * (1 - samples / STAGES[-1])
        return float((self.sensitivity * (choice / 41) ** 2).sum() ** 1.3 * np.exp(noise))

    def problem(self, budget: float, seed: int = 0, **more) -> SearchProblem:
        dense = np.linspace(1, 2, LAYERS)[:, None]
        density = np.array([1.2, *(1.3 * (1 - level.sparsity) + 0.1 for level in LEVELS[1:])])
        return SearchProblem(
            levels=LEVELS,
            errors=np.square(np.arange(42) / 41) * np.ones((LAYERS, 1)),
            limits=[Limit(Costs(dense * density), budget * float(dense.sum()))],
            loss=self.loss,
            magnitudes=lambda layer: np.abs(self.weights[layer]),
            rng=np.random.default_rng(seed),
            stages=STAGES,
            samples_run=lambda: self.samples_run,
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
def test_every_search_takes_errors_that_are_all_zero(name: str) -> None:
    """As those of weights are whose squares are too small for a float."""
    problem = dataclasses.replace(Scripted().problem(0.5), errors=np.zeros((LAYERS, len(LEVELS))))
    assert problem.is_feasible(SEARCHES[name](problem).choice)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_refuses_the_impossible(name: str) -> None:
    with pytest.raises(InfeasibleTarget):
        SEARCHES[name](Scripted().problem(0.1))


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_repeats_itself_for_a_seed(name: str) -> None:
    first, second = (SEARCHES[name](Scripted().problem(0.4)).choice for _ in range(2))
    assert (first == second).all()


def test_searches_that_ask_the_network_beat_those_that_do_not_where_layers_differ() -> None:
    losses = {name: Scripted().loss(search(Scripted().problem(0.4)).choice) for name, search in SEARCHES.items()}
    blind = min(losses[name] for name in ("uniform", "global-magnitude", "erk", "dp"))
    assert losses["spdy"] < 0.8 * blind
    assert losses["random"] < blind
    assert losses["thompson"] < 0.8 * blind


def test_the_default_finds_what_spdy_finds_with_a_tenth_of_its_images() -> None:
    slow, fast = Scripted(), Scripted()
    best = slow.loss(SEARCHES["spdy"](slow.problem(0.4)).choice)
    choice = SEARCHES[DEFAULT_SEARCH](fast.problem(0.4, sample_limit=slow.samples_run // 10)).choice
    assert fast.loss(choice) <= 1.02 * best


def test_an_sample_limit_is_kept_and_more_images_find_no_less() -> None:
    losses = []
    for limit in (700, 2000, 8000):
        network = Scripted()
        choice = SEARCHES["thompson"](network.problem(0.4, sample_limit=limit)).choice
        assert network.samples_run <= limit + STAGES[-1]
        losses.append(network.loss(choice))
    assert losses == sorted(losses, reverse=True)


def test_a_dense_loss_that_differs_between_sample_sets_does_not_mislead() -> None:
    """As cross-entropy has; KL to the dense outputs is 0 everywhere."""

    class Labelled(Scripted):
        def loss(self, choice: np.ndarray, samples: int | None = None) -> float:
            return super().loss(choice, samples) + {32: 3.0, 64: 0.5, 128: 1.0}[samples or 128]

    plain, labelled = Scripted(), Labelled()
    losses = [
        Scripted().loss(SEARCHES["thompson"](network.problem(0.4, sample_limit=2000)).choice)
        for network in (plain, labelled)
    ]
    assert losses[1] < 1.1 * losses[0]


def test_profiles_that_were_scored_for_another_target_help() -> None:
    network = Scripted()
    SEARCHES["thompson"](network.problem(0.5))
    seen = [Seen(choice, samples, network.loss(np.array(choice), samples)) for choice, samples in network.known.items()]
    before = network.samples_run
    warm = network.loss(SEARCHES["thompson"](network.problem(0.4, seen=seen, sample_limit=400)).choice)
    assert network.samples_run - before <= 400 + STAGES[-1]
    fresh = Scripted()
    assert warm < fresh.loss(SEARCHES["thompson"](fresh.problem(0.4, sample_limit=400)).choice)


@pytest.mark.parametrize("bent", [False, True])
def test_the_loss_model_learns_the_layers_from_whole_profiles(bent: bool) -> None:
    rng = np.random.default_rng(0)
    additive = (np.arange(42) / 41) ** 2 * np.ones((LAYERS, 1))
    factors = np.exp(rng.normal(0, 0.7, (LAYERS, 1)))
    bends = 1 + rng.normal(0, 0.2, (LAYERS, 1)) if bent else 1.0
    truth = factors * additive[:, [20]] * (additive / additive[:, [20]]) ** bends
    profiles = rng.integers(1, 42, (200, LAYERS))
    losses = truth[np.arange(LAYERS), profiles].sum(axis=1) ** 1.1
    seen = [Seen(tuple(p), 128, loss) for p, loss in zip(profiles.tolist(), losses, strict=True)]
    posterior = fit(additive, seen, pivot=20)
    found, wanted = posterior.likeliest()[:, 10:], np.log(truth[:, 10:] / additive[:, 10:])
    difference = (found - found.mean()) - (wanted - wanted.mean())
    assert np.abs(difference).max() < 0.25
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.98
    spreads = [np.std([one.draw(rng) for _ in range(100)], axis=0) for one in (posterior, fit(additive, [], 20))]
    assert (spreads[0][:, 10:] < 0.5 * spreads[1][:, 10:]).all()


def test_the_loss_model_believes_a_loss_on_many_samples_more() -> None:
    rng = np.random.default_rng(0)
    additive = (np.arange(42) / 41) ** 2 * np.ones((LAYERS, 1))
    factors = np.exp(rng.normal(0, 0.7, LAYERS))
    profiles = rng.integers(1, 42, (200, LAYERS))
    losses = (factors * additive[np.arange(LAYERS), profiles]).sum(axis=1)
    losses[::2] *= np.exp(rng.normal(0, 0.3, 100))
    errors = []
    for noisy, exact in ((16, 512), (512, 512), (512, 16)):
        samples = [noisy, exact] * 100
        seen = [Seen(tuple(p), n, loss) for p, n, loss in zip(profiles.tolist(), samples, losses, strict=True)]
        difference = fit(additive, seen, pivot=20).mean[:LAYERS] - np.log(factors)
        errors.append(np.std(difference))
    assert errors[0] < 0.8 * errors[1] < 0.8 * errors[2]


def test_erk_prunes_large_layers_more() -> None:
    network = Scripted()
    network.weights = [np.ones((8 * (layer + 1), 16, 3, 3)) for layer in range(LAYERS)]
    choice = SEARCHES["erk"](network.problem(0.5)).choice
    assert (np.diff(choice) >= 0).all()
    assert choice[-1] > choice[0]


def test_spdy_returns_the_best_that_it_evaluated() -> None:
    network = Scripted()
    choice = SEARCHES["spdy"](network.problem(0.4)).choice
    assert network.sensitivity @ (choice / 41) ** 2 == min(
        network.sensitivity @ (np.array(one) / 41) ** 2 for one in network.asked
    )
    assert len(network.asked) >= 100 + 100


@pytest.mark.parametrize("name", ["spdy", "thompson", "random"])
def test_searches_stop_at_the_time_limit_with_what_they_have(name: str) -> None:
    network = Scripted()
    problem = network.problem(0.4, is_over=lambda: len(network.asked) >= 7)
    assert problem.is_feasible(SEARCHES[name](problem).choice)
    assert len(network.asked) == 7


@pytest.mark.parametrize("name", ["spdy", "thompson", "dp"])
def test_the_error_model_of_a_search_leads_to_its_choice_again(name: str) -> None:
    problem = Scripted().problem(0.4)
    result = SEARCHES[name](problem)
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
    with pytest.raises(UnknownSearch, match="spdy, dp, uniform, erk, global-magnitude, random"):
        search_named("best")
