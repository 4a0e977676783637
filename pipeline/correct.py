"""Statistics correction: after stitching, give each output channel of a pruned layer its dense mean and variance back.

Pruning shifts and shrinks what later layers see. Each pruned layer's rows are scaled and its bias is
shifted so that mean and variance of every output channel equal the dense network's, layer after layer in
one forward pass: what a re-estimation of batch-norm statistics does, for graphs whose BatchNorm is folded.
Zeros stay zeros.

Source: the idea is Frantar & Alistarh, OBC (NeurIPS 2022), section 6 (batch-norm statistics reset).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from onnx_spdy.models import Layer, fixed_batch
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network

SAMPLES = 256  # in one batch; more changes little
LARGEST_ACTIVATION_BYTES = 512 << 20  # of one layer's output for that batch; larger ones cost more time than they tell
LARGEST_SCALE = 3.0  # a channel that needs more has lost its signal; scaling would only amplify noise


class NotCorrected(ValueError):
    """The network fixes its batch, so its statistics can't be taken over many samples in one pass."""


class StatisticsCorrection:
    """Corrects a network at any profile; the dense statistics are taken once.

    Args:
        network: whose dense weights are what is corrected towards; left with them.
        samples: calibration samples, of which the first `SAMPLES` are used, or as many as fit in
            `LARGEST_ACTIVATION_BYTES`.
    Raises:
        NotCorrected: the network fixes its batch.
    """

    def __init__(self, network: Network, samples: Samples) -> None:
        if fixed_batch(network.model) is not None:
            raise NotCorrected("the network fixes its batch size, so channel statistics need a pass for each layer")
        self._network = network
        network.reset()
        self._batch = samples.take(slice(0, _affordable(network, network.layers, samples)))
        self._dense = _dense_statistics(network, network.layers, self._batch)

    def apply(self, pruned: Sequence[Layer]) -> None:
        """Change weights and biases of the pruned layers in place; the network is stitched to its profile."""
        network = self._network
        hooks = [
            network.graph.node(layer.name).register_forward_hook(_Correction(network, layer, *self._dense[layer.name]))
            for layer in pruned
        ]
        _run(network, self._batch, hooks)


def _affordable(network: Network, layers: Sequence[Layer], samples: Samples) -> int:
    """How many samples to take, judged by the layers' outputs for one."""
    largest = 1

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() * output.element_size())

    hooks = [network.graph.node(layer.name).register_forward_hook(hook) for layer in layers]
    _run(network, samples.take(slice(0, 1)), hooks)
    return max(1, min(SAMPLES, LARGEST_ACTIVATION_BYTES // largest))


def _dense_statistics(
    network: Network, layers: Sequence[Layer], batch: Samples
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer name -> mean (out,) and standard deviation (out,) of its output channels."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: Layer) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found[layer.name] = _statistics(output, layer)

        return network.graph.node(layer.name).register_forward_hook(hook)

    _run(network, batch, [keep(layer) for layer in layers])
    return found


def _run(network: Network, batch: Samples, hooks: list[torch.utils.hooks.RemovableHandle]) -> None:
    try:
        with torch.inference_mode():
            network.run(batch)
    finally:
        for hook in hooks:
            hook.remove()


def _statistics(output: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    others = [axis for axis in range(output.ndim) if axis != _channel_axis(output, layer)]
    deviation, mean = torch.std_mean(output.float(), dim=others, correction=0)
    return mean, deviation


def _channel_axis(output: torch.Tensor, layer: Layer) -> int:
    return 1 if layer.op == "Conv" else output.ndim - 1


class _Correction:
    """Forward hook: measures the layer's output, corrects its parameters, and passes the corrected output on."""

    def __init__(self, network: Network, layer: Layer, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        self._network, self._layer, self._mean, self._deviation = network, layer, mean, deviation

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        network, layer = self._network, self._layer
        mean, deviation = _statistics(output, layer)
        has_signal = deviation > 1e-6 * self._deviation.clamp_min(1e-12)
        scale = torch.where(has_signal, self._deviation / deviation.clamp_min(1e-12), 1.0)
        scale = scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)  # (out,)
        weight = network.get(layer.weight)
        network.set(layer.weight, weight * (scale if layer.transposed else _along(scale, weight, 0)))
        axis = _channel_axis(output, layer)
        if layer.bias is None:
            return output * _along(scale, output, axis)
        bias = network.get(layer.bias).clone()  # (out,)
        inside = bias if layer.op != "MatMul" else torch.zeros_like(bias)  # MatMul's bias is added by a later node
        shift = (self._mean - inside) - scale * (mean - inside)
        network.set(layer.bias, bias + shift)
        corrected = (output - _along(inside, output, axis)) * _along(scale, output, axis)
        return corrected if layer.op == "MatMul" else corrected + _along(inside + shift, output, axis)


def _along(values: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """(n,) shaped so that it broadcasts along one axis of `like`."""
    shape = [1] * like.ndim
    shape[axis] = len(values)
    return values.view(shape)
