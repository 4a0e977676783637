"""Corrected biases, by means that ONNX Runtime measures."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_spdy.models import TorchGraph, find_layers, write_weights
from onnx_spdy.models.int8.form import FORMS
from onnx_spdy.models.int8.nearest import nearest
from onnx_spdy.models.int8.place import find_placement
from onnx_spdy.models.int8.write import Integers, IntegerWeight, write_int8
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.int8.biases import channel_means, corrected_biases
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.ranges import extremes, grids, observe
from tests.models.int8.writing import all_values

LAYERS = ("a", "b", "c", "output")  # the last one's bias is added by a node of its own


def means(model: onnx.ModelProto, samples: Samples) -> dict[str, np.ndarray]:
    values = all_values(model, samples.inputs)
    return {name: values[name].mean((0, *range(2, values[name].ndim))) for name in LAYERS}


def with_coarse_weights(network: Network, samples: Samples) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """In int8 with weights of 3 bits, always rounded down, so that means shift; and the biases that it has."""
    placement = find_placement(network.model, FORMS["openvino"])
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.model.graph.initializer}
    weights = {}
    for one in placement.weights:
        plain = nearest(stored[one.name], one.axis)
        weights[one.name] = IntegerWeight((plain.values // 32 * 32).clip(-127, 127).astype(np.int8), plain.scale)
    seen = observe(network, placement.points, (), samples, np.random.default_rng(0))
    written = write_int8(network.model, placement, Integers(grids(seen, FORMS["openvino"], extremes), weights))
    return written, {name: stored[name] for name in ("a.bias", "b.bias", "c.bias", "d.bias")}


@pytest.mark.parametrize("count", [64, 1])
def test_every_channel_gets_its_mean_back(network: Network, samples: Samples, count: int) -> None:
    some = samples.take(slice(0, count))
    batches = network.batches(some)
    layers = [layer for layer in find_layers(network.model, minimum_weights=0) if layer.bias]
    assert len(layers) == 4
    written, biases = with_coarse_weights(network, some)
    wanted = channel_means(network, layers, batches)
    found = corrected_biases(TorchGraph(written).eval(), layers, batches, wanted, biases)
    assert found.keys() == biases.keys()
    dense, before = means(network.model, some), means(written, some)
    after = means(write_weights(written, found), some)
    for name in LAYERS:
        scale = np.abs(dense[name]).max()
        assert np.abs(before[name] - dense[name]).max() > 0.02 * scale
        np.testing.assert_allclose(after[name], dense[name], atol=1e-3 * scale)
    for layer in layers:
        if layer.output != "d":
            np.testing.assert_allclose(wanted[layer.name], dense[layer.output], atol=1e-4)


def test_a_network_that_lost_nothing_keeps_its_biases(network: Network, samples: Samples) -> None:
    batches = network.batches(samples)
    layers = [layer for layer in find_layers(network.model, minimum_weights=0) if layer.bias]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in network.model.graph.initializer}
    biases = {str(layer.bias): stored[str(layer.bias)] for layer in layers}
    wanted = channel_means(network, layers, batches)
    found = corrected_biases(TorchGraph(network.model).eval(), layers, batches, wanted, biases)
    for name, values in found.items():
        np.testing.assert_allclose(values, biases[name], atol=1e-5)
