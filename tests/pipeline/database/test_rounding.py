"""Rounding with Hessians, against a naive one and against rounding to the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onnx_spdy.models.int8.nearest import nearest
from onnx_spdy.pipeline.database.rounding import integer_weight, rounded


def correlated(width: int, seed: int = 0) -> torch.Tensor:
    """(width, width) H of inputs of which each is much like the one before it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=generator)
    x = x + 0.9 * x.roll(1, 1) + 0.8 * x.roll(2, 1) + 0.5
    return x.T @ x / len(x)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_error(weight: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H D^T) in float64."""
    change = integers.double() * scale.double().unsqueeze(1) - weight.double()
    return float((change @ hessian.double() @ change.T).trace())


def gptq(weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Column by column, with the inverse of what is left of H, in float64."""
    left, integers, scale = weight.double().clone(), torch.zeros(weight.shape), scale.double()
    inverse = torch.linalg.inv(hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian)))
    for column in range(weight.shape[1]):
        whole = (left[:, column] / scale).round().clamp(-127, 127)
        whole[weight[:, column] == 0] = 0
        error = (left[:, column] - whole * scale) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, [column]] * inverse[column] / inverse[column, column]
        integers[:, column] = whole
    return integers


@pytest.mark.parametrize("width", [5, 60, 200])  # fewer columns than a block, and more
def test_it_is_gptq(width: int) -> None:
    weight, hessian = random(12, width), correlated(width)
    weight[weight.abs() < 0.3] = 0
    integers, scale = rounded(weight, hessian)
    naive = gptq(weight, scale, hessian)
    # A number that lies half-way between two may fall to either side, and then those after it differ as well.
    assert float((integers == naive).float().mean()) > 0.98
    found, expected = (output_error(weight, some, scale, hessian) for some in (integers, naive))
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("width", [60, 200])
def test_the_output_is_nearer_than_with_the_nearest_integers(width: int) -> None:
    weight, hessian = random(12, width), correlated(width)
    integers, scale = rounded(weight, hessian)
    plain = (weight / scale.unsqueeze(1)).round().clamp(-127, 127)
    assert output_error(weight, integers, scale, hessian) < 0.7 * output_error(weight, plain, scale, hessian)
    assert not torch.equal(integers, plain)


def test_without_correlation_or_without_a_hessian_it_rounds_to_the_nearest() -> None:
    weight, power = random(8, 30), torch.linspace(0.1, 5, 30)
    integers, scale = rounded(weight, torch.diag(power))
    assert torch.equal(integers, (weight / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8))
    integers, scale = rounded(weight, None)
    assert torch.equal(integers, (weight / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8))


@pytest.mark.parametrize("outlier", [1.0, 3.0, 30.0])
def test_no_scale_loses_to_the_one_that_holds_the_largest_weight(outlier: float) -> None:
    """Each channel, by the error of the output where inputs are uncorrelated."""
    weight, power = random(16, 40), torch.linspace(0.01, 4, 40)
    weight[::2, 0] *= outlier
    integers, scale = rounded(weight, torch.diag(power))
    plain = nearest(weight.numpy(), 0)

    def errors(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return (np.square(values * steps[:, None] - weight.numpy()) * power.numpy()).sum(1)

    found, largest = errors(integers.numpy(), scale.numpy()), errors(plain.values, plain.scale)
    assert (found <= largest * (1 + 1e-4)).all()
    if outlier > 3:  # which makes it too wide for the others
        assert found[::2].sum() < 0.95 * largest[::2].sum()


def test_zeros_stay_zeros() -> None:
    weight, hessian = random(12, 150), correlated(150)
    weight[:, ::3], weight[4], weight[:, 130:] = 0, 0, 0
    integers, scale = rounded(weight, hessian)
    assert not integers[weight == 0].any()
    assert integers[weight != 0].count_nonzero() > 0.9 * (weight != 0).sum()
    assert bool((scale > 0).all())
    integers, _ = rounded(torch.zeros(3, 5), None)
    assert not integers.any()


def test_inputs_that_are_always_zero_do_not_disturb_the_others() -> None:
    weight, hessian = random(6, 20), correlated(20)
    hessian[7], hessian[:, 7] = 0, 0
    integers, scale = rounded(weight, hessian)
    assert torch.equal(integers[:, 7].float(), (weight[:, 7] / scale).round().clamp(-127, 127))
    for dead in (torch.zeros(20, 20), torch.full((20, 20), 1e-20)):
        integers, scale = rounded(weight, dead)
        assert output_error(weight, integers, scale, torch.eye(20)) < 1e-3 * float(weight.square().sum())


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 20)])
def test_a_weight_is_rounded_in_the_order_in_which_it_is_stored(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    hessian = correlated(weight[0].numel())
    integers, scale = rounded(weight.flatten(1), hessian)
    found = integer_weight(weight.numpy(), 0, hessian)
    assert found.values.shape == shape
    assert found.values.dtype == np.int8
    np.testing.assert_array_equal(found.values.reshape(6, -1), integers)
    np.testing.assert_array_equal(found.scale, scale)
    if len(shape) == 2:
        turned = integer_weight(np.ascontiguousarray(weight.numpy().T), 1, hessian)
        np.testing.assert_array_equal(turned.values.T, found.values)
        np.testing.assert_array_equal(turned.scale, found.scale)
