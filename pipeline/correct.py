"""Statistics correction: after stitching, give each output channel of a pruned layer its dense mean and variance back.

Pruning shifts and shrinks what later layers see. Each pruned layer's rows are scaled and its bias is
shifted so that mean and variance of every output channel equal the dense network's, layer after layer in
one forward pass: what a re-estimation of batch-norm statistics does, for graphs whose BatchNorm is folded.
Zeros stay zeros. A layer that runs several times, at several nodes, is left as it is: its outputs have
statistics of their own at each, and only one weight.

Source: the idea is Frantar & Alistarh, OBC (NeurIPS 2022), section 6 (batch-norm statistics reset).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn import functional

from onnx_spdy.models import Layer
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, Weights
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.runtimes.errors import OnnxSpdyError

SAMPLES = 256  # in one batch; more changes little
LARGEST_ACTIVATION_BYTES = 512 << 20  # of one layer's output for that batch; larger ones cost more time than they tell
LARGEST_SCALE = 3.0  # a channel that needs more has lost its signal; scaling would only amplify noise
LEAST_SAMPLES = 16  # in a batch that is corrected by its own statistics: those of fewer would give away their outputs


class NotCorrected(OnnxSpdyError, ValueError):
    """There are too few samples for one batch of the network."""


class StatisticsCorrection:
    """Corrects a network at any profile; the dense statistics are taken once.

    A network that fixes its batch size runs many batches node by node, so that a channel's statistics are those of
    all samples here too.

    Args:
        network: whose dense weights are what is corrected towards.
        samples: calibration samples, of which the first `SAMPLES` are used, or as many as fit in
            `LARGEST_ACTIVATION_BYTES`.
        layers: those that may be pruned; the network's prunable ones by default.
    Raises:
        NotCorrected: there are fewer samples than the network's batch.
    """

    def __init__(self, network: Network, samples: Samples, layers: Sequence[Layer] | None = None) -> None:
        if len(samples) < (needed := network.batch_size(1)):
            raise NotCorrected(f"{len(samples)} samples don't fill one batch of {needed}")
        self._network = network
        some = samples.take(slice(0, _affordable(network, samples)))
        self._batches = network.batches(some, len(some))
        self._paddings = [Padding(batch.samples_first) for batch in self._batches]
        self._dense: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._run(network.layers if layers is None else layers, DENSE_WEIGHTS, self._remember)

    def apply(self, weights: Weights, pruned: Sequence[Layer]) -> Weights:
        """These weights with the pruned layers' weights and biases corrected."""
        corrected = dict(weights)
        self._run(pruned, weights, partial(self._correct, corrected))
        return corrected

    def _run(
        self,
        layers: Sequence[Layer],
        weights: Weights,
        visit: Callable[[Layer, list[torch.Tensor]], list[torch.Tensor]],
    ) -> None:
        """Visit each layer with its outputs; what the visit returns goes on to the next one."""
        by_module: dict[torch.nn.Module, Layer] = {
            self._network.graph.node(layer.name): layer for layer in layers if not layer.more_uses
        }

        def after(module: torch.nn.Module, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
            layer = by_module.get(module)
            return outputs if layer is None else visit(layer, outputs)

        with torch.inference_mode():
            self._network.run_together(self._batches, after, weights)

    def _remember(self, layer: Layer, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self._dense[layer.name] = self._statistics(outputs, layer)
        return outputs

    def _correct(
        self, weights: dict[str, torch.Tensor], layer: Layer, outputs: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Change the layer's values in `weights`, and its outputs as if it had run with them."""
        dense_mean, dense_deviation = self._dense[layer.name]
        mean, deviation = self._statistics(outputs, layer)
        if _is_nothing(mean, deviation):
            return outputs
        scale = _scale(deviation, dense_deviation)
        weight = self._network.values(layer.weight, weights)
        weights[layer.weight] = weight * (scale if layer.transposed else along(scale, weight, 0))
        axis = channel_axis(outputs[0], layer)
        if layer.bias is None:
            return [(output * along(scale, output, axis)).to(output.dtype) for output in outputs]
        bias = self._network.values(layer.bias, weights)  # (out,)
        if layer.op != "MatMul":
            inside, expected = bias, dense_mean
        else:  # a later node adds the bias, which may not be the dense one any more
            inside, expected = torch.zeros_like(bias), dense_mean + self._network.dense(layer.bias).to(bias) - bias
        shift = (expected - inside) - scale * (mean - inside)
        weights[layer.bias] = bias + shift
        # That later node still has the bias from before, so the shift is in the outputs already.
        corrected = (
            (output - along(inside, output, axis)) * along(scale, output, axis) + along(inside + shift, output, axis)
            for output in outputs
        )
        return [after.to(before.dtype) for after, before in zip(corrected, outputs, strict=True)]

    def _statistics(self, outputs: Sequence[torch.Tensor], layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (out,) and standard deviation (out,) of a layer's output channels over all batches, without padding."""
        if layer.op != "Conv":
            pairs = zip(self._paddings, outputs, strict=True)
            outputs = [padding.real_rows(output).flatten(0, -2) for padding, output in pairs]
        output = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))
        others = [axis for axis in range(output.ndim) if axis != channel_axis(output, layer)]
        deviation, mean = torch.std_mean(output.float(), dim=others, correction=0)
        return mean, deviation


class BatchCorrection:
    """The same correction while one batch runs, by that batch's own statistics; no weight or bias changes.

    So that a search scores nearly what `StatisticsCorrection` makes of a profile, for one look at each layer's output.

    Args:
        network: its layers are watched only inside of `remember` and `apply`.
        paddings: of each batch.
    """

    def __init__(self, network: Network, paddings: Sequence[Padding]) -> None:
        self._network, self._paddings = network, paddings
        self._dense: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}  # mean and variance, (out,) each

    def remember(self, batch: int) -> contextlib.AbstractContextManager[None]:
        """While the dense network runs a batch, of this number: take its statistics."""
        return self._watching(partial(self._remember, batch))

    def apply(self, batch: int, weights: Weights) -> contextlib.AbstractContextManager[None]:
        """While the network runs the same batch with `weights`: correct the outputs of the layers that they name."""
        return self._watching(partial(self._correct, batch, weights))

    @contextlib.contextmanager
    def _watching(self, visit: Callable[[Layer, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
        def hook(layer: Layer) -> Callable[..., torch.Tensor | None]:
            return lambda module, inputs, output: visit(layer, output)

        graph = self._network.graph
        once = [layer for layer in self._network.layers if not layer.more_uses]
        handles = [graph.node(layer.name).register_forward_hook(hook(layer)) for layer in once]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _remember(self, batch: int, layer: Layer, output: torch.Tensor) -> None:
        self._dense[batch, layer.name] = self._moments(batch, layer, output)

    def _correct(self, batch: int, weights: Weights, layer: Layer, output: torch.Tensor) -> torch.Tensor | None:
        if layer.weight not in weights:
            return None
        (mean, variance), (dense_mean, dense_variance) = (
            self._moments(batch, layer, output),
            self._dense[batch, layer.name],
        )
        if _is_nothing(mean, variance):
            return None
        scale = _scale(variance.sqrt(), dense_variance.sqrt())
        if layer.bias is None:  # nothing can shift its outputs
            mean = dense_mean = torch.zeros_like(mean)
        unit = torch.ones_like(variance)
        values = _channels_second(output, layer)
        return functional.batch_norm(values, mean, unit, scale, dense_mean, eps=0.0).view_as(output)

    def _moments(self, batch: int, layer: Layer, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (out,) each, in float32, in one look at the output, without padding."""
        real = output if layer.op == "Conv" else self._paddings[batch].real_rows(output)
        mean, variance = torch.ops.aten.batch_norm_update_stats(_channels_second(real, layer), None, None, 0.0)
        return mean.float(), variance.float().clamp_min(0)


def _channels_second(output: torch.Tensor, layer: Layer) -> torch.Tensor:
    """(samples or rows, out, *positions)."""
    return output if layer.op == "Conv" else output.flatten(0, -2)


def _scale(deviation: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """(out,) by what each channel is multiplied."""
    has_signal = deviation > 1e-6 * dense.clamp_min(1e-12)
    scale = torch.where(has_signal, dense / deviation.clamp_min(1e-12), 1.0)
    return scale.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def _is_nothing(mean: torch.Tensor, spread: torch.Tensor) -> bool:
    """Whether a layer gives zeros only: of a branch that is gone, and stays so."""
    return not bool(mean.any()) and not bool(spread.any())


def _affordable(network: Network, samples: Samples) -> int:
    """How many samples to take, judged by the layers' outputs for one batch of the least size."""
    size, largest = network.batch_size(1), 1
    outputs = {network.graph.node(layer.name) for layer in network.layers}

    def after(module: torch.nn.Module, found: list[torch.Tensor]) -> list[torch.Tensor]:
        nonlocal largest
        if module in outputs:
            largest = max(largest, sum(output.numel() * output.element_size() for output in found))
        return found

    with torch.inference_mode():
        network.run_together([samples.take(slice(0, size))], after)
    return max(size, min(SAMPLES, LARGEST_ACTIVATION_BYTES * size // largest))


def channel_axis(output: torch.Tensor, layer: Layer) -> int:
    """Of a layer's output, on which its channels lie."""
    return 1 if layer.op == "Conv" else output.ndim - 1


def along(values: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """(n,) shaped so that it broadcasts along one axis of `like`."""
    shape = [1] * like.ndim
    shape[axis] = len(values)
    return values.view(shape)
