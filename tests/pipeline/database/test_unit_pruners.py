"""Removal of units against the obvious way to do it, on small consumers."""

from importlib import import_module

import numpy as np
import pytest
import torch

from onnx_spdy.pipeline.database.pruners import UNIT_PRUNERS
from onnx_spdy.pipeline.database.pruners.magnitude_units import magnitude_units
from onnx_spdy.pipeline.database.pruners.obs_units import obs_units
from onnx_spdy.pipeline.database.pruners.quadratic import UnusableHessian, damped
from onnx_spdy.pipeline.database.pruners.units import Consumer


def consumer(shape: tuple[int, ...], columns: list[list[int]], seed: int = 0) -> Consumer:
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape[1:]))
    inputs = rng.normal(size=(size, size)) @ rng.normal(size=(size, 8 * size)) * rng.uniform(0.1, 2, (size, 1))
    hessian = torch.from_numpy(inputs @ inputs.T / inputs.shape[1])
    weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return Consumer(weight, hessian, [torch.tensor(one, dtype=torch.long) for one in columns])


def channels(units: int, positions: int) -> list[list[int]]:
    return [[*range(unit * positions, (unit + 1) * positions)] for unit in range(units)]


GROUPS = {
    "product": [consumer((5, 12), channels(12, 1))],
    "convolution": [consumer((6, 8, 3, 3), channels(8, 9))],
    "heads": [consumer((7, 24), channels(6, 4))],
    "two consumers": [consumer((6, 10, 1, 3), channels(10, 3)), consumer((4, 10), channels(10, 1), seed=1)],
    "beside other groups": [consumer((6, 14), [[unit, 13 - unit] for unit in range(5)])],  # 5 to 8 are others'
    "of different sizes": [
        consumer((5, 11), [[0, 1], [2], [3, 4, 5], [], [7], [8, 9]]),  # 6 and 10 are others'
        consumer((4, 12), channels(6, 2), seed=2),
    ],
}


def least_squares(one: Consumer, gone: list[int]) -> torch.Tensor:
    """(out, d) the minimiser without the columns of some units."""
    dense, hessian = one.weight.flatten(1).double(), damped(one.hessian)
    stay = torch.ones(dense.shape[1], dtype=torch.bool)
    for unit in gone:
        stay[one.columns[unit]] = False
    found = torch.zeros_like(dense)
    found[:, stay] = torch.linalg.solve(hessian[stay][:, stay], (dense @ hessian)[:, stay].T).T
    return found


def error(one: Consumer, weight: torch.Tensor) -> float:
    """Of the damped problem, relative to the power of the output."""
    dense = one.weight.flatten(1).double()
    change = weight.flatten(1).double() - dense
    power = float(((dense @ one.hessian) * dense).sum())
    return float(((change @ damped(one.hessian)) * change).sum()) / power


def naive_greedy(consumers: list[Consumer], count: int) -> list[int]:
    """The units that go, first gone first: each time all are tried."""
    gone: list[int] = []
    for _ in range(count):
        left = [unit for unit in range(len(consumers[0].columns)) if unit not in gone]
        costs = [sum(error(one, least_squares(one, [*gone, unit])) for one in consumers) for unit in left]
        gone.append(left[int(np.argmin(costs))])
    return gone


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("pending", [1, 5, 256])
def test_obs_removes_what_trying_all_would(name: str, pending: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("onnx_spdy.pipeline.database.pruners.obs_units"), "PENDING", pending)
    consumers = GROUPS[name]
    units = len(consumers[0].columns)
    order = naive_greedy(consumers, units - 1)
    widths = [units - 1, units - 3, 2, 1]
    for width, (kept, weights) in zip(widths, obs_units(consumers, widths), strict=True):
        gone = order[: units - width]
        assert kept.tolist() == sorted({*range(units)} - {*gone})
        for one, weight in zip(consumers, weights, strict=True):
            assert weight.shape == one.weight.shape
            torch.testing.assert_close(weight.flatten(1).double(), least_squares(one, gone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("pruner", UNIT_PRUNERS)
def test_what_every_unit_pruner_promises(name: str, pruner: str) -> None:
    consumers = GROUPS[name]
    units, before = len(consumers[0].columns), [one.weight.clone() for one in consumers]
    widths = [*range(units - 1, 0, -1)]
    errors, seen = [0.0], []
    for width, (kept, weights) in zip(widths, UNIT_PRUNERS[pruner](consumers, widths), strict=True):
        assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == width
        for one, weight in zip(consumers, weights, strict=True):
            gone = [unit for unit in range(units) if unit not in kept]
            assert not weight.flatten(1)[:, torch.cat([one.columns[unit] for unit in gone])].any()
        errors.append(sum(error(one, weight) for one, weight in zip(consumers, weights, strict=True)))
        seen += weights
    assert all(torch.equal(one.weight, old) for one, old in zip(consumers, before, strict=True))
    assert len({weight.data_ptr() for weight in seen}) == len(seen)
    if pruner != "magnitude":  # whose errors may also fall
        assert errors == sorted(errors)


@pytest.mark.parametrize("name", GROUPS)
def test_obs_loses_less_than_magnitude(name: str) -> None:
    consumers = GROUPS[name]
    widths = [*range(len(consumers[0].columns) - 1, 0, -1)]
    for (_, fine), (_, coarse) in zip(obs_units(consumers, widths), magnitude_units(consumers, widths), strict=True):
        errors = [sum(map(error, consumers, weights)) for weights in (fine, coarse)]
        assert errors[0] <= errors[1]


def test_each_consumer_counts_relative_to_its_own_output() -> None:
    first, second = GROUPS["two consumers"]
    louder = Consumer(first.weight * 100, first.hessian, first.columns)
    for pruner in UNIT_PRUNERS.values():
        kept = [[units.tolist() for units, _ in pruner([one, second], [7, 4])] for one in (first, louder)]
        assert kept[0] == kept[1]


def test_magnitude_keeps_the_units_of_largest_norm_as_they_are() -> None:
    weight = torch.tensor([[1.0, 0.0, 3.0, 0.1], [-1.0, 2.0, 0.0, 0.1]])
    one = Consumer(weight, torch.eye(4, dtype=torch.float64), [torch.tensor([unit]) for unit in range(4)])
    (_, _), (units, (found,)) = magnitude_units([one], [3, 2])
    assert units.tolist() == [1, 2]
    assert found.tolist() == [[0.0, 0.0, 3.0, 0.0], [0.0, 2.0, 0.0, 0.0]]


def test_units_that_see_nothing_go_first() -> None:
    one = consumer((5, 12), channels(12, 1))
    hessian = torch.eye(12, dtype=torch.float64)
    hessian[3, 3] = hessian[7, 7] = 0.0
    ((units, (weight,)),) = obs_units([Consumer(one.weight, hessian, one.columns)], [10])
    assert units.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    torch.testing.assert_close(weight[:, units], one.weight[:, units])
    ((units, _),) = obs_units([Consumer(one.weight, torch.zeros_like(hessian), one.columns)], [6])
    assert units.tolist() == one.weight.square().sum(0).topk(6).indices.sort().values.tolist()


def test_a_hessian_that_no_inputs_can_have_is_refused() -> None:
    one = consumer((5, 12), channels(12, 1))
    for wrong in (float("nan"), float("inf"), -1.0):
        hessian = one.hessian.clone()
        hessian[3, 3] = wrong
        with pytest.raises(UnusableHessian):
            list(obs_units([Consumer(one.weight, hessian, one.columns)], [6]))
