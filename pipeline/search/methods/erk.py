"""Erdos-Renyi-kernel: a layer keeps a fraction of its weights that falls with its size.

Source: Evci et al., RigL (ICML 2020), section 3 (ERK); after Mocanu et al., SET (2018).
"""

from __future__ import annotations

import numpy as np

from onnx_spdy.pipeline.search.methods.problem import InfeasibleTarget, SearchProblem, SearchResult

STEPS = 1000  # of the scale


def erk(problem: SearchProblem) -> SearchResult:
    """The largest scale of the densities that meets the budget by the table.

    A layer of shape (out, in, *kernel) has a density in proportion to the sum of these sizes over their
    product, at most 1; it gets the level whose density is nearest.

    Raises:
        InfeasibleTarget: no scale does.
    """
    shapes = [problem.magnitudes(layer).shape for layer in range(problem.layer_count)]
    raw = np.array([sum(shape) / np.prod(shape) for shape in shapes])
    densities = 1 - np.array([level.sparsity for level in problem.levels])
    for scale in np.geomspace(1 / raw.min(), densities[-1] / raw.max(), STEPS):
        wanted = np.minimum(scale * raw, 1)
        choice = np.abs(wanted[:, None] - densities).argmin(axis=1)
        if problem.is_feasible(choice):
            return SearchResult(choice)
    raise InfeasibleTarget(
        "no scale of the Erdos-Renyi-kernel densities meets the budget; lower --speedup or use another --search"
    )
