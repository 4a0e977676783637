"""A control: as many random layer sensitivities as fit in the limit, the best of them kept; nothing is learned."""

from __future__ import annotations

import numpy as np

from onnx_spdy.pipeline.search.methods.problem import SearchProblem, SearchResult

DRAWS = 100  # without an sample limit


def random(problem: SearchProblem) -> SearchResult:
    """The profile of least loss among those that the solver makes of random sensitivities and quadratic errors."""
    prior = np.square(np.arange(len(problem.levels)) / (len(problem.levels) - 1))  # (levels,)
    limit = np.inf if problem.sample_limit is None else problem.samples_run() + problem.sample_limit
    draws = DRAWS if problem.sample_limit is None else max(1, problem.sample_limit // problem.stages[-1])
    best_loss, best = np.inf, SearchResult(problem.solve(np.tile(prior, (problem.layer_count, 1))))
    for draw in range(draws):
        errors = problem.rng.random((problem.layer_count, 1)) * prior
        choice = problem.solve(errors)
        loss = problem.loss(choice)
        if loss < best_loss:
            best_loss, best = loss, SearchResult(choice, errors)
        problem.tell(best_loss, draw + 1, draws - draw - 1)
        if problem.is_over() or problem.samples_run() >= limit:
            break
    return best
