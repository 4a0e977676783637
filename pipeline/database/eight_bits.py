"""Layers in int8, each by itself: weights rounded with the layer's Hessian, inputs in the range that loses least.

What a layer loses is the relative squared error of its output, with rounded weights and rounded inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper

from onnx_spdy.models.graph import node_names
from onnx_spdy.models.int8.fake import Rounding, activation_rounding
from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.grid import Grid
from onnx_spdy.models.int8.place import find_placement
from onnx_spdy.models.int8.write import IntegerWeight
from onnx_spdy.models.torch_graph import NodeModule
from onnx_spdy.pipeline.artifact import file_sha256, write_tensors
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.hessian import collect_hessians
from onnx_spdy.pipeline.database.rounding import integer_weight
from onnx_spdy.pipeline.network import Network, Weights, input_grid, packed_grid
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.ranges import RANGE_SAMPLES, RANGES, grids, observe
from onnx_spdy.pipeline.site import Site

JUDGED = 64  # on which ranges are compared


def build_rounded(
    network: Network,
    sites: Sequence[Site],
    samples: Samples,
    form: Form,
    files: Mapping[str, Path],
    progress: Progress = ignore,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Round these layers; gives the name and the entry of each once its file is written.

    Args:
        network: whose dense weights are rounded.
        samples: calibration samples.
        form: of the engine: which activations may be unsigned, and which have a scale for each channel.
        files: site -> where its file is written.
        progress: called with (done, total, what).
    Raises:
        RangeError: a layer's inputs are NaN or infinite for some sample.
    """
    some = network.first(samples, RANGE_SAMPLES)
    layers = [site.layers[0] for site in sites]
    placement = find_placement(network.model, form)
    axis_of = {weight.name: weight.axis for weight in placement.weights}
    graph = network.model.graph
    nodes = dict(zip(node_names(graph), graph.node, strict=True))
    read = {name: nodes[name].input[0] for layer in layers for name in layer.nodes}
    progress(0, len(sites), "ranges of activations")
    seen = observe(network, set(read.values()), placement.by_channel(form), some, np.random.default_rng(0))
    tried = {method: grids(seen, form, ends) for method, ends in RANGES.items()}
    known = [layer for layer in layers if layer.prunable]
    hessians = collect_hessians(network, known, some, lambda done, all_, _: progress(done, all_, "hessians"))
    stored = {tensor.name: tensor for tensor in network.model.graph.initializer}
    trials = {}
    for layer in layers:
        values = numpy_helper.to_array(stored[layer.weight])
        weight = integer_weight(values, axis_of[layer.weight], hessians.pop(layer.name, None))
        for name in layer.nodes:
            of_input = {method: found[read[name]] for method, found in tried.items()}
            trials[name] = _Trial(*_as_tensors(weight, axis_of[layer.weight]), of_input)
    _judge(network, trials, network.last(samples, JUDGED))
    for number, site in enumerate(sites, start=1):
        (layer,) = site.layers
        own = [trials[name] for name in layer.nodes]
        tensors = {"values": own[0].integers, "scale": own[0].scale}
        tensors |= {f"input {place}": packed_grid(one.best) for place, one in enumerate(own)}
        write_tensors(files[site.name], tensors)
        yield (
            site.name,
            {
                "file": files[site.name].name, "sha256": file_sha256(files[site.name]), "initializer": layer.weight,
                "shape": list(layer.shape), "errors": [0.0, max(one.error for one in own)],
            },
        )  # fmt: skip
        progress(number, len(sites), "layers")


def rounded_at(file: Any, site: Site) -> Weights:
    """The rounded weights of a layer, and the grids of what its nodes read.

    Args:
        file: open, of the site.
    """
    (layer,) = site.layers
    weight = file.get_tensor("values") * file.get_tensor("scale")
    return {layer.weight: weight} | {
        input_grid(name): file.get_tensor(f"input {place}") for place, name in enumerate(layer.nodes)
    }


@dataclass
class _Trial:
    """What is tried for the input of one node."""

    integers: torch.Tensor  # of the weight
    scale: torch.Tensor  # which broadcasts
    grids: Mapping[str, Grid]
    errors: dict[str, float] = field(default_factory=dict)  # squared, summed
    power: float = 0.0  # of the outputs without bias

    @property
    def best(self) -> Grid:
        return self.grids[min(self.grids, key=lambda method: self.errors.get(method, 0.0))]

    @property
    def error(self) -> float:
        least = min(self.errors.values(), default=0.0)
        return least / self.power if self.power > 0 else 0.0


def _as_tensors(weight: IntegerWeight, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers, and the scales so that they broadcast."""
    values = torch.from_numpy(weight.values)
    return values, torch.from_numpy(weight.scale).view([-1 if one == axis else 1 for one in range(values.dim())])


def _judge(network: Network, trials: Mapping[str, _Trial], samples: Samples) -> None:
    """Run each node rounded, beside itself as it is."""

    def hook(module: NodeModule, inputs: tuple[torch.Tensor | None, ...], output: torch.Tensor) -> None:
        trial = trials[module.node.name]
        x, dense = inputs[0], inputs[1]
        assert x is not None and dense is not None
        product = module.forward(x, dense)
        assert isinstance(product, torch.Tensor)
        trial.power += float(product.double().square().sum())
        for method, rounding in roundings[module.node.name].items():
            change = module.forward(rounding(x.float()), weights[module.node.name]) - product  # type: ignore[operator]  # one tensor too
            trial.errors[method] = trial.errors.get(method, 0.0) + float(change.double().square().sum())

    weights = {name: trial.integers * trial.scale for name, trial in trials.items()}
    roundings: dict[str, dict[str, Rounding]] = {
        name: {method: activation_rounding(grid) for method, grid in trial.grids.items()}
        for name, trial in trials.items()
    }
    hooks = [network.graph.node(name).register_forward_hook(hook) for name in trials]
    try:
        for batch in network.batches(samples):
            with torch.inference_mode():
                network.run(batch)
    finally:
        for one in hooks:
            one.remove()
