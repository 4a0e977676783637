from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from onnx_spdy.models import Prepared, TorchGraph, changed_initializers
from onnx_spdy.models.int8.form import FORMS
from onnx_spdy.models.int8.nearest import nearest
from onnx_spdy.models.int8.place import find_placement
from onnx_spdy.models.int8.write import Integers, write_int8
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.deploy import DeployError, deploy
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, PrunedNetwork, as_tensors
from onnx_spdy.pipeline.ranges import RANGES, grids, observe
from onnx_spdy.pipeline.training.fake_int8 import FakeInt8
from onnx_spdy.pipeline.training.whole import train_whole
from tests.pipeline.training.test_finetune import prune

FORM = FORMS["fake"]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(sum((a[name] - b[name]).norm() / b[name].norm() for name in b))


def outputs(model: onnx.ModelProto, samples: Samples) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return TorchGraph(model).eval()(as_tensors(samples))


@pytest.mark.parametrize("form", ["openvino", "onnxruntime", "tensorrt"])
def test_rounding_computes_what_the_network_in_int8_computes(model: onnx.ModelProto, samples: Samples, form) -> None:
    network, chosen = Network(Prepared(model)), FORMS[form]
    plain, placement = network.run(samples), find_placement(model, chosen)
    ranges = next(iter(RANGES))
    seen = observe(network, placement.points, placement.by_channel(chosen), samples, np.random.default_rng(0))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {weight.name: nearest(stored[weight.name], weight.axis) for weight in placement.weights}
    in_int8 = outputs(write_int8(model, placement, Integers(grids(seen, chosen, RANGES[ranges]), weights)), samples)
    with FakeInt8(chosen, ranges).rounding(network, DENSE_WEIGHTS, samples, 0), torch.no_grad():
        rounded = network.run(samples)
    assert distance(rounded, in_int8) < 0.1 * distance(plain, in_int8)
    assert distance(network.run(samples), plain) == 0  # nothing is left behind


def test_gradients_go_through_the_rounding(network: Network, samples: Samples) -> None:
    names = [layer.weight for layer in network.layers]
    with (
        FakeInt8(FORM, next(iter(RANGES))).rounding(network, DENSE_WEIGHTS, samples, 0),
        network.trainable(names, DENSE_WEIGHTS) as parameters,
    ):
        for one in parameters.values():
            one.requires_grad_(True)
        network.forward(samples)["output"].square().sum().backward()
        for name, one in parameters.items():
            assert one.grad is not None, name
            assert float((one.grad != 0).float().mean()) > 0.5
            one.requires_grad_(False)
            one.grad = None


def test_the_whole_network_is_trained_and_zeros_stay(network: Network, samples: Samples, tmp_path: Path) -> None:
    layers = network.layers[:1]
    pruned = prune(network, layers, Level("unstructured", 0.9))
    trained, training = train_whole(
        network, pruned, samples, form=None, seconds=60, seed=0, checkpoint=tmp_path / "file"
    )  # fmt: skip
    assert training.loss_after < training.loss_before
    changed = set(changed_initializers(network.model, trained.in_float()))
    assert {layer.weight for layer in network.layers} <= changed
    before = deploy(network.prepared, pruned, tmp_path / "before.onnx")
    after = deploy(network.prepared, trained, tmp_path / "after.onnx", before)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    zeros = pruned.weights[layers[0].weight].numpy() == 0
    assert np.array_equal(stored[layers[0].weight] == 0, zeros)
    again, _ = train_whole(network, pruned, samples, form=None, seconds=60, seed=0, checkpoint=tmp_path / "file")
    assert all(torch.equal(again.weights[name], value) for name, value in trained.weights.items())
    other = prune(network, layers, Level("unstructured", 0.8))
    train_whole(network, other, samples.take(slice(0, 64)), form=None, seconds=1, seed=0, checkpoint=tmp_path / "file")


def test_a_network_that_was_not_trained_whole_may_change_in_pruned_layers_only(
    network: Network, samples: Samples, tmp_path: Path
) -> None:
    pruned = prune(network, network.layers[:1], Level("unstructured", 0.9))
    other = network.layers[1].weight
    with pytest.raises(DeployError, match="prunes no layer that it belongs to"):
        deploy(
            network.prepared,
            PrunedNetwork(pruned.base, {**pruned.weights, other: network.dense(other) + 1}, pruned.levels),
            tmp_path / "no.onnx",
        )
