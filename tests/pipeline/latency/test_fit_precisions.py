"""Networks in int8 and floating point: times that a known rule makes are found again."""

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.models.int8.form import FORMS
from onnx_spdy.models.int8.place import find_placement
from onnx_spdy.pipeline.latency.equations import Fit, Row, Trial
from onnx_spdy.pipeline.latency.in_int8 import InInt8
from onnx_spdy.pipeline.latency.precisions import Precisions
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.solve import solve, total_error
from onnx_spdy.runtimes import Workload
from tests.models.int8.writing import residual

NETWORK, CONVS = Prepared(residual()), 6
LEVELS = levels_for("int8")


def truth(choice: Sequence[int]) -> dict[str, float]:
    """Seconds of each row: 4 ms a convolution, 1 ms in int8; an addition takes 1 ms, in int8 0.2 ms, a pool 0.3 ms; a
    tensor that is made in one way and read in the other takes 0.5 ms more where it is made."""
    chosen = {f"conv{number}" for number, level in enumerate(choice) if level}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in NETWORK.proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    points = find_placement(NETWORK.proto, FORMS["fake"], chosen).points if chosen else {}

    def is_int8(node: onnx.NodeProto) -> bool:
        if node.op_type == "Add":
            return any((node.name, number) in reader for reader in points.values() for number in (0, 1))
        return node.name in chosen

    seconds = {}
    for node in NETWORK.proto.graph.node:
        if node.op_type == "MaxPool":
            seconds[node.output[0]] = 3e-4
        if node.op_type in ("Relu", "MaxPool"):
            continue
        output = node.output[0]
        after = readers.get(output, [])
        while after and after[0].op_type in ("Relu", "MaxPool"):
            after = readers[after[0].output[0]]
        float_seconds, int8_seconds = (1e-3, 2e-4) if node.op_type == "Add" else (4e-3, 1e-3)
        own = is_int8(node)
        seconds[output] = int8_seconds if own else float_seconds
        if own and not all(map(is_int8, after)) and after:
            seconds[output] += 5e-4
        if not own and any(map(is_int8, after)):
            seconds[output] += 5e-4
    return seconds


def fitted(noise: float) -> Fit:
    rng = np.random.default_rng(0)
    kind = Precisions(NETWORK, LEVELS, InInt8(NETWORK, FORMS["fake"], Workload(2)))
    dense = sum(truth([0] * CONVS).values())
    trials = []
    for choice in kind.plan(rng):
        rows = [Row((name,), value * np.exp(noise * rng.normal())) for name, value in truth(choice).items()]
        relative = sum(truth(choice).values()) / dense * np.exp(noise / 5 * rng.normal())
        trials.append(Trial(tuple(choice.tolist()), tuple(rows), 0.0, relative, 0.01))
    return kind.fit(trials, dense)


@pytest.mark.parametrize(("noise", "median", "largest"), [(0.0, 0.01, 0.05), (0.05, 0.02, 0.08)])
def test_known_times_are_found_again(noise: float, median: float, largest: float) -> None:
    fit, dense = fitted(noise), sum(truth([0] * CONVS).values())
    errors = [
        abs(fit.relative(np.array(choice)) / (sum(truth(choice).values()) / dense) - 1)
        for choice in itertools.product([0, 1], repeat=CONVS)
    ]
    assert np.median(errors) < median
    assert max(errors) < largest


def test_the_solver_finds_the_best_mix_for_them() -> None:
    fit, rng = fitted(0.0), np.random.default_rng(1)
    choices = [np.array(one) for one in itertools.product([0, 1], repeat=CONVS)]
    slowest, fastest = (fit.costs.total(np.full(CONVS, level)) for level in (0, 1))
    assert fit.costs.fastest().all()
    gaps = []
    for share in np.linspace(0.1, 0.9, 9):
        errors = rng.random((CONVS, 1)) * [0.0, 1.0]
        budget = fastest + share * (slowest - fastest)
        found = solve(errors, fit.costs, budget)
        assert fit.costs.total(found) <= budget
        best = min(total_error(errors, one) for one in choices if fit.costs.total(one) <= budget)
        gaps.append(total_error(errors, found) - best)
    assert np.median(gaps) < 1e-9
    assert max(gaps) < 0.5
