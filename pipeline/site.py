"""Sites: what a search chooses a level for.

A prunable layer is one, which gets zeros; a layer that can compute in int8, where precisions are mixed; and so is a
group of units that must shrink together (channels, feed-forward units, attention heads), which gets a width. Either way
there are layers whose weights the choice changes: the layer itself, or those that take the group's units in. Weights
for a unit that is missing are zero there, so a network of some width is the whole one with other weights, until the
units are cut out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from onnx_spdy.models import Group, Layer, Prepared, find_layers, to_canonical
from onnx_spdy.models.groups import HEADS
from onnx_spdy.models.int8.form import OPENVINO
from onnx_spdy.models.int8.place import NothingToQuantise, find_placement
from onnx_spdy.pipeline.level import DENSE, Level, mixes_precisions
from onnx_spdy.runtimes.errors import OnnxSpdyError

# Engines compute channels in runs of 16 or 32 at a time; a network too narrow for that has smaller steps.
STEPS = {64: 16, 32: 8, 16: 4, 8: 2}  # units of a group, at least -> units that are removed at a time


class NothingToPrune(OnnxSpdyError, ValueError):
    """No layer of the network can be pruned, or no group can shrink."""


@dataclass(frozen=True)
class Site:
    """What a level is chosen for.

    Attributes:
        name: of the layer or the group.
        layers: those whose weights it changes, in graph order.
        group: the units that shrink together; None for a layer, which gets zeros.
    """

    name: str
    layers: tuple[Layer, ...]
    group: Group | None = None

    @cached_property
    def step(self) -> int:
        """How many units are removed at a time."""
        if self.group is None or self.group.kind == HEADS:
            return 1
        return next((step for least, step in STEPS.items() if self.group.units >= least), 1)

    def kept(self, level: Level) -> int:
        """How many units of the group stay at a level: so many that the fraction that goes is at least the level's.

        A multiple of `step`, and never less than one step; but none at the last level, where a branch can go.
        """
        assert self.group is not None
        if level.is_nothing and self.group.branch is not None:
            return 0
        if level.is_whole:
            return self.group.units
        most = self.group.units * (10_000 - round(10_000 * level.sparsity)) // 10_000
        return max(self.step, most // self.step * self.step)

    def changes(self, level: Level) -> bool:
        """Whether a level changes anything of the dense network."""
        return self.kept(level) < self.group.units if self.group else level != DENSE

    def inputs(self, layer: Layer) -> tuple[tuple[int, ...], ...]:
        """(units) for each unit of the group the input channels of a layer, (out, in, *kernel), on which it lies."""
        assert self.group is not None
        return next(axis.indices for axis in self.group.axes if axis.initializer == layer.weight and axis.role == "in")

    def magnitudes(self, dense: Callable[[str], torch.Tensor]) -> np.ndarray:
        """What goes first where weights are judged by their size: of a layer |w|, of a group (units,) norms.

        Args:
            dense: initializer -> its dense values as the file stores them.
        """
        if self.group is None:
            return dense(self.layers[0].weight).abs().numpy()
        squares = np.zeros(self.group.units)
        for layer in self.layers:
            inputs = to_canonical(layer, dense(layer.weight)).float().square().transpose(0, 1).flatten(1).sum(1).numpy()
            squares += [inputs[list(some)].sum() for some in self.inputs(layer)]
        return np.sqrt(squares)


def find_sites(prepared: Prepared, levels: Sequence[Level]) -> tuple[Site, ...]:
    """What these levels can be chosen for in a network, in graph order.

    Raises:
        NothingToPrune: the network has nothing of the kind; the message says why for the first few.
    """
    if mixes_precisions(levels):
        return _in_int8(prepared)
    if not any(level.is_width for level in levels):
        return tuple(Site(layer.name, (layer,)) for layer in prepared.prunable)
    # Those too small to gain by zeros can lose units all the same.
    layer_of = {
        node: layer
        for layer in find_layers(prepared.proto, minimum_weights=0)
        if layer.prunable
        for node in layer.nodes
    }
    found, reasons = [], []
    for group in prepared.groups:
        consumers = [layer_of.get(name) for name in group.consumers]
        layers = tuple(dict.fromkeys(layer for layer in consumers if layer is not None))
        if not group.prunable:
            reasons.append(f"{group.name}: {group.skip}")
        elif not layers or len(layers) < len(set(consumers)) or not all(_takes(group, layer) for layer in layers):
            reasons.append(f"{group.name}: what takes its units in is no layer that can be pruned")
        else:
            found.append(Site(group.name, layers, group))
    if not found:
        raise NothingToPrune(f"the network has no group of units that can shrink ({'; '.join(reasons[:3]) or 'none'})")
    return tuple(found)


def _in_int8(prepared: Prepared) -> tuple[Site, ...]:
    """The layers that can compute in int8: the same in every form."""
    try:
        able = {name for weight in find_placement(prepared.proto, OPENVINO).weights for name in weight.nodes}
    except NothingToQuantise as exc:
        raise NothingToPrune(str(exc)) from exc
    layers = find_layers(prepared.proto, minimum_weights=0)
    return tuple(Site(layer.name, (layer,)) for layer in layers if able.issuperset(layer.nodes))


def _takes(group: Group, layer: Layer) -> bool:
    return sum(axis.initializer == layer.weight and axis.role == "in" for axis in group.axes) == 1
