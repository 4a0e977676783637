"""SPDY's own search: draw layer sensitivities, let the solver turn them into profiles, keep what loses least.

Source: Frantar & Alistarh, SPDY (ICML 2022), section 3.3 and Algorithm 2.
"""

from __future__ import annotations

import numpy as np

from onnx_spdy.pipeline.search.methods.problem import SearchProblem, SearchResult

DRAWS = 100  # random sensitivities before the local search
PATIENCE = 100  # failures in a row before fewer coordinates are redrawn
REDRAWN = 0.1  # fraction of the coordinates that the local search redraws at first


def spdy(problem: SearchProblem) -> SearchResult:
    """The best profile found.

    The error of layer l at the i-th of n levels is c_l * (i / (n - 1))^2; the sensitivities c in [0, 1]^layers
    are searched: random draws first, then redraws of k random coordinates of the best c, where k goes
    from a tenth of the layers down to 1, one less after `PATIENCE` failures in a row.
    """
    levels = len(problem.levels)
    prior = np.square(np.arange(levels) / (levels - 1))  # (levels,)
    evaluations = 0
    best_loss = np.inf
    best_sensitivity = np.zeros(problem.layer_count)
    best_choice = problem.solve(best_sensitivity[:, None] * prior)

    def is_better(sensitivity: np.ndarray, left: int) -> bool:
        nonlocal best_loss, best_sensitivity, best_choice, evaluations
        choice = problem.solve(sensitivity[:, None] * prior)
        loss = problem.loss(choice)
        evaluations += 1
        better = loss < best_loss
        if better:
            best_loss, best_sensitivity, best_choice = loss, sensitivity, choice
        problem.tell(best_loss, evaluations, left)
        return better

    widest = _widest(problem.layer_count)
    least = least_evaluations(problem.layer_count)
    for draw in range(DRAWS):
        is_better(problem.rng.random(problem.layer_count), least - draw - 1)
        if problem.is_over():
            return SearchResult(best_choice, best_sensitivity[:, None] * prior)
    for width in range(widest, 0, -1):
        failures = 0
        while failures < PATIENCE and not problem.is_over():
            candidate = best_sensitivity.copy()
            redrawn = problem.rng.choice(problem.layer_count, width, replace=False)
            candidate[redrawn] = problem.rng.random(width)
            left = PATIENCE - failures - 1 + (width - 1) * PATIENCE
            failures = 0 if is_better(candidate, left) else failures + 1
    return SearchResult(best_choice, best_sensitivity[:, None] * prior)


def least_evaluations(layers: int) -> int:
    """How many profiles the search scores where no redraw ever helps."""
    return DRAWS + _widest(layers) * PATIENCE


def _widest(layers: int) -> int:
    return max(1, round(REDRAWN * layers))
