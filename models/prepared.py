"""A network as the pipeline takes it: its graph, its layers, its groups and its checksum, each found once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import onnx

from onnx_spdy.models.graph import model_sha256
from onnx_spdy.models.groups import Group, find_groups
from onnx_spdy.models.layers import Layer, find_layers


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network that `prepare` made, or one that was read from a file of its making.

    Attributes:
        proto: the graph; never changed.
    """

    proto: onnx.ModelProto

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer that carries weights, in graph order; `skip` says why one can't be pruned."""
        return tuple(find_layers(self.proto))

    @cached_property
    def prunable(self) -> tuple[Layer, ...]:
        """The layers that can be pruned."""
        return tuple(layer for layer in self.layers if layer.prunable)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What can shrink, and what can't and why; see `find_groups`."""
        return tuple(find_groups(self.proto))

    @cached_property
    def sha256(self) -> str:
        """What tells this network from others; see `model_sha256`."""
        return model_sha256(self.proto)
