"""The dense network's outputs, which pruned ones learn from: kept in memory where they fit, else computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType

import numpy as np
import torch

from onnx_spdy.models import Layer
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.pipeline.rows import sample_axes

CACHE_BYTES = 1 << 30
NO_CHOICE: Mapping[str, np.ndarray] = MappingProxyType({})


class Capture:
    """Runs a network and returns the outputs of some of its layers beside its own, zero at padding. A context manager.

    Args:
        network: with the weights that its graph holds: it may be in training.
        layers: those whose outputs are wanted, under the names of their output tensors.
        channels: initializer of a layer's weight -> the output channels that are wanted; all where it isn't named.
    """

    def __init__(
        self, network: Network, layers: Sequence[Layer] = (), channels: Mapping[str, np.ndarray] = NO_CHOICE
    ) -> None:
        self._network = network
        self._channels = {name: torch.from_numpy(some) for name, some in channels.items()}
        self._found: dict[str, torch.Tensor] = {}
        self._hooks = [network.graph.node(layer.name).register_forward_hook(self._keeper(layer)) for layer in layers]
        self._bfloat16 = network.bfloat16

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, batch: Samples) -> dict[str, torch.Tensor]:
        """Tensor name -> value; in bfloat16 where the CPU multiplies it itself."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            outputs = self._network.forward(batch)
        padding = Padding(batch.samples_first)
        found = {name: padding.zeroed(values) for name, values in self._found.items()} | outputs
        self._found.clear()
        return found

    def _keeper(self, layer: Layer):
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            some = self._channels.get(layer.weight)
            axis = 1 if layer.op == "Conv" else -1
            self._found[layer.output] = output if some is None else output.index_select(axis, some.to(output.device))

        return hook


class DenseOutputs:
    """What the dense network computes for samples.

    Args:
        network: the dense one is a copy of its own, so that this one may be in training.
        samples: all that will be asked for.
        layers, channels: whose outputs are wanted beside the network's; see `Capture`.
        cache_bytes: outputs are kept if those of all samples fit in so much memory; otherwise each is computed
            when it is asked for.
    """

    def __init__(
        self,
        network: Network,
        samples: Samples,
        layers: Sequence[Layer] = (),
        channels: Mapping[str, np.ndarray] = NO_CHOICE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._samples, self._limit = samples, cache_bytes
        self._capture = Capture(Network(network.prepared), layers, channels)
        self._cache: dict[str, torch.Tensor] | None = None
        self._known = np.zeros(len(samples), bool)
        self._fits: bool | None = None

    def __call__(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """Tensor name -> values of the samples at `index`, in that order."""
        index = np.array(index)  # its own: torch takes no array that runs backwards
        if self._cache is None or not self._known[index].all():
            with torch.no_grad():
                found = self._capture(self._samples.take(index))
            if self._fits is None:
                self._fits = self._can_keep(found, index)
            if not self._fits:
                return found
            self._keep(found, index)
        assert self._cache is not None
        rows = torch.from_numpy(index)
        return {name: values[rows] for name, values in self._cache.items()}

    def _can_keep(self, found: dict[str, torch.Tensor], index: np.ndarray) -> bool:
        count = len(index)
        one_row_each = all(value.ndim > 0 and len(value) == count for value in found.values())
        if one_row_each:  # or as many positions as samples, say
            turned = self._capture(self._samples.take(index[::-1]))
            one_row_each = not any(sample_axes(found, turned, count).values())
        size = sum(value.numel() * value.element_size() for value in found.values()) / count
        return one_row_each and size * len(self._samples) <= self._limit

    def _keep(self, found: dict[str, torch.Tensor], index: np.ndarray) -> None:
        if self._cache is None:
            self._cache = {
                name: torch.zeros(len(self._samples), *value.shape[1:], dtype=value.dtype)
                for name, value in found.items()
            }
        for name, value in found.items():
            self._cache[name][torch.from_numpy(index)] = value
        self._known[index] = True
