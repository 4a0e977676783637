"""Bias correction: in int8 each output channel of a layer gets its mean in floating point back.

Layer after layer in one pass, so that a later layer sees what the corrected ones before it give.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (ICCV 2019), section 4.2,
with the means of the calibration samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from onnx_spdy.models import Layer, TorchGraph
from onnx_spdy.pipeline.correct import along, channel_axis
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network, as_tensors
from onnx_spdy.pipeline.padding import Padding

Means = Mapping[str, torch.Tensor]  # layer -> (out,) mean of its output channels


def channel_means(network: Network, layers: Sequence[Layer], batches: Sequence[Samples]) -> Means:
    """Of a network in floating point, over all these samples."""
    watch = _Means(network.graph, layers, batches)
    network.run_together(batches, watch.remember)
    return watch.means


def corrected_biases(
    graph: TorchGraph,
    layers: Sequence[Layer],
    batches: Sequence[Samples],
    wanted: Means,
    biases: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Biases with which the layers of a network in int8 have these means.

    Args:
        graph: the network in int8.
        layers: those in int8, with a bias of their own.
        wanted: `channel_means` of the network in floating point, over the same batches.
        biases: initializer -> values that `graph` has.
    """
    watch = _Means(graph, layers, batches, wanted, biases)
    with torch.inference_mode():
        graph.run_together([as_tensors(batch) for batch in batches], watch.correct)
    return watch.biases


class _Means:
    """Looks at the layers' outputs while a graph runs."""

    def __init__(
        self,
        graph: TorchGraph,
        layers: Sequence[Layer],
        batches: Sequence[Samples],
        wanted: Means | None = None,
        biases: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._by_module: dict[torch.nn.Module, Layer] = {graph.node(layer.name): layer for layer in layers}
        self._paddings = [Padding(batch.samples_first) for batch in batches]
        self._wanted = wanted or {}
        self.means: dict[str, torch.Tensor] = {}
        self.biases = dict(biases or {})

    def remember(self, module: torch.nn.Module, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if (layer := self._by_module.get(module)) is not None:
            self.means[layer.name] = self._mean(layer, outputs)
        return outputs

    def correct(self, module: torch.nn.Module, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        layer = self._by_module.get(module)
        if layer is None or layer.bias not in self.biases:
            return outputs
        shift = self._wanted[layer.name] - self._mean(layer, outputs)  # (out,)
        self.biases[layer.bias] = self.biases[layer.bias] + shift.numpy()
        axis = channel_axis(outputs[0], layer)
        return [output + along(shift, output, axis) for output in outputs]

    def _mean(self, layer: Layer, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        if layer.op == "Conv":
            rows = [output.transpose(0, 1).flatten(1).mean(1) for output in outputs]
        else:
            rows = [
                padding.real_rows(output).flatten(0, -2).mean(0)
                for padding, output in zip(self._paddings, outputs, strict=True)
            ]
        return torch.stack(rows).mean(0)
