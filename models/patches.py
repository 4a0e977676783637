"""Input patches: what a layer's flattened weights are multiplied with, for each position of its output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod

import onnx
import torch
from torch.nn import functional

from onnx_spdy.models.graph import node_names
from onnx_spdy.models.layers import Layer


class InputPatches:
    """From a prunable layer's input to the patches that its weights see.

    With P = patches(x) and w = weight.movedim(1, -1).flatten(1): `P @ w.T` is the layer's output without bias,
    (n, out) for n = samples x output positions. Input channels come last in a patch because they
    are neighbours in memory (channels_last), which makes copying patches several times faster.

    Args:
        model: the model that the layer is from.
        layer: a prunable layer.
    Attributes:
        kernel: () for a layer that is no convolution. channels: of the input. strides, dilations: for each axis.
    """

    def __init__(self, model: onnx.ModelProto, layer: Layer) -> None:
        names = node_names(model.graph)
        node = model.graph.node[names.index(layer.name)]
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        self.kernel = layer.shape[2:] if layer.op == "Conv" else ()
        self.channels = layer.shape[1]
        rank = len(self.kernel)
        self.strides: Sequence[int] = attributes.get("strides", [1] * rank)
        self.dilations: Sequence[int] = attributes.get("dilations", [1] * rank)
        self._pads: Sequence[int] = attributes.get("pads", [0] * (2 * rank))
        self._auto_pad: str = attributes.get("auto_pad", b"NOTSET").decode()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(n, prod(kernel) * in) patches of the layer's input x."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])
        spans = self.spans
        padded = _padded(x, *self.pads(x.shape[2:])).movedim(1, -1)  # (samples, *sizes, in)
        if prod(self.kernel) == 1:
            every = (slice(None), *(slice(None, None, step) for step in self.strides))
            return padded[every].flatten(0, -2)
        sizes = [(n - s) // stride + 1 for n, s, stride in zip(padded.shape[1:-1], spans, self.strides, strict=True)]
        unfolded = x.new_empty(x.shape[0], *sizes, prod(self.kernel), self.channels)
        for number, offset in enumerate(itertools.product(*map(range, self.kernel))):
            axes = zip(offset, self.dilations, sizes, self.strides, strict=True)
            window = (slice(None), *(slice(o * d, o * d + (n - 1) * step + 1, step) for o, d, n, step in axes))
            unfolded[..., number, :] = padded[window]
        return unfolded.view(-1, prod(self.kernel) * self.channels)

    @property
    def spans(self) -> list[int]:
        """How many input positions a patch reaches over, for each axis."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    def pads(self, sizes: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """Padding at the begin and at the end of each axis of an input of these sizes."""
        if self._auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            return _same_pads(sizes, self.spans, self.strides, lower=self._auto_pad == "SAME_LOWER")
        if self._auto_pad == "VALID":
            return [0] * len(sizes), [0] * len(sizes)
        return self._pads[: len(sizes)], self._pads[len(sizes) :]


def _padded(x: torch.Tensor, begin: Sequence[int], end: Sequence[int]) -> torch.Tensor:
    if not any((*begin, *end)):
        return x
    # torch counts from the last axis backwards, as (begin, end) pairs
    return functional.pad(x, [pad for pair in zip(begin[::-1], end[::-1], strict=True) for pad in pair])


def _same_pads(
    sizes: Sequence[int], spans: Sequence[int], strides: Sequence[int], *, lower: bool
) -> tuple[list[int], list[int]]:
    """ONNX auto_pad: output size = ceil(input size / stride); the odd pixel goes to the end, or to the beginning."""
    totals = [
        max(0, (-(-size // stride) - 1) * stride + span - size)
        for size, span, stride in zip(sizes, spans, strides, strict=True)
    ]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (large, small) if lower else (small, large)
