"""One magnitude threshold for the whole network: layers with small weights become sparser."""

from __future__ import annotations

import numpy as np

from onnx_spdy.pipeline.search.methods.problem import InfeasibleTarget, SearchProblem, SearchResult

STEPS = 1000  # of the network's sparsity


def global_magnitude(problem: SearchProblem) -> SearchResult:
    """The lowest global threshold that meets the budget by the table.

    Each layer gets the level whose sparsity is nearest to the fraction of its weights below the threshold.

    Raises:
        InfeasibleTarget: no threshold does.
    """
    magnitudes = [np.sort(problem.magnitudes(layer).reshape(-1)) for layer in range(problem.layer_count)]
    everything = np.sort(np.concatenate(magnitudes))
    sparsities = np.array([level.sparsity for level in problem.levels])
    for step in range(STEPS):
        threshold = everything[int(step / STEPS * len(everything))]
        below = np.array([np.searchsorted(one, threshold) / len(one) for one in magnitudes])
        choice = np.abs(below[:, None] - sparsities).argmin(axis=1)
        if problem.is_feasible(choice):
            return SearchResult(choice)
    raise InfeasibleTarget("no global magnitude threshold meets the budget; lower --speedup or use another --search")
