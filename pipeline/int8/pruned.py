"""A pruned network in int8."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from onnx_spdy.models import Prepared
from onnx_spdy.models.int8.form import Form
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.int8.quantise import quantise
from onnx_spdy.pipeline.loss import Loss
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.ranges import RANGES


def in_int8(
    pruned: PrunedNetwork,
    samples: Samples,
    form: Form,
    *,
    ranges: Collection[str] = RANGES,
    loss: str | Loss | None = None,
    seed: int = 0,
    progress: Progress = ignore,
) -> PrunedNetwork:
    """The same network with the layers in int8 that its levels say, maybe none; see `quantise`."""
    layers = pruned.int8_nodes
    if layers is not None and not layers:
        return pruned
    network = Network(Prepared(pruned.in_float()), for_pruning=False)
    found = quantise(network, samples, form, layers=layers, ranges=ranges, loss=loss, seed=seed, progress=progress)
    return replace(pruned, int8=found)
