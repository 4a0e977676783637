"""What every pruner promises, for every pattern: one contract, over all of PRUNERS."""

from collections.abc import Iterator
from importlib import import_module

import numpy as np
import pytest
import torch

from onnx_spdy.pipeline.database.hessian import squared_error
from onnx_spdy.pipeline.database.pruners import PRUNERS, Pruner
from onnx_spdy.pipeline.level import DENSE, Level, levels_for

SHAPES = [(8, 16), (4, 12, 3, 3), (6, 10), (5, 7, 3), (4, 18, 1, 1)]  # the last three have ragged runs
PATTERNS = ["unstructured", "block4", "blockout2", "blockout4", "blockout8", "2:4", "4:8", "1:4", "3:5"]


@pytest.fixture(params=[*PRUNERS, "obs of a wide layer"])
def pruner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pruner]:
    if request.param == "obs of a wide layer":
        for name in ("TRACE_WIDTH", "CORRELATED_TRACE_WIDTH"):
            monkeypatch.setattr(import_module("onnx_spdy.pipeline.database.pruners.obs"), name, 0)
    yield PRUNERS[request.param.split()[0]]


def layer(shape: tuple[int, ...], samples: int = 6, dead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the Hessian of `samples` * d correlated inputs of which the first `dead` are always zero."""
    rng = np.random.default_rng(sum(shape))
    size = int(np.prod(shape[1:]))
    inputs = rng.normal(size=(size, max(1, samples * size))) + rng.normal(size=(1, max(1, samples * size)))
    inputs[:dead] = 0
    weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    return weight, torch.from_numpy(inputs @ inputs.T / inputs.shape[1])


def some_levels(pattern: str) -> tuple[Level, ...]:
    return levels_for(pattern)[1::20]  # 40, about 92 and 99 %; an N:M pattern has one level


def runs_of(weight: torch.Tensor, size: int) -> list[np.ndarray]:
    """Every run of `size` input channels at one output channel and kernel position; the last may be shorter."""
    rows = np.moveaxis(weight.numpy(), 1, -1).reshape(-1, weight.shape[1])
    return [row[start : start + size] for row in rows for start in range(0, len(row), size)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_zeros_are_exactly_where_and_as_many_as_the_level_says(
    pruner: Pruner, pattern: str, shape: tuple[int, ...]
) -> None:
    weight, hessian = layer(shape)
    levels = some_levels(pattern)
    for level, pruned in zip(levels, pruner(weight, hessian, levels), strict=True):
        assert pruned.shape == weight.shape
        assert pruned.dtype == weight.dtype
        assert bool(torch.isfinite(pruned).all())
        if pattern == "unstructured":
            assert int((pruned == 0).sum()) == round(level.sparsity * weight.numel())
        elif pattern == "block4":
            runs = runs_of(pruned, 4)
            assert all((run == 0).all() or (run != 0).all() for run in runs)
            assert sum((run == 0).all() for run in runs) == round(level.sparsity * len(runs))
        elif pattern.startswith("blockout"):
            columns = [block for part in pruned.flatten(1).numpy().T for block in np.array_split(
                part, range(level.block[0], len(part), level.block[0]))]  # fmt: skip
            assert all((block == 0).all() or (block != 0).all() for block in columns)
            assert sum((block == 0).all() for block in columns) == round(level.sparsity * len(columns))
        else:
            kept, size = map(int, pattern.split(":"))
            assert all(np.count_nonzero(run) == min(kept, len(run)) for run in runs_of(pruned, size))


def test_patterns_can_be_mixed_and_dense_stays_dense(pruner: Pruner) -> None:
    weight, hessian = layer((6, 16))
    levels = (DENSE, Level("unstructured", 0.4), Level.parse("2:4"), Level("block4", 0.7), Level("unstructured", 0.9))
    found = list(pruner(weight, hessian, levels))
    assert torch.equal(found[0], weight)
    assert [int((one == 0).sum()) for one in found] == [0, 38, 48, 4 * round(0.7 * 24), 86]
    assert len({one.data_ptr() for one in (weight, *found)}) == 6  # nothing is handed out twice


def test_the_same_call_gives_the_same_weights_and_changes_nothing(pruner: Pruner) -> None:
    weight, hessian = layer((8, 12, 3, 3))
    copies = weight.clone(), hessian.clone()
    levels = some_levels("unstructured")
    first, second = list(pruner(weight, hessian, levels)), list(pruner(weight, hessian, levels))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


@pytest.mark.parametrize("pattern", ["unstructured", "block4", "blockout2", "2:4"])
@pytest.mark.parametrize(
    ("samples", "dead", "scale"),
    [(6, 5, 1.0), (6, 16, 1.0), (0, 0, 1.0), (6, 0, 0.0), (6, 0, 1e-12), (6, 0, 1e12)],
    ids=["dead inputs", "all inputs dead", "one sample", "zero weights", "tiny weights", "huge weights"],
)
def test_degenerate_layers_get_finite_weights_and_their_zeros(
    pruner: Pruner, pattern: str, samples: int, dead: int, scale: float
) -> None:
    weight, hessian = layer((12, 16), samples, dead)
    levels = some_levels(pattern)
    for level, pruned in zip(levels, pruner(weight * scale, hessian, levels), strict=True):
        assert bool(torch.isfinite(pruned).all())
        assert int((pruned == 0).sum()) >= round(level.sparsity * weight.numel() / 4) * 4 - 4


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_unit_of_the_inputs_does_not_matter(pruner: Pruner, scale: float) -> None:
    weight, hessian = layer((6, 24))
    levels = some_levels("unstructured")
    plain, scaled = pruner(weight, hessian, levels), pruner(weight, hessian * scale, levels)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(8, 16), (5, 7, 3)], ids=str)
def test_no_pruner_does_worse_than_magnitude(pruner: Pruner, pattern: str, shape: tuple[int, ...]) -> None:
    weight, hessian = layer(shape)
    levels = some_levels(pattern)
    if (
        pruner is PRUNERS["sparsegpt"]
    ):  # its sweep can't adapt what it has passed: with hardly a weight left it can lose
        levels = tuple(level for level in levels if level.sparsity < 0.9)
    plain = PRUNERS["magnitude"](weight, hessian, levels)
    for one, other in zip(pruner(weight, hessian, levels), plain, strict=True):
        errors = [squared_error((pruned - weight).flatten(1).double(), hessian) for pruned in (one, other)]
        assert errors[0] <= 1.0001 * errors[1]


@pytest.mark.parametrize("name", ["magnitude", "sparsegpt", "obc", "obs"])
def test_where_the_docstring_says_so_the_order_of_levels_does_not_matter(name: str) -> None:
    weight, hessian = layer((6, 24))
    graded = [level for pattern in ("unstructured", "block4", "blockout4") for level in levels_for(pattern)[1::13]]
    levels = (*graded, Level.parse("2:4"))
    forward = list(PRUNERS[name](weight, hessian, levels))
    backward = list(PRUNERS[name](weight, hessian, levels[::-1]))[::-1]
    for one, other in zip(forward, backward, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
