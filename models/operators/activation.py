"""Activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node


def leaky_relu(node: Node) -> Compute:
    slope = node.get("alpha", 0.01)
    return lambda x: F.leaky_relu(x, slope)


def prelu(node: Node) -> Compute:
    # Not F.prelu: an ONNX slope broadcasts like any tensor, PyTorch's is one value for each channel.
    def run(x: Tensor, slope: Tensor) -> Tensor:
        if node.opset < 7 and slope.dim() == 1:  # then it was one value for each channel here too
            slope = slope.reshape(-1, *[1] * (x.dim() - 2))
        return torch.where(x >= 0, x, x * slope)

    return run


def elu(node: Node) -> Compute:
    alpha = node.get("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


def selu(node: Node) -> Compute:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return lambda x: gamma * F.elu(x, alpha)


def celu(node: Node) -> Compute:
    alpha = node.get("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


def thresholded_relu(node: Node) -> Compute:
    alpha = node.get("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(node: Node) -> Compute:
    threshold, bias = node.get("lambd", 0.5), node.get("bias", 0.0)

    def run(x: Tensor) -> Tensor:
        moved = torch.where(x < -threshold, x + bias, torch.where(x > threshold, x - bias, torch.zeros_like(x)))
        return moved.to(x.dtype)

    return run


def hard_sigmoid(node: Node) -> Compute:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    return lambda x: torch.clamp(x * alpha + beta, 0, 1)


def gelu(node: Node) -> Compute:
    approximate = node.get("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


def swish(node: Node) -> Compute:
    alpha = node.get("alpha", 1.0)
    return lambda x: x * torch.sigmoid(alpha * x)


def softmax(node: Node) -> Compute:
    return _over_axis(node, _softmax)


def _softmax(x: Tensor, dim: int) -> Tensor:
    """Where gradients are wanted, a row that is masked wholly counts as one of equal scores: its NaN, which nobody
    reads, would make NaN of the gradients of everything that it was made from."""
    if x.requires_grad:
        x = x.masked_fill(torch.isneginf(x).all(dim, keepdim=True), 0.0)
    return F.softmax(x, dim=dim)


def log_softmax(node: Node) -> Compute:
    return _over_axis(node, F.log_softmax)


def hardmax(node: Node) -> Compute:
    """1 at the first largest element, 0 elsewhere."""

    def function(x: Tensor, dim: int) -> Tensor:
        return torch.zeros_like(x).scatter(dim, x.argmax(dim, keepdim=True), 1)

    return _over_axis(node, function)


def _over_axis(node: Node, function: Compute) -> Compute:
    if node.opset >= 13:
        axis = node.get("axis", -1)
        return lambda x: function(x, dim=axis)
    first = node.get("axis", 1)

    def over_all_following(x: Tensor) -> Tensor:
        # Before opset 13 all axes from `axis` on are one.
        start = first % x.dim() if x.dim() else 0
        return function(x.flatten(start), dim=-1).reshape(x.shape)

    return over_all_following


def clip(node: Node) -> Compute:
    if node.opset < 11:
        low, high = node.get("min"), node.get("max")
        return lambda x: _clamp(x, low, high)

    def run(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        return _clamp(x, None if low is None else low.item(), None if high is None else high.item())

    return run


def _clamp(x: Tensor, low: float | None, high: float | None) -> Tensor:
    if low is None and high is None:
        return x
    if x.requires_grad and low is not None and high is not None and low < high:
        return F.hardtanh(x, low, high)  # the same, and its gradient takes one pass instead of five
    return torch.clamp(x, low, high)


def dropout(node: Node) -> Compute:
    """Identity: a graph is run as for inference."""
    if node.opset < 7 and not node.get("is_test", 0):
        raise node.unsupported("training mode; export the network in eval mode")

    def run(x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        if training is not None and training.item():
            raise node.unsupported("training mode; export the network in eval mode")
        return x if len(node.outputs) == 1 else (x, torch.ones_like(x, dtype=torch.bool))

    return run
