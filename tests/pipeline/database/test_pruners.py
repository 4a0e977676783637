from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch

from onnx_spdy.pipeline.database.hessian import squared_error
from onnx_spdy.pipeline.database.pruners import Pruner, PrunerResult, UnknownPruner, one_level, pruner_named
from onnx_spdy.pipeline.database.pruners.elimination import Units, eliminate, eliminate_rest
from onnx_spdy.pipeline.database.pruners.low_rank import LowRank
from onnx_spdy.pipeline.database.pruners.obc import eliminated, obc
from onnx_spdy.pipeline.database.pruners.obs import obs
from onnx_spdy.pipeline.database.pruners.quadratic import UnusableHessian, damped, reconstruct, solve_nested
from onnx_spdy.pipeline.level import Level, levels_for


def layer(shape: tuple[int, ...], seed: int = 0, dead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Hessian of correlated inputs, of which the first `dead` are always zero."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape[1:]))
    inputs = rng.normal(size=(size, 6 * size)) + rng.normal(size=(1, 6 * size))
    inputs[:dead] = 0
    weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return weight, torch.from_numpy(inputs @ inputs.T / inputs.shape[1])


def naive_least_squares(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Row by row, the exact minimiser over the kept weights."""
    solution = torch.zeros_like(weight, dtype=torch.float64)
    for row, keep in enumerate(mask):
        right = hessian[keep] @ weight[row].double()
        solution[row, keep] = torch.linalg.solve(hessian[keep][:, keep], right)
    return solution


@pytest.mark.parametrize(("rank", "iterations"), [(0, 60), (12, 20)], ids=["diagonal", "low rank"])
def test_reconstruction_converges_to_exact_least_squares(rank: int, iterations: int) -> None:
    weight, hessian = layer((6, 30))
    mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    exact = naive_least_squares(weight, hessian, mask)
    inverse = LowRank(hessian, rank).on(mask)
    found = reconstruct(weight.double(), weight.double(), hessian, mask, iterations, inverse)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    assert bool((found[~mask] == 0).all())


def test_a_low_rank_inverse_is_that_of_the_matrix_on_each_mask() -> None:
    factor = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 3)))
    matrix = factor @ factor.T + torch.diag(torch.linspace(1, 2, 40).double())  # nearly what rank 3 holds
    mask = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    inverse, whole = LowRank(matrix, 3).on(mask), LowRank(matrix, 3)
    approximate = whole._factor @ whole._factor.T + torch.diag(whole._rest)
    torch.testing.assert_close(approximate.diagonal(), matrix.diagonal())
    for row, keep in enumerate(mask):
        exact = torch.linalg.inv(approximate[keep][:, keep])
        right = torch.zeros(5, 40, dtype=torch.float64)
        right[row, keep] = torch.linspace(-1, 1, int(keep.sum())).double()
        torch.testing.assert_close(inverse(right)[row, keep], exact @ right[row, keep])
        torch.testing.assert_close(inverse.diagonal()[row, keep], exact.diagonal())
        real = torch.linalg.inv(matrix[keep][:, keep]).diagonal()
        torch.testing.assert_close(inverse.diagonal()[row, keep], real, rtol=0.2, atol=0)
        assert not bool(inverse(right)[row, ~keep].any())


def naive_obs(weight: torch.Tensor, hessian: torch.Tensor, zeros: int) -> torch.Tensor:
    """Exact greedy OBS over the whole layer, one weight at a time, in the obvious way."""
    pruned, alive = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    for _ in range(zeros):
        best = None
        for row in range(len(weight)):
            inverse = torch.zeros_like(hessian)
            keep = torch.nonzero(alive[row]).flatten()
            inverse[keep[:, None], keep] = torch.linalg.inv(hessian[keep][:, keep])
            for column in keep.tolist():
                saliency = float(pruned[row, column] ** 2 / inverse[column, column])
                if best is None or saliency < best[0]:
                    best = saliency, row, column, inverse
        _, row, column, inverse = best
        pruned[row] -= pruned[row, column] / inverse[column, column] * inverse[:, column]
        pruned[row, column], alive[row, column] = 0.0, False
        pruned[row, ~alive[row]] = 0.0
    return pruned


@pytest.mark.parametrize("shape", [(4, 16), (3, 2, 3, 3)])
def test_obc_equals_naive_greedy_obs(shape: tuple[int, ...]) -> None:
    weight, hessian = layer(shape, seed=3)
    weight = weight.double()  # so that nothing is rounded
    levels = levels_for("unstructured")[1::5]
    for level, found in zip(levels, obc(weight, hessian, levels), strict=True):
        flat = weight.flatten(1)
        exact = naive_obs(flat, damped(hessian), level.zeros(weight.numel()))
        torch.testing.assert_close(found.flatten(1), exact, rtol=1e-6, atol=1e-6)


def naive_grouped_obs(weight: torch.Tensor, hessian: torch.Tensor, level: Level) -> torch.Tensor:
    """Exact greedy OBS of rows (out, d) with one mask, in runs: blocks go as a whole, N:M single weights that a run can
    spare."""
    pruned, alive = weight.double().clone().T, torch.ones(weight.shape[1], dtype=torch.bool)
    blocks = not level.is_n_of_m
    size = level.block[1] if blocks else level.group[1]
    runs = torch.arange(weight.shape[1]).split(size)
    removals = level.zeros(len(runs)) if blocks else len(runs) * (size - level.group[0])
    for _ in range(removals):
        keep = torch.nonzero(alive).flatten()
        inverse = torch.zeros_like(hessian)
        inverse[keep[:, None], keep] = torch.linalg.inv(hessian[keep][:, keep])
        if blocks:
            choices = [run for run in runs if bool(alive[run].all())]
        else:
            spare = [run for run in runs if int(alive[run].sum()) > level.group[0]]
            choices = [one.view(1) for run in spare for one in run if bool(alive[one])]

        costs = [
            float((pruned[one] * torch.linalg.solve(inverse[one[:, None], one], pruned[one])).sum()) for one in choices
        ]
        unit = choices[int(np.argmin(costs))]
        pruned -= inverse[:, unit] @ torch.linalg.solve(inverse[unit[:, None], unit], pruned[unit])
        alive[unit] = False
        pruned[~alive] = 0.0
    return pruned.T


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "block4@0.5000", "blockout2@0.5000", "blockout8@0.7000"])
def test_obc_equals_naive_greedy_obs_in_runs(text: str) -> None:
    level = Level.parse(text)
    weight, hessian = layer((level.block[0], 24), seed=4)
    weight = weight.double()
    (found,) = obc(weight, hessian, [level])
    torch.testing.assert_close(found, naive_grouped_obs(weight, damped(hessian), level), rtol=1e-6, atol=1e-6)


def test_blocks_of_outputs_share_a_layers_zeros_by_what_they_cost() -> None:
    weight, hessian = layer((8, 24), seed=6)
    weight = weight.double()
    weight[4:] *= 100  # nothing of these goes before all of the others
    first, all_ = obc(weight, hessian, [Level("blockout4", 0.25), Level("blockout4", 0.5)])
    torch.testing.assert_close(
        first[:4], naive_grouped_obs(weight[:4], damped(hessian), Level("blockout4", 0.5)), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(first[4:], weight[4:])
    assert not bool(all_[:4].any())


def test_traces_of_many_panels_equal_naive_greedy_obs(monkeypatch: pytest.MonkeyPatch) -> None:
    elimination = import_module("onnx_spdy.pipeline.database.pruners.elimination")
    monkeypatch.setattr(elimination, "PANEL_PART", 1)
    monkeypatch.setattr(elimination, "CANDIDATES", 100)  # all
    monkeypatch.setattr(elimination, "TAIL", 2)
    monkeypatch.setattr(elimination, "PANEL", 3)  # so that panels and cuts come often
    monkeypatch.setattr(elimination, "STATE_BYTES", 1)  # and each row comes alone
    test_obc_equals_naive_greedy_obs((4, 16))
    monkeypatch.setitem(globals(), "obc", partial(eliminated, panels=True))
    test_obc_equals_naive_greedy_obs((4, 16))
    test_obc_equals_naive_greedy_obs_in_runs("2:4")
    test_obc_equals_naive_greedy_obs_in_runs("block4@0.5000")
    test_obc_equals_naive_greedy_obs_in_runs("blockout2@0.5000")


@pytest.mark.parametrize(("trace_width", "most"), [(1152, 1.02), (0, 1.1)], ids=["traces", "ladder"])
def test_the_default_comes_close_to_exact_obs(monkeypatch: pytest.MonkeyPatch, trace_width: int, most: float) -> None:
    for name in ("TRACE_WIDTH", "CORRELATED_TRACE_WIDTH"):
        monkeypatch.setattr(import_module("onnx_spdy.pipeline.database.pruners.obs"), name, trace_width)
    weight, hessian = layer((8, 16, 3, 3), seed=3)
    levels = levels_for("unstructured")[1::10]
    for fast, exact in zip(obs(weight, hessian, levels), obc(weight, hessian, levels), strict=True):
        errors = [squared_error((pruned - weight).flatten(1).double(), hessian) for pruned in (fast, exact)]
        assert errors[0] < most * errors[1]


@pytest.mark.parametrize(("samples", "traced"), [(20, True), (2000, False)], ids=["few", "many"])
def test_the_default_traces_wider_layers_where_samples_are_fewer_than_inputs(
    monkeypatch: pytest.MonkeyPatch, samples: int, traced: bool
) -> None:
    monkeypatch.setattr(import_module("onnx_spdy.pipeline.database.pruners.obs"), "TRACE_WIDTH", 60)
    inputs = torch.randn(64, samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight, hessian = layer((8, 64), seed=5)[0], inputs @ inputs.T / samples
    levels = levels_for("unstructured")[1::10]
    traces = eliminated(weight, hessian, levels, panels=True)
    assert traced is all(torch.equal(a, b) for a, b in zip(obs(weight, hessian, levels), traces, strict=True))


@pytest.mark.parametrize("text", ["unstructured@0.5000", "block4@0.5000", "blockout2@0.5000"])
def test_traces_may_start_anywhere_on_the_way(text: str) -> None:
    level = Level.parse(text)
    outputs = level.block[0]
    weight, hessian = layer((6 * outputs, 30), seed=7, dead=2)
    hessian = damped(hessian)
    units, dense = Units.of(weight.shape, level), weight.double()
    order, losses = eliminate(dense, torch.linalg.inv(hessian), units, panels=True)
    gone = torch.tensor([0, 1, 4, 5, 2, len(units.columns)])  # of each row; the last has nothing left
    mask = torch.ones(6 * outputs, 30, dtype=torch.bool)
    for row, count in enumerate(gone.tolist()):
        columns = units.columns[order[row, :count]].flatten()
        mask[row * outputs : (row + 1) * outputs, columns[columns >= 0]] = False
    later, costs = eliminate_rest(dense, hessian, units, mask)
    for row, count in enumerate(gone.tolist()):
        assert sorted(later[row, :count].tolist()) == sorted(order[row, :count].tolist())
        assert later[row, count:].tolist() == order[row, count:].tolist()
        torch.testing.assert_close(costs[row, count:], losses[row, count:])
        assert not bool(costs[row, :count].any())


def test_nested_masks_are_solved_exactly() -> None:
    weight, hessian = layer((6, 30))
    mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[3] = False
    exact = naive_least_squares(weight, hessian, mask)
    target = weight.double() @ hessian
    for row, keep in enumerate(mask):
        order = torch.cat([torch.nonzero(keep).flatten(), torch.nonzero(~keep).flatten()])
        (nested, nothing) = solve_nested(hessian, target[row : row + 1], order, [int(keep.sum()), 0])
        torch.testing.assert_close(nested[0], exact[row], rtol=1e-8, atol=1e-9)
        assert not bool(nothing.any())


def test_a_users_function_is_a_pruner() -> None:
    def zero_all(weight: torch.Tensor, hessian: torch.Tensor, level: Level) -> torch.Tensor:
        return torch.zeros_like(weight)

    pruner: Pruner = one_level(zero_all)
    weight, hessian = layer((4, 8))
    assert [int(one.count_nonzero()) for one in pruner(weight, hessian, levels_for("unstructured")[1:3])] == [0, 0]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownPruner, match="magnitude, adaprune"):
        pruner_named("best")


@pytest.mark.parametrize("name", ["adaprune", "sparsegpt", "obc", "obs"])
@pytest.mark.parametrize("wrong", ["nan", "infinite", "negative", "huge", "tiny"])
def test_a_hessian_that_no_inputs_can_have_is_refused_by_every_pruner_that_reads_it(name: str, wrong: str) -> None:
    weight, hessian = layer((4, 12))
    if wrong in ("huge", "tiny"):
        hessian *= {"huge": 1e60, "tiny": 1e-60}[wrong]
    else:
        hessian[3, 3] = {"nan": float("nan"), "infinite": float("inf"), "negative": -1.0}[wrong]
    with pytest.raises(UnusableHessian):
        list(pruner_named(name).prune(weight, hessian, [Level.parse("unstructured@0.5")]))


@pytest.mark.parametrize("name", ["sparsegpt", "obc", "obs"])
def test_a_hessian_that_is_not_positive_definite_is_refused_where_it_is_inverted(name: str) -> None:
    weight, hessian = layer((4, 12))
    hessian[3, 4] = hessian[4, 3] = 100 * hessian.diagonal().max()
    with pytest.raises(UnusableHessian, match="positive definite"):
        list(pruner_named(name).prune(weight, hessian, [Level.parse("unstructured@0.5")]))


@pytest.mark.parametrize("name", ["adaprune", "sparsegpt", "obc", "obs"])
def test_inputs_of_low_rank_or_none_at_all_are_pruned(name: str) -> None:
    weight, hessian = layer((4, 12))
    vector = hessian[0]
    for singular in (vector[:, None] * vector, torch.zeros_like(hessian)):
        (found,) = pruner_named(name).prune(weight, singular, [Level.parse("unstructured@0.5")])
        assert bool(torch.isfinite(found).all()) and float((found == 0).float().mean()) == 0.5


@pytest.mark.parametrize(
    "wrong", [None, 5, [1.0], torch.ones(2, 3, dtype=torch.int32), torch.zeros(2, 3, device="meta")]
)
def test_what_a_users_pruner_returns_instead_of_weights_is_refused(wrong) -> None:
    pruner: Pruner = one_level(lambda weight, hessian, level: wrong)
    with pytest.raises(PrunerResult, match="the pruner returned"):
        list(pruner(torch.ones(2, 3), torch.eye(3), [Level("unstructured", 0.5)]))


@pytest.mark.parametrize("kind", [torch.Tensor.to_sparse, torch.Tensor.double, torch.nn.Parameter, torch.Tensor.numpy])
def test_a_users_pruner_may_return_any_kind_of_real_weights(kind) -> None:
    pruned = torch.tensor([[1.0, 0, 2], [0, 0, 3]])
    (found,) = one_level(lambda weight, hessian, level: kind(pruned))(
        torch.ones(2, 3), torch.eye(3), [Level("unstructured", 0.5)]
    )
    assert torch.equal(found, pruned) and found.layout == torch.strided
