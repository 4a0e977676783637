"""Element by element: arithmetic, comparisons, logic, type conversion."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from onnx_spdy.models.operators.operator import TORCH_DTYPES, Compute, Node


def div(a: Tensor, b: Tensor) -> Tensor:
    # ONNX rounds a quotient of integers towards zero.
    if a.is_floating_point() or b.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def power(base: Tensor, exponent: Tensor) -> Tensor:
    # A number is a faster exponent than a tensor, and the result has the type of the base.
    value = exponent.item() if exponent.dim() == 0 and exponent.device.type == "cpu" else exponent.to(base.device)
    return torch.pow(base, value).to(base.dtype)


def mod(node: Node) -> Compute:
    return torch.fmod if node.get("fmod", 0) else torch.remainder


def round_half_even(x: Tensor) -> Tensor:
    return torch.round(x)


def maximum(*values: Tensor) -> Tensor:
    return reduce(lambda a, b: torch.maximum(*_of_one_type(a, b)), values)


def minimum(*values: Tensor) -> Tensor:
    return reduce(lambda a, b: torch.minimum(*_of_one_type(a, b)), values)


def total(*values: Tensor) -> Tensor:
    return reduce(torch.add, values)


def mean(*values: Tensor) -> Tensor:
    return reduce(torch.add, values) / len(values)


def is_inf(node: Node) -> Compute:
    negative, positive = node.get("detect_negative", 1), node.get("detect_positive", 1)

    def run(x: Tensor) -> Tensor:
        found = torch.isinf(x)
        if not negative:
            found = found & (x > 0)
        return found if positive else found & (x < 0)

    return run


def bit_shift(node: Node) -> Compute:
    return torch.bitwise_left_shift if node.get("direction") == "LEFT" else torch.bitwise_right_shift


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, *_of_one_type(a, b))


def _of_one_type(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider type: autocast narrows one of them, and PyTorch would narrow a single number to it as well,
    which makes -inf of the smallest float32 that masks are filled with."""
    if a.dtype == b.dtype:
        return a, b
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide), b.to(wide)


def cast(node: Node) -> Compute:
    target = TORCH_DTYPES.get(node.get("to"))
    if target is None:
        raise node.unsupported(f"conversion to ONNX element type {node.get('to')}, which PyTorch doesn't have")
    return lambda x: x.to(target)


def cast_like(x: Tensor, other: Tensor) -> Tensor:
    return x.to(other.dtype)
