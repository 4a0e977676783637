"""Lists of tensors, as older exporters write them for splits of unknown size: a tuple each."""

from __future__ import annotations

import torch
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node

Sequence = tuple[Tensor, ...]


def construct(*values: Tensor) -> Sequence:
    return values


def empty() -> Sequence:
    return ()


def at(values: Sequence, position: Tensor) -> Tensor:
    return values[int(position)]


def length(values: Sequence) -> Tensor:
    return torch.tensor(len(values))


def insert(values: Sequence, value: Tensor, position: Tensor | None = None) -> Sequence:
    place = len(values) if position is None else int(position)
    return (*values[:place], value, *values[place:])


def erase(values: Sequence, position: Tensor | None = None) -> Sequence:
    place = (-1 if position is None else int(position)) % len(values)
    return (*values[:place], *values[place + 1 :])


def split(node: Node) -> Compute:
    axis, keep = node.get("axis", 0), node.get("keepdims", 1)

    def compute(x: Tensor, sizes: Tensor | None = None) -> Sequence:
        if sizes is None:
            return x.split(1, axis) if keep else x.unbind(axis)
        return x.split(int(sizes) if sizes.dim() == 0 else sizes.tolist(), axis)

    return compute


def concat(node: Node) -> Compute:
    join = torch.stack if node.get("new_axis", 0) else torch.cat
    axis = node.get("axis")
    return lambda values: join(values, axis)
