from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnx_spdy.models import Prepared, to_canonical, write_weights
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.correct import StatisticsCorrection
from onnx_spdy.pipeline.data import DataError, Samples
from onnx_spdy.pipeline.deploy import DeployError, check_zeros_kept
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.loss import kl_divergence
from onnx_spdy.pipeline.mask import level_violation, select_mask
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, PrunedNetwork, Weights
from onnx_spdy.pipeline.training.finetune import PRUNING_SHARE, FinetuneError, GradualMasks, finetune
from onnx_spdy.pipeline.training.repair import repair
from onnx_spdy.pipeline.training.trainer import split

HALF = Level("unstructured", 0.7)


def prune(network: Network, layers, level: Level = HALF) -> PrunedNetwork:
    """Magnitude pruning of the dense weights."""
    weights = {}
    for layer in layers:
        canonical = to_canonical(layer, network.dense(layer.weight))
        mask = to_canonical(layer, select_mask(canonical.abs(), level))
        weights[layer.weight] = network.dense(layer.weight) * mask
    return PrunedNetwork.with_zeros(network, weights, {layer.name: level for layer in layers})


def written(network: Network, pruned: PrunedNetwork) -> onnx.ModelProto:
    return write_weights(network.model, {name: values.numpy() for name, values in pruned.weights.items()})


def layer_errors(network: Network, weights: Weights, samples: Samples) -> float:
    """Relative squared error of each layer's output against the dense network's, by hooks of its own."""

    def outputs(weights: Weights) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        hooks = [
            network.graph.node(layer.name).register_forward_hook(lambda m, i, output: found.append(output))
            for layer in network.layers
        ]
        with torch.no_grad():
            found.extend(network.run(samples, weights).values())
        for hook in hooks:
            hook.remove()
        return found

    pairs = zip(outputs(weights), outputs(DENSE_WEIGHTS), strict=True)
    return float(np.mean([float((a - b).square().sum() / b.square().sum()) for a, b in pairs]))


def test_repair_brings_layers_back_to_the_dense_ones_on_new_samples(network: Network, samples: Samples) -> None:
    pruned = prune(network, network.layers)
    rng = np.random.default_rng(7)
    others = Samples({"input": rng.normal(size=(64, 3, 12, 12)).astype(np.float32).cumsum(axis=3)})
    start = {name: values.clone() for name, values in pruned.weights.items()}
    repaired, training = repair(network, pruned, samples, epochs=10)
    assert training and training.loss_after < training.loss_before
    before, after = (layer_errors(network, one.weights, others) for one in (pruned, repaired))
    assert after < 0.8 * before
    assert all(bool((repaired.weights[name][values == 0] == 0).all()) for name, values in start.items())
    assert all(torch.equal(pruned.weights[name], values) for name, values in start.items())  # a value doesn't change
    biases = [layer.bias for layer in network.layers if layer.bias]
    assert all(not torch.equal(repaired.weights[bias], network.dense(bias)) for bias in biases)
    assert set(repaired.weights) == {*start, *biases}


def test_layers_that_stay_dense_are_not_touched(network: Network, samples: Samples) -> None:
    pruned = network.layers[1:-1]
    repaired, _ = repair(network, prune(network, pruned), samples, epochs=1)
    assert set(repaired.weights) == {name for layer in pruned for name in (layer.weight, layer.bias)}


def test_a_network_that_is_dense_is_not_repaired(network: Network, samples: Samples) -> None:
    dense = PrunedNetwork.with_zeros(network, {}, dict.fromkeys((layer.name for layer in network.layers), DENSE))
    assert repair(network, dense, samples) == (dense, None)


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_repair_never_ends_worse_on_held_out_samples_than_it_began(
    network: Network, samples: Samples, rate: float
) -> None:
    pruned = prune(network, network.layers)
    repaired, training = repair(network, pruned, samples, epochs=2, rate=rate)  # far too large: it can only get worse
    assert training and training.loss_after == training.loss_before
    assert (("became nan" in training.stopped) or ("became inf" in training.stopped)) == (rate > 1e20)
    assert all(torch.equal(repaired.weights[name], values) for name, values in pruned.weights.items())


def test_a_rate_that_is_too_large_is_lowered_until_repair_helps(network: Network, samples: Samples) -> None:
    _, training = repair(network, prune(network, network.layers), samples, epochs=30, rate=1.0)
    assert training and training.loss_after < 0.8 * training.loss_before


def test_a_rate_that_leaves_the_network_worse_is_lowered_until_training_helps(
    network: Network, samples: Samples
) -> None:
    pruned = written(network, prune(network, network.layers))
    training = finetune(network.prepared, pruned, samples, epochs=30, rate=1.0).training
    assert training.loss_after < training.loss_before


def test_a_stopped_repair_goes_on_to_the_same_bytes(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_in_the_third_epoch(done: int, total: int, note: str) -> None:
        if done == 2 * total // 4 + 1:
            raise Stop

    results = []
    for name in ("straight", "stopped"):
        network = Network(Prepared(model))
        pruned = prune(network, network.layers)
        arguments = {"epochs": 4, "checkpoint": tmp_path / name, "seed": 3}
        if name == "stopped":
            with pytest.raises(Stop):
                repair(network, pruned, samples, progress=stop_in_the_third_epoch, **arguments)
        results.append(repair(network, pruned, samples, **arguments))
    (whole, first), (continued, second) = results
    assert first == second
    assert all(torch.equal(continued.weights[name], values) for name, values in whole.weights.items())


def test_a_finished_repair_is_not_done_again(network: Network, samples: Samples, tmp_path: Path) -> None:
    pruned = prune(network, network.layers)
    repaired, first = repair(network, pruned, samples, epochs=2, checkpoint=tmp_path / "file")

    def refuse(done: int, total: int, note: str) -> None:
        raise AssertionError("it trained again")

    again, second = repair(network, pruned, samples, epochs=2, checkpoint=tmp_path / "file", progress=refuse)
    assert second == first
    assert all(torch.equal(again.weights[name], values) for name, values in repaired.weights.items())


def test_one_sample_is_too_little(samples: Samples) -> None:
    with pytest.raises(DataError, match="at least 2"):
        split(samples.take(slice(0, 1)), 0)
    for count in (2, 16, 64, 96):
        train, held = split(samples.take(slice(0, count)), 0)
        assert sorted([*train, *held]) == [*range(count)]


@pytest.mark.parametrize("level", [HALF, Level.parse("2:4"), Level("block4", 0.6)], ids=str)
def test_gradual_training_ends_at_the_profile_and_close_to_the_dense_network(
    network: Network, samples: Samples, level: Level
) -> None:
    levels = {layer.name: level for layer in network.layers[1:]}
    unlabelled = Samples(samples.inputs)
    found = finetune(network.prepared, network.model, unlabelled, levels=levels, epochs=16)
    trained = Network(Prepared(found.model))
    for layer in trained.layers[1:]:
        assert level_violation(to_canonical(layer, trained.dense(layer.weight)), level) is None
    with torch.no_grad():
        dense = network.run(samples)
        gradual = float(kl_divergence(trained.run(samples), dense))
        pruned = prune(network, network.layers[1:], level)
        at_once = float(kl_divergence(network.run(samples, pruned.weights), dense))
    assert gradual < 0.5 * at_once
    assert found.learnt_from == "the dense network"


def test_the_masks_of_a_gradual_training_leave_layers_their_statistics(network: Network, samples: Samples) -> None:
    level = Level("unstructured", 0.9)
    errors = []
    for correction in (None, StatisticsCorrection(network, samples)):
        names = [name for layer in network.layers for name in (layer.weight, layer.bias) if name]
        with network.trainable(names, DENSE_WEIGHTS) as parameters:
            masks = GradualMasks(network, parameters, {layer.name: level for layer in network.layers}, correction)
            masks.step(PRUNING_SHARE)
            assert masks.finished
            weights = {name: values.detach().clone() for name, values in parameters.items()}
        for layer in network.layers:
            assert level_violation(to_canonical(layer, weights[layer.weight]), level) is None
        errors.append(layer_errors(network, weights, samples))
    assert errors[1] < 0.8 * errors[0]


def test_labels_are_learnt_where_there_are_some(network: Network, samples: Samples) -> None:
    bright = (samples.inputs["input"].mean((1, 2, 3)) > 0).astype(np.int64)  # nothing that the network knows
    samples = Samples(samples.inputs, bright)
    pruned = written(network, prune(network, network.layers))
    found = finetune(network.prepared, pruned, samples, epochs=30, rate=0.03)
    assert found.learnt_from == "the dense network and labels"
    check_zeros_kept(pruned, found.model)

    def right(model: onnx.ModelProto) -> float:
        scores = Network(Prepared(model)).run(samples)["output"].argmax(1).numpy()
        return float((scores == samples.target).mean())

    assert right(found.model) > 0.6 > 0.5 > right(pruned)


def test_lost_zeros_are_refused(network: Network) -> None:
    pruned = written(network, prune(network, network.layers))
    with pytest.raises(DeployError, match="302 zeros of 'a"):
        check_zeros_kept(pruned, network.model)


def test_a_network_of_another_graph_is_refused(model: onnx.ModelProto, samples: Samples) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.node[0].name = "renamed"
    with pytest.raises(FinetuneError, match="differs"):
        finetune(Prepared(model), other, samples)


def test_a_checkpoint_of_another_training_is_refused(model: onnx.ModelProto, samples: Samples, tmp_path: Path) -> None:
    finetune(Prepared(model), model, samples, epochs=1, checkpoint=tmp_path / "file")
    with pytest.raises(ArtifactError, match="its seed is 0, this run's is 1"):
        finetune(Prepared(model), model, samples, epochs=1, seed=1, checkpoint=tmp_path / "file")
