"""The solver alone: least sum of the layer errors that the database measured. Not one evaluation of the network.

Source: Frantar & Alistarh, OBC (NeurIPS 2022), section 6 (non-uniform compression by measured layer losses).
"""

from __future__ import annotations

from onnx_spdy.pipeline.search.methods.problem import SearchProblem, SearchResult


def dp(problem: SearchProblem) -> SearchResult:
    """The choice of least total relative squared output error."""
    return SearchResult(problem.solve(problem.errors), problem.errors)
