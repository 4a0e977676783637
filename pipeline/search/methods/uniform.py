"""The same sparsity in every layer: what most tools do, and what a profile has to beat."""

from __future__ import annotations

import numpy as np

from onnx_spdy.pipeline.search.methods.problem import InfeasibleTarget, SearchProblem, SearchResult


def uniform(problem: SearchProblem) -> SearchResult:
    """The lowest level that, given to all layers, meets the budget by the table.

    Raises:
        InfeasibleTarget: no single level does.
    """
    for index in range(len(problem.levels)):
        choice = np.full(problem.layer_count, index)
        if problem.is_feasible(choice):
            return SearchResult(choice)
    shares = [problem.share(np.full(problem.layer_count, index)) for index in range(len(problem.levels))]
    raise InfeasibleTarget(
        f"no uniform sparsity meets the budget; the fastest, {problem.levels[int(np.argmin(shares))]}, takes "
        f"{min(shares):.4g} times as long as it may; lower --speedup or use another --search"
    )
