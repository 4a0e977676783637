"""Ranges of activations: what is seen on the calibration samples, and where a grid of 256 values should end.

A wide grid holds every value and is coarse, a narrow one cuts off the largest. Which loses less in the network's
outputs differs from network to network, so `int8/quantise.py` tries all of `RANGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.grid import Grid, grid_between
from onnx_spdy.models.torch_graph import NodeModule
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, Weights
from onnx_spdy.runtimes.errors import OnnxSpdyError

CHANNELS = 1  # axis of a convolution's input
RANGE_SAMPLES = 256  # that are watched; as many as Hessians for rounding are made of
DRAWN = 16_384  # values of a tensor from each batch
TAIL = 1e-4  # of the values that percentiles cut off, half at either end
FRACTIONS = np.linspace(1.0, 0.2, 33)  # of the whole range that least squares tries


class RangeError(OnnxSpdyError, ValueError):
    """Activations on the calibration samples that no grid can hold."""


@dataclass
class Seen:
    """What was seen of a tensor.

    Attributes:
        low, high: (channels,) where it has a scale for each channel, otherwise ().
        lows, highs: of each sample, or of each batch where it has no samples.
        values: some of them.
    """

    low: np.ndarray
    high: np.ndarray
    lows: list[float]
    highs: list[float]
    values: list[np.ndarray]

    def add(self, low: np.ndarray, high: np.ndarray) -> None:
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)


def observe(
    network: Network,
    tensors: Collection[str],
    by_channel: Collection[str],
    samples: Samples,
    rng: np.random.Generator,
    weights: Weights = DENSE_WEIGHTS,
) -> dict[str, Seen]:
    """Watch tensors while the network runs on samples.

    Args:
        tensors: names of inputs and inner tensors.
        by_channel: those of them with a range for each channel.
        weights: of the network.
    Raises:
        RangeError: one of them is NaN or infinite for some sample; the message names it.
    """
    seen: dict[str, Seen] = {}

    def look(name: str, values: torch.Tensor) -> None:
        if not values.numel():  # as the state of a language model has none before its first word
            values = values.new_zeros([max(1, size) for size in values.shape])
        others = [axis for axis in range(values.dim()) if axis != CHANNELS] if name in by_channel else None
        low, high = (values.amin(others), values.amax(others)) if others else (values.min(), values.max())
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise RangeError(f"tensor {name!r} is NaN or infinite for some calibration sample, so it has no range")
        rows = values.flatten(1) if values.dim() > 1 else values.view(1, -1)
        flat = values.flatten()
        drawn = flat[torch.from_numpy(rng.integers(0, flat.numel(), min(DRAWN, flat.numel())))]
        one = seen.setdefault(name, Seen(low.numpy(), high.numpy(), [], [], []))
        one.add(low.numpy(), high.numpy())
        one.lows += rows.amin(1).tolist()
        one.highs += rows.amax(1).tolist()
        one.values.append(drawn.numpy())

    def hook(module: NodeModule, inputs: object, outputs: object) -> None:
        made = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, values in zip(module.node.outputs, made, strict=False):
            if name in tensors:
                look(name, values)

    hooks = [network.graph.node(name).register_forward_hook(hook) for name in _makers(network, tensors)]
    try:
        for batch in network.batches(samples):
            with torch.inference_mode():
                for name, array in batch.inputs.items():
                    if name in tensors:
                        look(name, torch.from_numpy(array))
                network.run(batch, weights)
    finally:
        for one in hooks:
            one.remove()
    return seen


def _makers(network: Network, tensors: Collection[str]) -> list[str]:
    """Names of the nodes that make some of the tensors."""
    return [node.name for node in network.model.graph.node if set(node.output) & set(tensors)]


def extremes(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """All that was seen."""
    return seen.low, seen.high


def usual_extremes(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """The mean over samples of each sample's extremes."""
    if seen.low.ndim:
        return seen.low, seen.high
    return np.asarray(np.mean(seen.lows)), np.asarray(np.mean(seen.highs))


def percentiles(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """All but the `TAIL`."""
    if seen.low.ndim:
        return seen.low, seen.high
    low, high = np.quantile(np.concatenate(seen.values), [TAIL / 2, 1 - TAIL / 2])
    return np.asarray(low), np.asarray(high)


def least_squares(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """The part of the range in which values are rounded and cut off with the least squared error."""
    if seen.low.ndim:
        return seen.low, seen.high
    values = np.concatenate(seen.values).astype(np.float64)

    def error(fraction: float) -> float:
        low, high = min(0.0, fraction * float(seen.low)), max(0.0, fraction * float(seen.high))
        step = max(high - low, 1e-30) / 255
        rounded = np.clip(np.round(values / step), round(low / step), round(high / step)) * step
        return float(np.square(values - rounded).sum())

    best = min(FRACTIONS, key=error)
    return np.asarray(best * seen.low), np.asarray(best * seen.high)


Method = Callable[[Seen], tuple[np.ndarray, np.ndarray]]
RANGES: Mapping[str, Method] = {
    "usual extremes": usual_extremes,
    "least squares": least_squares,
    "percentiles": percentiles,
    "extremes": extremes,
}


def grids(seen: Mapping[str, Seen], form: Form, method: Method) -> dict[str, Grid]:
    """The grid of every tensor, in an engine's form."""
    return {name: _grid(one, form, method) for name, one in seen.items()}


def _grid(seen: Seen, form: Form, method: Method) -> Grid:
    axis = CHANNELS if seen.low.ndim else None
    low, high = method(seen)
    least, most = float(np.min(low)), float(np.max(high))
    if float(np.min(seen.low)) >= 0 and form.unsigned:
        return grid_between(low, high, signed=False, symmetric=True, axis=axis)
    lopsided = max(most, -least) > form.lopsided * max(0.0, min(most, -least)) and axis is None
    return grid_between(low, high, signed=not (lopsided and form.unsigned), symmetric=not lopsided, axis=axis)
