"""Matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node


def gemm(node: Node) -> Compute:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    transpose_a, transpose_b = node.get("transA", 0), node.get("transB", 0)
    plain = alpha == 1 and beta == 1 and not transpose_a

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        if plain and (c is None or c.dim() == 1):
            if transpose_b:
                return F.linear(a, b, c)
            return torch.mm(a, b) if c is None else torch.addmm(c, a, b)
        product = torch.mm(a.t() if transpose_a else a, b.t() if transpose_b else b)
        # Only where they differ from 1: a floating factor would make a floating product of integers.
        product = product if alpha == 1 else product * alpha
        if c is None:
            return product
        return product + (c if beta == 1 else c * beta)

    return run


def einsum(node: Node) -> Compute:
    equation = node.get("equation")
    return lambda *operands: torch.einsum(equation, *operands)
