"""Shapes: read them, change them, make tensors of them. Elements keep their values and order, or are repeated."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import TORCH_DTYPES, Compute, Node, read_tensor


def shape(node: Node) -> Compute:
    start, end = node.get("start", 0), node.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def identity(x: Tensor) -> Tensor:
    return x


def reshape(node: Node) -> Compute:
    zero_is_zero = node.get("allowzero", 0)
    if node.opset < 5:
        fixed = node.get("shape")
        return lambda x: x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(fixed)])

    def run(x: Tensor, target: Tensor) -> Tensor:
        wanted = target.tolist()
        if 0 in wanted and not zero_is_zero:
            wanted = [x.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        return x.reshape(wanted)

    return run


def flatten(node: Node) -> Compute:
    axis = node.get("axis", 1)

    def run(x: Tensor) -> Tensor:
        first = axis + x.dim() if axis < 0 else axis
        return x.reshape(prod(x.shape[:first]), prod(x.shape[first:]))

    return run


def transpose(node: Node) -> Compute:
    order = node.get("perm")
    if order is None:
        return lambda x: x.permute(tuple(range(x.dim()))[::-1])
    return lambda x: x.permute(order)


def squeeze(node: Node) -> Compute:
    def drop(x: Tensor, axes: list[int] | None) -> Tensor:
        return x.squeeze() if axes is None else x.squeeze(tuple(axes))

    if node.opset < 13:
        return lambda x: drop(x, node.get("axes"))
    return lambda x, axes=None: drop(x, None if axes is None else axes.reshape(-1).tolist())


def unsqueeze(node: Node) -> Compute:
    def insert(x: Tensor, axes: list[int]) -> Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    if node.opset < 13:
        return lambda x: insert(x, node.get("axes"))
    return lambda x, axes: insert(x, axes.reshape(-1).tolist())


def expand(x: Tensor, target: Tensor) -> Tensor:
    return x.broadcast_to(torch.broadcast_shapes(x.shape, tuple(target.tolist())))


def tile(x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


def depth_to_space(node: Node) -> Compute:
    block, column_first = node.get("blocksize"), node.get("mode", "DCR") == "CRD"

    def run(x: Tensor) -> Tensor:
        if column_first:
            return F.pixel_shuffle(x, block)
        n, c, h, w = x.shape
        parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(n, c // block**2, h * block, w * block)

    return run


def space_to_depth(node: Node) -> Compute:
    block, column_first = node.get("blocksize"), node.get("mode", "DCR") == "CRD"

    def run(x: Tensor) -> Tensor:
        if column_first:
            return F.pixel_unshuffle(x, block)
        n, c, h, w = x.shape
        parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(n, c * block**2, h // block, w // block)

    return run


def constant_of_shape(node: Node) -> Compute:
    proto = node.get("value")
    value = torch.zeros(1) if proto is None else read_tensor(proto)
    return lambda target: torch.full(target.tolist(), value.item(), dtype=value.dtype)


def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def eye_like(node: Node) -> Compute:
    k = node.get("k", 0)
    dtype = TORCH_DTYPES[node.get("dtype")] if "dtype" in node.attributes else None

    def run(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape, dtype=dtype or x.dtype, device=x.device)
        return torch.triu(ones, k) * torch.tril(ones, k)

    return run
