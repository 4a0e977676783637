"""The default: a model of the loss proposes, the solver makes it feasible, a race over growing sample sets decides.

Each layer alone is compressed to a middle level, or left out with its branch, and scored on few samples; with the
layer errors of the database that gives additive errors. Their solution and those of other error models are the first
candidates. Every score teaches a model of the loss what each layer really costs among the others (`loss_model.py`). New
candidates are solutions for errors as that model thinks they might be, drawn from its posterior: where it is sure
they are alike, where it isn't they differ (Thompson sampling with the solver as oracle). Others are the best profile
with one layer at another level, for which the solver makes room: that finds what no model expects. Candidates are
scored on few samples, the better ones on more, and only what still beats the best profile there on all.

Sources: Thompson (1933) for the sampling; staged selection after Sieberling et al., EvoPress (ICML 2025); losses of
single layers after Frantar & Alistarh, OBC (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.search.methods.loss_model import Posterior, fit
from onnx_spdy.pipeline.search.methods.problem import SearchProblem, SearchResult, Seen

PROBES = (0.5,)  # at which fractions of the levels each layer is scored alone
CANDIDATES = 8  # of a generation
SURVIVORS = 0.5  # the fraction of them that goes on to the next set of samples
MARGIN = 0.2  # of the best loss, by which a candidate may be worse on few samples; falls to 0 on all of them
PATIENCE = 8  # generations in a row that gain less than GAIN
GAIN = 0.01  # of the loss
REDRAWN = (0.05, 0.15, 0.4)  # of the layers in one candidate
WIDTHS = (0.25, 0.5, 1.0)  # of the posterior's spread
LEAST_LOSS = 1e-9  # above the dense network's: less counts as nothing
LEAST_FACTOR = 1e-2  # of the median layer's loss for its error: what one scored alone costs at least
LARGEST_STAGE = 1 / 16  # of the sample limit: to know few profiles well is worth less than to know many
LEARNT_FROM = 1000  # profiles at most, the last ones: they are nearest to what is looked for
DRAWS = 8  # for one candidate, as long as it repeats an earlier one,
WIDER = 1.5  # each so many times wider than the one before


Candidates = Mapping[tuple[int, ...], np.ndarray]  # choice -> the (layers, levels) errors that it is optimal for


def thompson(problem: SearchProblem) -> SearchResult:
    """The best profile found; see the top of the file.

    Without an sample limit it ends when `PATIENCE` generations in a row gained nothing worth their cost; with one, when
    the samples are used up. In both cases it ends when there is nothing new to propose.
    """
    if problem.sample_limit is not None:
        affordable = LARGEST_STAGE * problem.sample_limit
        problem = replace(problem, stages=tuple(n for n in problem.stages if n <= affordable) or problem.stages[:1])
    race = _Race(problem)
    probed = probed_errors(problem, race)
    # What a layer costs alone says as little as its error does of what it costs among others; together they say more.
    additive = np.sqrt(problem.errors * probed)
    levels = len(problem.levels)
    quadratic = np.tile(np.square(np.arange(levels) / (levels - 1)), (problem.layer_count, 1))
    seeds = [additive, probed, quadratic, *problem.learned]
    race.run({_key(problem.solve(errors)): errors for errors in seeds})
    pivot, idle = probed_levels(problem.levels)[0], 0
    while not race.is_over() and (idle < PATIENCE or problem.sample_limit is not None):
        before = race.best_loss
        candidates = _proposals(problem, race, additive, fit(additive, race.scored(), pivot))
        if not candidates:
            break
        race.run(candidates)
        idle = 0 if race.best_loss < (1 - GAIN) * before else idle + 1
    return race.best


def probed_errors(problem: SearchProblem, race: _Race) -> np.ndarray:
    """(layers, levels) what each layer alone costs: the database's errors, scaled to losses of the network.

    Levels between the probes go along with the database's error; with one probe in proportion to it.
    """
    probes = probed_levels(problem.levels)
    samples = problem.stages[0]
    additive = problem.errors.copy()
    alone = np.eye(problem.layer_count, dtype=np.int64)
    losses = problem.losses([level * choice for choice in alone for level in probes], samples)
    for layer in range(problem.layer_count):
        scores = []
        for _ in probes:
            if race.is_over():
                return problem.errors
            scores.append(next(losses) - race.dense_loss(samples))
            race.tell()
        additive[layer] = _scaled(problem.errors[layer], probes, scores)
    factors = additive[:, probes] / np.maximum(problem.errors[:, probes], 1e-12)
    if not (factors > 0).any():
        return problem.errors
    return np.maximum(additive, LEAST_FACTOR * np.median(factors[factors > 0]) * problem.errors)


def probed_levels(levels: Sequence[Level]) -> list[int]:
    """Indices of the levels at which each layer is scored alone.

    What a residual branch costs as a whole no width of it tells, nor does its error, which is that of all of it.
    """
    middle = {max(1, round(fraction * (len(levels) - 1))) for fraction in PROBES}
    return sorted(middle | ({len(levels) - 1} if levels[-1].is_nothing else set()))


def _scaled(errors: np.ndarray, probes: Sequence[int], scores: Sequence[float]) -> np.ndarray:
    factors = np.maximum(scores, 0.0) / np.maximum(errors[list(probes)], 1e-12)
    if len(probes) == 1 or not (factors > 0).all():
        return errors * factors.mean()
    positions = np.log(np.maximum(errors, 1e-12))
    return errors * np.exp(np.interp(positions, np.log(errors[list(probes)]), np.log(factors)))


def _proposals(problem: SearchProblem, race: _Race, additive: np.ndarray, posterior: Posterior) -> Candidates:
    """Profiles that weren't scored yet.

    The likeliest one first; then in turns the solution of the best profile's own errors with some layers changed by as
    much as the posterior is unsure of, that of the likeliest errors changed in the same way, and twice the best profile
    with one layer at another level, which the solver makes up for: errors may be wrong by more than anyone believes.
    """
    found: dict[tuple[int, ...], np.ndarray] = {}
    known = posterior.likeliest()
    likeliest = additive * np.exp(known)
    best = likeliest if race.best.errors is None else race.best.errors
    for number in range(CANDIDATES):
        for draw in range(DRAWS if number else 1):
            if number % 4 > 1:
                errors = _moved(problem, best, race.best.choice)
            else:
                change = posterior.draw(problem.rng, WIDER**draw * float(problem.rng.choice(WIDTHS))) - known
                redrawn = problem.rng.random(problem.layer_count) < problem.rng.choice(REDRAWN)
                redrawn[problem.rng.integers(problem.layer_count)] = True
                errors = (best if number % 2 else likeliest) * np.exp(change * (redrawn * (number > 0))[:, None])
                errors /= errors.max() or 1.0  # all are zero where the weights are so small that their squares are
            choice = _key(problem.solve(errors))
            if choice not in race.scores and choice not in found:
                found[choice] = errors
                break
    return found


def _moved(problem: SearchProblem, errors: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Errors for which a layer leaves its level in a choice for another one, if that is possible at all."""
    layer = int(problem.rng.integers(problem.layer_count))
    others = np.flatnonzero(problem.errors[layer] != problem.errors[layer, choice[layer]])
    if not len(others):
        return errors
    level = problem.rng.choice(others)
    moved = errors.copy()
    least = float(errors[np.arange(len(errors)), choice].sum())  # so much is lost now
    moved[layer] = np.where(problem.errors[layer] == problem.errors[layer, level], errors[layer], errors[layer] + least)
    return moved


class _Race:
    """Scores candidates on growing sets of samples and keeps the best.

    Attributes:
        best, best_loss: the best profile so far, its loss on all samples.
        scores: the choices that were scored, each on as many samples as it came to.
    """

    def __init__(self, problem: SearchProblem) -> None:
        self._problem = problem
        self._first_samples_run, self._told = problem.samples_run(), 0
        errors = problem.learned[-1] if problem.learned else problem.errors
        self.best = SearchResult(problem.solve(errors), errors)
        self.best_loss = np.inf
        self.scores: dict[tuple[int, ...], Seen] = {}
        # Whatever happens next, there is a result with a loss.
        loss = problem.loss(self.best.choice, problem.stages[-1])
        self.best_loss = self._scored(_key(self.best.choice), problem.stages[-1], loss)

    def dense_loss(self, samples: int) -> float:
        """Loss of the dense network; of most losses it is 0."""
        dense = np.zeros(self._problem.layer_count, np.int64)
        least = self._problem.loss(dense, self._problem.stages[0])
        return least if abs(least) <= LEAST_LOSS else self._problem.loss(dense, samples)

    def is_over(self) -> bool:
        """Whether time, samples or the user's patience are used up."""
        limit, spent = self._problem.sample_limit, self._problem.samples_run() - self._first_samples_run
        return self._problem.is_over() or (limit is not None and spent >= limit)

    def run(self, candidates: Candidates) -> None:
        """Race these against each other and the best so far (successive halving)."""
        racing = [choice for choice in candidates if choice not in self.scores]
        for samples in self._problem.stages:
            to_beat = self._problem.loss(self.best.choice, samples)
            losses: dict[tuple[int, ...], float] = {}
            found = self._problem.losses([np.array(choice) for choice in racing], samples)
            for choice in racing:
                if self.is_over():
                    break
                losses[choice] = self._scored(choice, samples, next(found))
            doubt = 1 + MARGIN * (1 - samples / self._problem.stages[-1])
            better = sorted(
                (choice for choice in losses if losses[choice] < to_beat * doubt), key=lambda one: losses[one]
            )
            racing = better[: max(1, round(SURVIVORS * len(racing)))]
        if racing:
            self.best = SearchResult(np.array(racing[0]), candidates[racing[0]])
            self.best_loss = losses[racing[0]]
            self.tell()

    def scored(self) -> list[Seen]:
        """What the loss model can learn from: profiles of this and of other targets, losses above the dense one."""
        earlier = {one.choice: one for one in self._problem.seen if np.count_nonzero(one.choice) > 1}
        known = [*(earlier | self.scores).values()][-LEARNT_FROM:]
        return [replace(one, loss=one.loss - self.dense_loss(one.samples)) for one in known]

    def tell(self) -> None:
        """Report progress."""
        self._told += 1
        self._problem.tell(self.best_loss, self._told, CANDIDATES)

    def _scored(self, choice: tuple[int, ...], samples: int, loss: float) -> float:
        self.scores[choice] = Seen(choice, samples, loss)
        self.tell()
        return loss


def _key(choice: np.ndarray) -> tuple[int, ...]:
    return tuple(choice.tolist())
