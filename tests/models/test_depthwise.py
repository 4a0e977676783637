"""The gradient of strided depthwise convolutions beside PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from onnx_spdy.models.operators import depthwise


@pytest.mark.parametrize("in_cache", [1, 1 << 21])
@pytest.mark.parametrize("stride", [2, (1, 3), (3, 2)])
@pytest.mark.parametrize(("kernel", "padding"), [((3, 3), 1), ((5, 3), (2, 0)), ((1, 1), 0), ((2, 4), (1, 3))])
@pytest.mark.parametrize("size", [(12, 12), (9, 14)])
def test_values_and_gradients_are_those_of_pytorch(
    in_cache: int, stride, kernel, padding, size, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise, "IN_CACHE", in_cache)
    torch.manual_seed(0)
    tensors = [torch.randn(3, 4, *size), torch.randn(4, 1, *kernel), torch.randn(4)]
    ours, theirs = ([one.clone().requires_grad_() for one in tensors] for _ in range(2))
    found = depthwise.conv2d(*ours, stride, padding, 1, 4)
    expected = F.conv2d(*theirs, stride, padding, 1, 4)
    assert found.grad_fn is not None
    assert "_Strided" in type(found.grad_fn).__name__
    assert torch.equal(found, expected)
    gradient = torch.randn_like(found)
    found.backward(gradient)
    expected.backward(gradient)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_others_are_left_to_pytorch() -> None:
    x, dense = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 3, 3)
    by_channel = torch.randn(4, 1, 3, 3)
    for weight, stride, padding, dilation, groups in (
        (dense, 2, 1, 1, 1), (by_channel, 1, 1, 1, 4), (by_channel, 2, 2, 2, 4), (by_channel, 2, 3, 1, 4),
    ):  # fmt: skip
        found = depthwise.conv2d(x, weight, None, stride, padding, dilation, groups)
        assert "Convolution" in type(found.grad_fn).__name__


def test_it_trains_in_bfloat16() -> None:
    x, weight = torch.randn(2, 8, 16, 16, requires_grad=True), torch.randn(8, 1, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = depthwise.conv2d(x, weight, None, 2, 1, 1, 8)
    found.float().square().sum().backward()
    exact, weights = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    F.conv2d(exact, weights, None, 2, 1, 1, 8).square().sum().backward()
    for one, other in ((x.grad, exact.grad), (weight.grad, weights.grad)):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()
