"""Networks in int8 as they would be deployed, made for their time alone.

Grids come from what the dense network gives for the inputs that it is timed with. Their numbers hardly matter, but
where the zero points are does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_spdy.models import Prepared
from onnx_spdy.models.graph import graph_inputs
from onnx_spdy.models.int8.flows import Clauses, find_flows
from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.grid import Grid
from onnx_spdy.models.int8.nearest import nearest
from onnx_spdy.models.int8.place import Placement, find_placement
from onnx_spdy.models.int8.write import Integers, write_int8
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.latency.fit_precisions import Tensor
from onnx_spdy.pipeline.latency.switches import NEVER, Cases, any_in_each, either
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.ranges import extremes, grids, observe
from onnx_spdy.runtimes import Workload, resolved
from onnx_spdy.runtimes.batch_axes import batch_axes


class InInt8:
    """Writes a network, and narrower ones of it, in int8.

    Args:
        network: the dense one.
        form: of the engine.
        workload: what it is timed with.
    Raises:
        ModelError, NothingToQuantise: see `find_placement`.
    """

    def __init__(self, network: Prepared, form: Form, workload: Workload) -> None:
        self._network, self._form, self._workload = network, form, workload
        self._placement = find_placement(network.proto, form)

    def written(self, model: onnx.ModelProto, layers: Collection[str] | None = None) -> onnx.ModelProto:
        """A network with nodes of the dense one in int8.

        Args:
            layers: names of the nodes with weights that compute in int8; None for all that can.
        """
        placement = self._placement  # narrower networks have the same nodes, as long as no branch is gone
        if layers is not None or len(model.graph.node) < len(self._network.proto.graph.node):
            placement = find_placement(model, self._form, layers)
        grids = {name: _fitting(self._grid(name), name, placement, model) for name in placement.points}
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        weights = {
            weight.name: nearest(numpy_helper.to_array(stored[weight.name]), weight.axis)
            for weight in placement.weights
        }
        return write_int8(model, placement, Integers(grids, weights, self._form.int32_bias))

    def tensors(self, layers: Mapping[str, int]) -> dict[str, Tensor]:
        """On which layers it depends whether the dense network's tensors are in int8.

        Args:
            layers: index of the layer that a node with weights belongs to; of the others it is taken for granted.
        """
        number_of = {
            output: layers[node.name]
            for node in self._network.proto.graph.node
            if node.name in layers
            for output in node.output
        }

        def cases(*several: Clauses) -> Cases:
            clauses = {clause for clauses in several for clause in clauses if clause <= layers.keys()}
            return any_in_each(sorted(sorted({layers[node] for node in clause}) for clause in clauses))

        found = {}
        for name, flow in find_flows(self._network.proto, self._form).items():
            found[name] = Tensor(
                layer=number_of.get(name),
                made=NEVER if flow.made is None else cases(flow.made),
                read=either([cases(one) for one in flow.read]),
                alone=cases(*flow.read) if flow.alone else NEVER,
                converts=flow.converts,
                moved=flow.moved,
            )
        return found

    def _grid(self, tensor: str) -> Grid:
        if tensor not in self._grids:
            self._grids |= self._observed({tensor})
        return self._grids[tensor]

    @cached_property
    def _grids(self) -> dict[str, Grid]:
        """Of the dense network."""
        return self._observed(set(self._placement.points))

    @cached_property
    def _dense(self) -> Network:
        return Network(self._network, for_pruning=False)

    def _observed(self, tensors: Collection[str]) -> dict[str, Grid]:
        model = self._network.proto
        batch = Samples(dict(resolved(model.graph, self._workload).inputs or {}), axes=batch_axes(graph_inputs(model)))
        by_channel = self._placement.by_channel(self._form)
        seen = observe(self._dense, tensors, by_channel, batch, np.random.default_rng(0))
        return grids(seen, self._form, extremes)


def _fitting(grid: Grid, tensor: str, placement: Placement, model: onnx.ModelProto) -> Grid:
    """The grid for as many channels as a narrower network has."""
    if grid.axis is None:
        return grid
    readers = {name for name, _ in placement.points[tensor]}
    node = next(node for node in model.graph.node if node.name in readers)
    channels = next(one.i for one in node.attribute if one.name == "group")
    return replace(grid, scale=np.full(channels, grid.scale.max(), np.float32))
