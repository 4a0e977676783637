"""Normalisation layers, as for inference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node, trimmed


def batch_normalization(node: Node) -> Compute:
    if node.get("training_mode", 0) or len([name for name in node.outputs if name]) > 1:
        raise node.unsupported("training mode; export the network in eval mode")
    if node.opset < 9 and not node.get("spatial", 1):
        raise node.unsupported("spatial=0 (statistics of each pixel)")
    epsilon = node.get("epsilon", 1e-5)
    return lambda x, scale, bias, mean, variance: F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


def instance_normalization(node: Node) -> Compute:
    epsilon = node.get("epsilon", 1e-5)
    return lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def layer_normalization(node: Node) -> Compute:
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        normalised = x.shape[axis:]
        if scale.shape == normalised and (bias is None or bias.shape == normalised):
            y = F.layer_norm(x, normalised, scale, bias, epsilon)
        else:  # they may broadcast
            y = F.layer_norm(x, normalised, None, None, epsilon) * scale
            y = y if bias is None else y + bias
        if len(node.outputs) == 1:
            return y
        axes = tuple(range(axis % x.dim(), x.dim()))
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return trimmed(node, (y, mean, torch.rsqrt(variance + epsilon)))

    return run


def rms_normalization(node: Node) -> Compute:
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)
    return lambda x, scale: F.rms_norm(x, x.shape[axis:], None, epsilon) * scale


def group_normalization(node: Node) -> Compute:
    groups, epsilon = node.get("num_groups"), node.get("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if node.opset < 21:  # one value for each group, not for each channel
            scale = scale.repeat_interleave(x.shape[1] // groups)
            bias = bias.repeat_interleave(x.shape[1] // groups)
        return F.group_norm(x, groups, scale, bias, epsilon)

    return run


def lp_normalization(node: Node) -> Compute:
    axis, p = node.get("axis", -1), node.get("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / norm)

    return run


def lrn(node: Node) -> Compute:
    size, alpha = node.get("size"), node.get("alpha", 1e-4)
    beta, bias = node.get("beta", 0.75), node.get("bias", 1.0)

    def run(x: Tensor) -> Tensor:
        squares = F.pad((x * x).flatten(2).movedim(1, -1), ((size - 1) // 2, size // 2))  # (n, pixels, channels)
        sums = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1).reshape(x.shape)
        return x / torch.pow(bias + alpha / size * sums, beta)

    return run


def mean_variance_normalization(node: Node) -> Compute:
    axes = tuple(node.get("axes", (0, 2, 3)))

    def run(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (torch.sqrt(variance) + 1e-9)

    return run
