"""The default: a model of the loss proposes, the solver makes it feasible, a race over growing sample sets decides.

Each layer alone is compressed to a middle level and scored on few samples; with the layer errors of the database
that gives additive errors. Their solution and those of other error models are the first candidates.
Every score teaches a model of the loss what each layer really costs among the others (`loss_model.py`). New
candidates are solutions for errors as that model thinks they might be, drawn from its posterior: where it is sure
they are alike, where it isn't they differ (Thompson sampling with the solver as oracle). Candidates are scored on few
samples, the better ones on more, and only what still beats the best profile there on all.

Sources: Thompson (1933) for the sampling; staged selection after Sieberling et al., EvoPress (ICML 2025); losses of
single layers after Frantar & Alistarh, OBC (NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from onnx_spdy.pipeline.searches.loss_model import Posterior, fit
from onnx_spdy.pipeline.searches.problem import SearchProblem, SearchResult, Seen

PROBES = (0.5,)  # at which fractions of the levels each layer is scored alone
CANDIDATES = 8  # of a generation
SURVIVORS = 0.5  # the fraction of them that goes on to the next set of samples
PATIENCE = 4  # generations in a row that gain less than GAIN
GAIN = 0.01  # of the loss
REDRAWN = 0.3  # of the layers in one candidate
WIDTHS = (0.25, 0.5, 1.0)  # of the posterior's spread
DRAWS = 6  # for one candidate, as long as it repeats an earlier one


def thompson(problem: SearchProblem) -> SearchResult:
    """The best profile found; see the top of the file."""
    race = _Race(problem)
    race.enter(problem.errors)  # whatever happens next, there is a result
    additive = probed_errors(problem, race)
    levels = len(problem.levels)
    quadratic = np.square(np.arange(levels) / (levels - 1))
    seeds = [additive, np.sqrt(problem.errors * additive), np.tile(quadratic, (problem.layer_count, 1))]
    race.run([*seeds, *problem.learned])
    idle = 0
    while not race.is_over() and (idle < PATIENCE or problem.image_limit is not None):
        before = race.best_loss
        posterior = fit(additive, race.scored(), race.floor)
        race.run(_proposals(problem, race, additive, posterior))
        idle = 0 if race.best_loss < (1 - GAIN) * before else idle + 1
        if race.unproductive > PATIENCE:
            break
    return race.best


def probed_errors(problem: SearchProblem, race: _Race) -> np.ndarray:
    """(layers, levels) what each layer alone costs: the database's errors, scaled to losses of the network.

    Levels between the probes go along with the database's error; with one probe in proportion to it.
    """
    levels = len(problem.levels)
    probes = sorted({max(1, round(fraction * (levels - 1))) for fraction in PROBES})
    samples = problem.stages[0]
    additive = problem.errors.copy()
    base = race.base
    for layer in range(problem.layer_count):
        scores = []
        for level in probes:
            if race.is_over():
                return problem.errors
            choice = np.zeros(problem.layer_count, np.int64)
            choice[layer] = level
            scores.append(problem.loss(choice, samples) - base)
            race.tell()
        additive[layer] = _scaled(problem.errors[layer], probes, scores)
    known = additive[:, probes]
    return np.maximum(additive, 1e-4 * np.median(known[known > 0]) * problem.errors) if (known > 0).any() else additive


def _scaled(errors: np.ndarray, probes: Sequence[int], scores: Sequence[float]) -> np.ndarray:
    factors = np.maximum(scores, 0.0) / np.maximum(errors[list(probes)], 1e-12)
    if len(probes) == 1 or not (factors > 0).all():
        return errors * factors.mean()
    positions = np.log(np.maximum(errors, 1e-12))
    return errors * np.exp(np.interp(positions, np.log(errors[list(probes)]), np.log(factors)))


def _proposals(problem: SearchProblem, race: _Race, additive: np.ndarray, posterior: Posterior) -> list[np.ndarray]:
    """Error tables whose solutions weren't scored yet.

    The likeliest one first; then in turns the same with some layers drawn from the posterior, and the best profile's
    own errors with some layers changed by as much as the posterior is unsure of.
    """
    tables: list[np.ndarray] = []
    taken = set(race.entered)
    for number in range(CANDIDATES):
        for _ in range(DRAWS if number else 1):
            change = posterior.draw(problem.rng, float(problem.rng.choice(WIDTHS))) - posterior.mean
            redrawn = problem.rng.random(problem.layer_count) < REDRAWN
            redrawn[problem.rng.integers(problem.layer_count)] = True
            if number == 0:
                change[:] = 0
            base = race.best.errors if number % 2 and race.best.errors is not None else None
            logs = change * redrawn + (posterior.mean if base is None else 0.0)
            errors = (additive if base is None else base) * np.exp(logs)[:, None]
            errors = errors / errors.max()
            key = tuple(race.solve(errors).tolist())
            if key not in taken:
                taken.add(key)
                tables.append(errors)
                break
    return tables


@dataclass
class _Race:
    """Scores candidates on growing sets of samples and keeps the best.

    Attributes:
        problem: what is searched.
        best, best_loss: the best profile so far, its loss on all samples.
        base: loss of the dense network.
        entered: choices that were scored.
        unproductive: generations in a row without a new candidate.
    """

    problem: SearchProblem
    best_loss: float = np.inf
    entered: dict[tuple[int, ...], Seen] = field(default_factory=dict)
    unproductive: int = 0

    def __post_init__(self) -> None:
        problem = self.problem
        self._first_images = problem.images()
        self._solved: dict[bytes, np.ndarray] = {}
        self.base = problem.loss(np.zeros(problem.layer_count, np.int64), problem.stages[0])
        self.floor = 1e-9
        self._scores = 0

    def is_over(self) -> bool:
        """Whether time, images or the user's patience are used up."""
        limit = self.problem.image_limit
        spent = self.problem.images() - self._first_images
        return self.problem.is_over() or (limit is not None and spent >= limit)

    def solve(self, errors: np.ndarray) -> np.ndarray:
        """The choice for an error table; the same table is solved once."""
        key = errors.tobytes()
        if key not in self._solved:
            self._solved[key] = self.problem.solve(errors)
        return self._solved[key]

    def enter(self, errors: np.ndarray) -> None:
        """Score one error table's choice on all samples, whatever it costs."""
        choice = self.solve(errors)
        self.best = SearchResult(choice, errors)
        self.best_loss = self._score(choice, self.problem.stages[-1])

    def run(self, tables: Sequence[np.ndarray]) -> None:
        """Race the choices of these error tables against each other and the best so far."""
        fresh = {tuple(self.solve(errors).tolist()): errors for errors in tables}
        fresh = {key: errors for key, errors in fresh.items() if key not in self.entered}
        self.unproductive = 0 if fresh else self.unproductive + 1
        racing = list(fresh)
        for number, samples in enumerate(self.problem.stages):
            to_beat = self.problem.loss(self.best.choice, samples)
            losses: dict[tuple[int, ...], float] = {}
            for key in racing:
                if self.is_over():
                    break
                losses[key] = self._score(np.array(key), samples)
            is_last = number == len(self.problem.stages) - 1
            better = sorted((key for key in losses if losses[key] < to_beat), key=lambda key: losses[key])
            if is_last:
                if better:
                    self.best_loss = losses[better[0]]
                    self.best = SearchResult(np.array(better[0]), fresh[better[0]])
                    self.tell()
                return
            racing = better[: max(1, round(SURVIVORS * len(racing)))]

    def scored(self) -> list[Seen]:
        """What the loss model can learn from: profiles of this and of other targets, losses above the dense one."""
        everything = {one.choice: one for one in self.problem.seen if np.count_nonzero(one.choice) > 1} | self.entered
        return [Seen(one.choice, one.samples, one.loss - self.base) for one in everything.values()]

    def tell(self) -> None:
        """Report progress."""
        self._scores += 1
        limit = self.problem.image_limit
        left = CANDIDATES if limit is None else max(0, limit - self.problem.images() + self._first_images)
        self.problem.progress(self.best_loss, self._scores, left)

    def _score(self, choice: np.ndarray, samples: int) -> float:
        loss = self.problem.loss(choice, samples)
        key = tuple(choice.tolist())
        self.entered[key] = Seen(key, samples, loss)
        self.best_loss = min(self.best_loss, loss) if samples == self.problem.stages[-1] else self.best_loss
        self.tell()
        return loss
