import numpy as np
import pytest
import torch

from onnx_spdy.pipeline.hessian import squared_error
from onnx_spdy.pipeline.level import Level, levels_for
from onnx_spdy.pipeline.pruners import PRUNERS, Pruner, UnknownPruner, one_level, pruner_named
from onnx_spdy.pipeline.pruners.magnitude import magnitude
from onnx_spdy.pipeline.pruners.obs import obs, reconstruct

SHAPES = [(12, 16), (8, 12, 3, 3), (6, 20, 1, 1), (4, 16, 3)]


def layer(shape: tuple[int, ...], seed: int = 0, dead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Hessian of correlated inputs, of which the first `dead` are always zero."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape[1:]))
    inputs = rng.normal(size=(size, 6 * size)) + rng.normal(size=(1, 6 * size))
    inputs[:dead] = 0
    weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return weight, torch.from_numpy(inputs @ inputs.T / inputs.shape[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("pattern", ["unstructured", "block4", "2:4", "4:8"])
def test_every_pruner_gives_every_level_its_zeros(name: str, pattern: str, shape: tuple[int, ...]) -> None:
    weight, hessian = layer(shape)
    levels = levels_for(pattern)[1:]
    for level, pruned in zip(levels, PRUNERS[name](weight, hessian, levels), strict=True):
        assert pruned.shape == weight.shape
        assert pruned.dtype == weight.dtype
        assert bool(torch.isfinite(pruned).all())
        zeros = int((pruned == 0).sum())
        if pattern == "unstructured":
            assert zeros == level.zeros(weight.numel())
        elif level.is_n_of_m:
            kept, size = level.group
            runs = torch.nn.functional.pad(pruned.movedim(1, -1) != 0, (0, -shape[1] % size)).unflatten(-1, (-1, size))
            assert int(runs.sum(-1).max()) <= kept
        else:
            assert zeros >= 0.9 * level.sparsity * weight.numel()


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_is_deterministic_and_leaves_its_input_alone(name: str) -> None:
    weight, hessian = layer((8, 12, 3, 3))
    levels = levels_for("unstructured")[1::10]
    copies = weight.clone(), hessian.clone()
    first, second = list(PRUNERS[name](weight, hessian, levels)), list(PRUNERS[name](weight, hessian, levels))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_survives_dead_inputs_and_a_dead_layer(name: str) -> None:
    for dead in (5, 16):
        weight, hessian = layer((12, 16), dead=dead)
        for pruned in PRUNERS[name](weight, hessian, levels_for("unstructured")[1::8]):
            assert bool(torch.isfinite(pruned).all())


def naive_least_squares(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Row by row, the exact minimiser over the kept weights."""
    solution = torch.zeros_like(weight, dtype=torch.float64)
    for row, keep in enumerate(mask):
        right = hessian[keep] @ weight[row].double()
        solution[row, keep] = torch.linalg.solve(hessian[keep][:, keep], right)
    return solution


def test_reconstruction_converges_to_exact_least_squares() -> None:
    weight, hessian = layer((6, 30))
    mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    exact = naive_least_squares(weight, hessian, mask)
    found = reconstruct(weight.double(), weight.double(), hessian, mask, iterations=60)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8)
    assert bool((found[~mask] == 0).all())


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


def test_obs_comes_close_to_exact_greedy_obs_and_well_below_magnitude() -> None:
    weight, hessian = layer((4, 16), seed=3)
    levels = levels_for("unstructured")[1:]
    for level, fast, plain in zip(
        levels, obs(weight, hessian, levels), magnitude(weight, hessian, levels), strict=True
    ):
        if level.sparsity not in (levels[5].sparsity, levels[15].sparsity):
            continue
        exact = squared_error(naive_obs(weight, hessian, level.zeros(64)) - weight, hessian)
        assert squared_error(fast.double() - weight, hessian) < 1.3 * exact
        assert squared_error(fast.double() - weight, hessian) < 0.6 * squared_error(plain.double() - weight, hessian)


def test_a_users_function_is_a_pruner() -> None:
    def zero_all(weight: torch.Tensor, hessian: torch.Tensor, level: Level) -> torch.Tensor:
        return torch.zeros_like(weight)

    pruner: Pruner = one_level(zero_all)
    weight, hessian = layer((4, 8))
    assert [int(one.count_nonzero()) for one in pruner(weight, hessian, levels_for("unstructured")[1:3])] == [0, 0]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownPruner, match="magnitude, obs"):
        pruner_named("best")
