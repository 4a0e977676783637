import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from onnx_spdy.pipeline.latency.switches import ALWAYS, NEVER, Cases, all_in_int8, both, either, holds, negated

LAYERS = 5
STATES = [*itertools.product([False, True], repeat=LAYERS)]


def true_cases(cases: Cases, in_int8: Sequence[bool]) -> int:
    return sum(holds((case,), in_int8) for case in cases)


@pytest.mark.parametrize("seed", range(30))
def test_conditions_are_what_they_say_and_their_cases_exclude_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets = [set(rng.permutation(LAYERS)[: rng.integers(1, LAYERS + 1)].tolist()) for _ in range(3)]
    some = [all_in_int8(one) for one in sets]
    any_of, not_any = either(some), negated(either(some))
    mixed = both(negated(some[0]), either(some[1:]))
    for state in STATES:
        truth = [all(state[layer] for layer in one) for one in sets]
        assert holds(any_of, state) is any(truth)
        assert holds(not_any, state) is not any(truth)
        assert holds(mixed, state) is (not truth[0] and any(truth[1:]))
        assert all(true_cases(cases, state) <= 1 for cases in (any_of, not_any, mixed))


def test_what_is_always_or_never() -> None:
    assert all(holds(ALWAYS, state) and not holds(NEVER, state) for state in STATES)
    assert negated(NEVER) == ALWAYS
    assert negated(ALWAYS) == NEVER
    assert either([]) == NEVER
    assert both(all_in_int8([0]), negated(all_in_int8([0]))) == NEVER
