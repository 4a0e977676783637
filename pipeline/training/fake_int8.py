"""Eight bits while training: weights and activations are rounded on the way forward, and not on the way back.

What is trained stays in floating point and learns to do well rounded. The activations' grids are those of the network
that the training starts from; a weight's follow its largest value.

Source: Bengio, Léonard & Courville (2013) for the straight-through estimator; Jacob et al. (CVPR 2018) for rounding in
training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from onnx_spdy.models.int8.fake import Rounding, activation_rounding, weight_rounding
from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.place import find_placement
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network, Weights
from onnx_spdy.pipeline.ranges import RANGE_SAMPLES, RANGES, grids, observe


@dataclass(frozen=True)
class FakeInt8:
    """How a network is rounded while it is trained.

    Attributes:
        form: of the engine that will run it.
        ranges: how the ends of activations' ranges are chosen, a key of `RANGES`.
        layers: names of the nodes with weights that will compute in int8; None for all that can.
    """

    form: Form
    ranges: str
    layers: Collection[str] | None = None

    @contextlib.contextmanager
    def rounding(self, network: Network, weights: Weights, samples: Samples, seed: int) -> Iterator[None]:
        """The network computes as it will in int8, as long as it lasts.

        Args:
            network: whose layers round that will compute in int8.
            weights: those that it starts from.
            samples: of which the first are looked at.
            seed: of the activations that are drawn.
        Raises:
            NothingToQuantise: no layer can compute in int8.
            RangeError: activations on the samples that no grid can hold.
        """
        placement = find_placement(network.model, self.form, self.layers)
        some = network.first(samples, RANGE_SAMPLES)
        by_channel = placement.by_channel(self.form)
        rng = np.random.default_rng(seed)
        seen = observe(network, placement.points, by_channel, some, rng, weights)
        rounded: dict[str, dict[int, Rounding]] = {}
        for tensor, grid in grids(seen, self.form, RANGES[self.ranges]).items():
            readers = placement.points[tensor]
            once = _Once(activation_rounding(grid), len(readers))
            for node, number in readers:
                rounded.setdefault(node, {})[number] = once
        for weight in placement.weights:
            for node in weight.nodes:
                rounded.setdefault(node, {})[1] = weight_rounding(weight.axis)
        hooks = [network.graph.node(name).register_forward_pre_hook(_before(some)) for name, some in rounded.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Once:
    """Rounds a tensor for the first node that reads it, and gives the others the same."""

    def __init__(self, rounding: Rounding, readers: int) -> None:
        self._rounding, self._readers = rounding, readers
        self._left = 0
        self._of: torch.Tensor | None = None
        self._rounded: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._rounded is None or x is not self._of:
            self._left, self._of, self._rounded = self._readers, x, self._rounding(x)
        rounded = self._rounded
        self._left -= 1
        if not self._left:  # nothing stays in memory longer than it must
            self._of = self._rounded = None
        return rounded


def _before(rounded: dict[int, Rounding]):
    """A hook that rounds some of a node's inputs."""

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
        return tuple(
            rounded[number](value) if number in rounded and value is not None else value
            for number, value in enumerate(inputs)
        )

    return hook
