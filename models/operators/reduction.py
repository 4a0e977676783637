"""Reductions along axes, and what orders or accumulates along one."""

from __future__ import annotations

import torch
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node, Operator


def reduction(function: Compute, axes_input_since: int = 18) -> Operator:
    """An operator that applies `function(x, axes, keepdim)`; its axes are an attribute before that opset."""

    def build(node: Node) -> Compute:
        keep = bool(node.get("keepdims", 1))
        if node.opset < axes_input_since:
            attribute = node.get("axes")
            return lambda x: function(x, tuple(range(x.dim()) if attribute is None else attribute), keep)
        nothing_for_empty = node.get("noop_with_empty_axes", 0)

        def run(x: Tensor, axes: Tensor | None = None) -> Tensor:
            chosen = () if axes is None else tuple(axes.reshape(-1).tolist())
            if not chosen and not nothing_for_empty:
                chosen = tuple(range(x.dim()))
            return function(x, chosen, keep)

        return run

    return Operator(build, host=frozenset({1}))


def mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep) if axes else x
    return div_counted(total(x, axes, keep), x, axes)


def div_counted(sums: Tensor, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(sums, count, rounding_mode="trunc").to(x.dtype)


def total(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    # An empty tuple means "all axes" to PyTorch and "none" here.
    return x.sum(axes, keepdim=keep, dtype=x.dtype) if axes else x


def largest(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.amax(x, axes, keepdim=keep) if axes else x


def smallest(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.amin(x, axes, keepdim=keep) if axes else x


def product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=x.dtype)
    return x


def l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return total(x.abs(), axes, keep)


def l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sqrt(total(x * x, axes, keep))


def sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return total(x * x, axes, keep)


def log_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.log(total(x, axes, keep))


def log_sum_exp(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep) if axes else x


def arg_max(node: Node) -> Compute:
    return _arg(node, torch.argmax)


def arg_min(node: Node) -> Compute:
    return _arg(node, torch.argmin)


def _arg(node: Node, function: Compute) -> Compute:
    axis, keep, last = node.get("axis", 0), bool(node.get("keepdims", 1)), node.get("select_last_index", 0)

    def run(x: Tensor) -> Tensor:
        if last:
            return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)
        return function(x, dim=axis, keepdim=keep)

    return run


def top_k(node: Node) -> Compute:
    axis, largest_first = node.get("axis", -1), bool(node.get("largest", 1))

    def choose(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # Not torch.topk: among equal values ONNX takes the one with the smaller index.
        values, indices = torch.sort(x, dim=axis, descending=largest_first, stable=True)
        return values.narrow(axis, 0, k), indices.narrow(axis, 0, k)

    if node.opset < 10:
        count = node.get("k")
        return lambda x: choose(x, count)
    return lambda x, k: choose(x, int(k.item()))


def cum_prod(node: Node) -> Compute:
    exclusive, reverse = node.get("exclusive", 0), node.get("reverse", 0)

    def run(x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis.item())
        ordered = x.flip(along) if reverse else x
        if exclusive:  # a product can't be divided out again: there may be zeros
            last = x.shape[along] - 1
            ordered = torch.cat([torch.ones_like(ordered.narrow(along, 0, 1)), ordered.narrow(along, 0, last)], along)
        products = torch.cumprod(ordered, along, dtype=x.dtype)
        return products.flip(along) if reverse else products

    return run


def cum_sum(node: Node) -> Compute:
    exclusive, reverse = node.get("exclusive", 0), node.get("reverse", 0)

    def run(x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis.item())
        ordered = x.flip(along) if reverse else x
        sums = torch.cumsum(ordered, along, dtype=x.dtype)
        if exclusive:
            sums = sums - ordered
        return sums.flip(along) if reverse else sums

    return run
