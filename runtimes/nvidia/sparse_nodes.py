"""Layers of a network in PyTorch that take a 2:4 kernel: which can, how they compute with it, and whether it wins.

A sparse kernel multiplies matrices. A Conv is one of its patches by its kernel; where that is larger than 1x1 they
have to be copied together first, which may cost more than the zeros save. So nothing is assumed: every layer is
measured both ways at its own size, with cold caches, because in a network its weights come from memory.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from ..base import ModelRefused, dense_kernel
from .cuda_device import Device, Product
from .semi_structured import has_pattern, layer_weight, not_eligible

CHANNELS = 16  # cuSPARSELt takes output and input channels by this multiple
ITERATIONS = 30  # of each way to compute a layer
MARGIN = 0.01  # by which a sparse kernel has to be faster
TOLERANCES = {"fp16": 5e-3, "bf16": 3e-2}  # of the largest output

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Choice:
    """How a layer runs.

    Attributes:
        kernel: its name, with the reason where 2:4 weights run dense.
        forward: (x, weight, bias) -> output in the sparse kernel; None where the dense one stays.
        dense_seconds, sparse_seconds: as measured; None where the sparse kernel can't run.
    """

    kernel: str
    forward: Forward | None = None
    dense_seconds: float | None = None
    sparse_seconds: float | None = None

    @property
    def sparse(self) -> bool:
        return self.forward is not None


@dataclass(frozen=True)
class WeightedNode:
    """A Conv, Gemm or MatMul with a constant weight, and what it was called with once."""

    node: onnx.NodeProto
    weight: np.ndarray  # (out, in, *kernel)
    dense: Forward
    arguments: tuple[Any, ...]  # tensors on the device: x, the stored weight, maybe a bias
    stored_bias: bool  # which may then become a part of the kernel


def weighted_nodes(graph: onnx.GraphProto, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Node name -> weights (out, in, *kernel), of the layers whose weights are 2:4."""
    return {node.name: weight for node in graph.node if (weight := weighted(node, stored)) is not None}


def weighted(node: onnx.NodeProto, stored: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """(out, in, *kernel) of a layer whose weights are 2:4; None for any other."""
    weight = layer_weight(node, stored)
    return weight if weight is not None and has_pattern(weight) else None


def choose(layer: WeightedNode, name: str, precision: str, pick: bool, device: Device) -> Choice:
    """Measure a layer with 2:4 weights dense and sparse, and take what is faster.

    Args:
        name: of the dense kernel.
        pick: False takes a sparse kernel even where it is slower.
    Raises:
        ModelRefused: a sparse kernel computes something else than the dense one.
    """
    if reason := not_eligible(layer.weight, CHANNELS) or _not_a_product(layer):
        return Choice(dense_kernel(name, reason))
    expected = layer.dense(*layer.arguments)
    dense, best = _median_seconds(device, layer.dense, layer.arguments), math.inf
    kernel, fastest = "", layer.dense
    for candidate, forward in _forwards(layer, device):
        _check_agreement(layer, candidate, forward(*layer.arguments), expected, TOLERANCES[precision])
        seconds = _median_seconds(device, forward, layer.arguments)
        if seconds < best:
            kernel, fastest, best = candidate, forward, seconds
    if best < (1 - MARGIN) * dense or not pick:
        return Choice(kernel, fastest, dense, best)
    reason = f"not picked: {1e6 * best:.1f} us sparse, {1e6 * dense:.1f} dense"
    return Choice(dense_kernel(name, reason), None, dense, best)


def patches(
    x: Any, kernel: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...], dilations: tuple[int, ...]
) -> Any:
    """(N, C, H, W) -> (N, out H, out W, kh * kw * C): what each output position of a Conv multiplies, channels last."""
    from torch.nn import functional

    top, left, bottom, right = pads
    x = functional.pad(x, (left, right, top, bottom)) if any(pads) else x
    x = x.permute(0, 2, 3, 1)
    sizes = [(x.shape[1 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(2)]
    parts = []
    for place in itertools.product(range(kernel[0]), range(kernel[1])):
        rows, columns = (
            slice(place[i] * dilations[i], place[i] * dilations[i] + strides[i] * (sizes[i] - 1) + 1, strides[i])
            for i in range(2)
        )
        parts.append(x[:, rows, columns])
    if len(parts) == 1:
        return parts[0]
    import torch

    return torch.cat(parts, dim=-1)


def _not_a_product(layer: WeightedNode) -> str | None:
    """Why a layer can't be written as one product of matrices."""
    if layer.node.op_type != "Conv":
        return None
    if layer.weight.ndim != 4:
        return f"not eligible: a convolution of {layer.weight.ndim - 2} dimensions"
    if (auto := _attributes(layer.node).get("auto_pad", b"NOTSET")) not in (b"NOTSET", b"VALID"):
        return f"not eligible: auto_pad {auto.decode()}"
    if len(layer.arguments) > 2 and not layer.stored_bias:
        return "not eligible: its bias is computed"
    return None


def _forwards(layer: WeightedNode, device: Device):
    """The ways to compute the layer in sparse kernels: (name, forward)."""
    attributes = _attributes(layer.node)
    x, stored, bias = (*layer.arguments, None)[:3]
    if layer.node.op_type == "Conv":
        settings = _geometry(attributes, layer.weight.shape[2:])
        matrix = stored.permute(0, 2, 3, 1).flatten(1)  # (out, kh * kw * in): groups of 4 stay input channels
        sample = patches(x, *settings)
        for kernel, product in device.sparse_products(matrix.contiguous(), bias, sample.flatten(0, -2)):
            name = kernel if settings[0] == (1, 1) else f"im2col + {kernel}"
            yield name, _conv(product, settings)
        return
    transposed = layer.node.op_type == "MatMul" or not attributes.get("transB")
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    matrix = (stored.t() if transposed else stored).contiguous()
    matrix = matrix if alpha == 1 else matrix * alpha
    fits = bias is not None and bias.dim() == 1 and len(bias) == len(matrix)
    fused = bias if fits and layer.stored_bias and beta == 1 else None
    for kernel, product in device.sparse_products(matrix, fused, x.flatten(0, -2)):
        yield kernel, _linear(product, fused is not None, beta)


def _conv(product: Product, settings: tuple[tuple[int, ...], ...]) -> Forward:
    def forward(x: Any, weight: Any, bias: Any = None) -> Any:
        found = patches(x, *settings)
        return product(found.flatten(0, -2)).unflatten(0, found.shape[:-1]).permute(0, 3, 1, 2)

    return forward


def _linear(product: Product, fused: bool, beta: float) -> Forward:
    def forward(x: Any, weight: Any, bias: Any = None) -> Any:
        found = product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        if fused or bias is None:
            return found
        return found + (bias if beta == 1 else bias * beta)

    return forward


def _geometry(attributes: Mapping[str, Any], kernel: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """kernel, strides, pads and dilations of a Conv."""
    defaults = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
    pads = () if attributes.get("auto_pad") == b"VALID" else tuple(attributes.get("pads", ()))
    strides, dilations = (tuple(attributes.get(name, defaults[name])) for name in ("strides", "dilations"))
    return tuple(kernel), strides, pads or defaults["pads"], dilations


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def _median_seconds(device: Device, forward: Forward, arguments: tuple[Any, ...]) -> float:
    return statistics.median(device.seconds(device.replayable(lambda: forward(*arguments)), ITERATIONS, cold=True))


def _check_agreement(layer: WeightedNode, kernel: str, actual: Any, expected: Any, tolerance: float) -> None:
    largest = float(expected.float().abs().max())
    difference = float((actual.float() - expected.float()).abs().max()) if actual.shape == expected.shape else np.inf
    if not difference <= tolerance * largest:
        raise ModelRefused(
            f"{kernel} computes {layer.node.output[0]!r} {difference / max(largest, 1e-30):.1%} of its largest value "
            f"away from the dense kernel (allowed: {tolerance:.1%}); update PyTorch, or leave that layer dense"
        )
