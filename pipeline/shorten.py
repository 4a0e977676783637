"""Samples cut to the positions that any of them uses: what a whole data set has of padding needn't be computed.

A user's sentences are filled up to the length that the network will run with, often to several times their own. Where
it computes the same without what all of them have too much, the database, the search and the training take less time by
as much. Latencies are still measured at the full length.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from onnx_spdy.models.graph import graph_inputs
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.padding import Padding, tokens

COMPARED = 8  # samples that the network is tried on
TOLERANCE = 1e-4  # of an output's largest value

logger = logging.getLogger(__name__)


def shortened(network: Network, samples: Samples) -> Samples:
    """The samples without the positions at the end that are padding in all of them.

    They stay as they are where there are none, where the network is for one length or has a target for each position,
    and where it computes something else without them.
    """
    cut = _without_padding(network, samples)
    if cut is None or network.is_mapped:  # such a network is never run as a whole
        return samples
    shorter, used, positions = cut
    index = network.whole(np.arange(min(COMPARED, len(samples))))
    if not _computes_the_same(network, samples.take(index), shorter.take(index)):
        return samples
    logger.info("samples are cut to %d of %d positions, the rest is padding in all of them", used, positions)
    return shorter


def _without_padding(network: Network, samples: Samples) -> tuple[Samples, int, int] | None:
    """The shorter samples, how many positions are left and how many there were; None where nothing can be cut."""
    if any(axis for axis in samples.axes.values()) or (samples.target is not None and samples.target.ndim > 1):
        return None
    masks = {name: mask for name, array in samples.samples_first.items() if (mask := tokens(name, array)) is not None}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph_inputs(network.model)}
    axis_names = {shapes[name][-1].dim_param for name in masks}
    if len(axis_names) != 1 or not (axis_name := axis_names.pop()):
        return None
    used = max(int(mask.any(axis=0).nonzero()[0].max(initial=0)) + 1 for mask in masks.values())
    positions = next(iter(masks.values())).shape[-1]
    if used == positions:
        return None
    inputs = {
        name: np.ascontiguousarray(
            array[tuple(slice(used if dim.dim_param == axis_name else None) for dim in shapes[name])]
        )
        for name, array in samples.inputs.items()
    }
    return Samples(inputs, samples.target, samples.axes), used, positions


def _computes_the_same(network: Network, samples: Samples, shorter: Samples) -> bool:
    try:
        with torch.inference_mode():
            expected, found = network.run(samples), network.run(shorter)
    except Exception:  # a size that is written into the graph makes operators raise anything
        return False
    padding = Padding(samples.samples_first)
    return all(_same(padding.zeroed(expected[name]), found[name]) for name in expected)


def _same(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether they agree where both have values, and nothing else is anywhere."""
    if expected.ndim != found.ndim or any(a < b for a, b in zip(expected.shape, found.shape, strict=True)):
        return False
    rest = expected.clone()
    rest[tuple(slice(size) for size in found.shape)] -= found
    return bool(rest.abs().max() <= TOLERANCE * expected.abs().max()) if rest.numel() else True
