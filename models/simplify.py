"""onnxslim, one step at a time: what it does to a graph is left out where it breaks the graph.

Source: https://github.com/inisis/OnnxSlim
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence

import onnx

from onnx_spdy.models.graph import ModelError, one_line

logger = logging.getLogger(__name__)

# weight_tying merges equal small tensors, so that biases of different layers (all zero, say) become one, which
# can't be corrected for one of them any more.
SKIPPED_OPTIMISATIONS = frozenset({"weight_tying"})
# These put a transposed or scaled copy under a new name in the place of a weight of the user's network.
SKIPPED_FUSIONS = frozenset({"FusionGemm", "FusionGemmMul", "FusionGemmAdd"})
FUSION = "graph_fusion"  # the optimisation that is made of all fusions
WHOLE = "reading and writing"  # what onnxslim does besides all steps; without it there is no onnxslim


def all_steps() -> list[str]:
    """The names of what onnxslim does: as a whole, then optimisations, then fusions of nodes."""
    optimisations = [name for name in _optimisations() if name not in SKIPPED_OPTIMISATIONS | {FUSION}]
    return [WHOLE, *optimisations, *(name for name in _fusions() if name not in SKIPPED_FUSIONS)]


def slim(model: onnx.ModelProto, steps: Sequence[str]) -> onnx.ModelProto:
    """The graph after these steps.

    Raises:
        ModelError: onnxslim fails.
    """
    import onnxslim

    fusions = [name for name in _fusions() if name not in steps]
    optimisations = [name for name in _optimisations() if name not in steps and name != FUSION]
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return onnxslim.slim(model, skip_optimizations=optimisations, skip_fusion_patterns=fusions)
        except Exception as exc:  # anything may come out of a graph that it didn't foresee
            raise ModelError(f"onnxslim can't simplify this graph: {one_line(f'{type(exc).__name__}: {exc}')}") from exc


def simplified(attempt: Callable[[Sequence[str]], onnx.ModelProto]) -> onnx.ModelProto:
    """What `attempt` makes with as many of the steps as don't break it.

    Where all steps together break the graph, halving finds one that breaks it when only those before it are done too;
    that one is left out, and so on.

    Args:
        attempt: prepares the graph with some of the steps; raises ModelError where that breaks it. Without steps it
            does without onnxslim.
    Raises:
        ModelError: the graph breaks without onnxslim too.
    """
    steps = all_steps()
    plain = None
    while steps:
        try:
            return attempt(steps)
        except ModelError as exc:
            broken = exc
        plain = plain or attempt([])
        culprit = _culprit(attempt, steps)
        what = "onnxslim" if culprit == WHOLE else f"onnxslim's step {culprit}"
        logger.warning("%s was left out, because it breaks this network: %s", what, broken)
        steps = [] if culprit == WHOLE else [name for name in steps if name != culprit]
    assert plain is not None
    return plain


def _culprit(attempt: Callable[[Sequence[str]], onnx.ModelProto], steps: Sequence[str]) -> str:
    """A step that breaks the graph after those before it, which don't. It breaks with all, and not with none."""
    good, bad = 0, len(steps)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            attempt(steps[:middle])
            good = middle
        except ModelError:
            bad = middle
    return steps[bad - 1]


def _optimisations() -> list[str]:
    from onnxslim.core.optimization import OptimizationSettings

    return OptimizationSettings.keys()


def _fusions() -> list[str]:
    from onnxslim.core.pattern.registry import DEFAULT_FUSION_PATTERNS

    return list(DEFAULT_FUSION_PATTERNS)
