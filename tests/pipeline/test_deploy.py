from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnx_spdy.models import Prepared, from_canonical, load_model, to_canonical, write_weights
from onnx_spdy.pipeline.correct import LARGEST_SCALE, BatchCorrection, NotCorrected, StatisticsCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.pruners import PRUNERS
from onnx_spdy.pipeline.deploy import DeployError, check_deployed, deploy
from onnx_spdy.pipeline.level import Level, levels_for
from onnx_spdy.pipeline.mask import level_violation, select_mask
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, PrunedNetwork, Weights
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.runtimes import Workload, open_runtime

HALF = Level("unstructured", 0.5)


def pruned_network(network: Network, level: Level = HALF) -> PrunedNetwork:
    weights = {}
    for layer in network.layers:
        dense = to_canonical(layer, network.dense(layer.weight)).contiguous()
        pruned = torch.where(select_mask(dense.abs(), level), dense, 0.0)
        weights[layer.weight] = from_canonical(layer, pruned).contiguous()
    return PrunedNetwork.with_zeros(network, weights, {layer.name: level for layer in network.layers})


@pytest.mark.parametrize("level", [HALF, Level.parse("2:4"), Level("block4", 0.6)], ids=str)
def test_only_pruned_weights_change_and_engines_take_the_file(
    network: Network, samples: Samples, level: Level, tmp_path: Path
) -> None:
    deploy(network.prepared, pruned_network(network, level), tmp_path / "model.onnx")
    pruned = load_model(tmp_path / "model.onnx")
    onnx.checker.check_model(pruned)
    assert [n.SerializeToString() for n in pruned.graph.node] == [
        n.SerializeToString() for n in network.model.graph.node
    ]
    weights = {layer.weight for layer in network.layers}
    for before, after in zip(network.model.graph.initializer, pruned.graph.initializer, strict=True):
        assert before.name == after.name
        assert (before.name in weights) or before.SerializeToString() == after.SerializeToString()
    batch = samples.take(slice(0, 4))
    with open_runtime("onnxruntime") as runtime, runtime.open(tmp_path / "model.onnx", Workload(4)) as session:
        expected = session.run(batch.inputs)["output"]
    np.testing.assert_allclose(Network(Prepared(pruned)).run(batch)["output"].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_missing_zeros_are_refused(network: Network, tmp_path: Path) -> None:
    layer = network.layers[0]
    with pytest.raises(DeployError, match=r"0 of 432 weights are zero, it promises 216"):
        deploy(network.prepared, PrunedNetwork.with_zeros(network, {}, {layer.name: HALF}), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_change_that_the_profile_does_not_name_is_refused(network: Network) -> None:
    levels = {network.layers[0].name: HALF}
    weights = {name: values.numpy() for name, values in pruned_network(network).weights.items()}
    with pytest.raises(DeployError, match="profile prunes no layer"):
        check_deployed(network.prepared, write_weights(network.model, weights), levels)
    with pytest.raises(DeployError, match="doesn't have"):
        check_deployed(network.prepared, network.model, {"nothing": HALF})


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_n_of_m_is_checked_along_input_channels(pattern: str) -> None:
    level = Level.parse(pattern)
    kept, size = level.group
    weight = np.zeros((2, 16, 3, 3), np.float32)
    weight[:, [i for i in range(16) if i % size < kept]] = 1
    assert level_violation(weight, level) is None
    weight[1, size - 1, 2, 2] = 1
    assert level_violation(weight, level) == f"{kept + 1} non-zeros in a group of {size} input channels"


def test_statistics_equal_the_dense_ones_after_correction(network: Network, samples: Samples) -> None:
    def statistics(weights: Weights = DENSE_WEIGHTS) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        found = {}
        hooks = []
        for layer in network.layers:
            axes = (0, 2, 3) if layer.op == "Conv" else (0,)
            node = "add_d" if layer.op == "MatMul" else layer.name  # its bias is added there
            hooks.append(
                network.graph.node(node).register_forward_hook(
                    lambda module, inputs, output, name=layer.name, axes=axes: found.__setitem__(
                        name, (output.numpy().mean(axes), output.numpy().std(axes))
                    )
                )
            )
        network.run(samples, weights)
        for hook in hooks:
            hook.remove()
        return found

    dense, pruned = statistics(), pruned_network(network).weights
    correction = StatisticsCorrection(network, samples)
    broken = statistics(pruned)
    once = correction.apply(pruned, network.layers)
    corrected = statistics(once)
    for layer in network.layers:
        (mean, deviation), (new_mean, new_deviation) = dense[layer.name], corrected[layer.name]
        assert not np.allclose(broken[layer.name][0], mean, rtol=1e-2)
        reachable = broken[layer.name][1] * LARGEST_SCALE > deviation
        np.testing.assert_allclose(new_mean, mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(new_deviation[reachable], deviation[reachable], rtol=0.2, atol=1e-3)
        assert bool((once[layer.weight][pruned[layer.weight] == 0] == 0).all())
    twice = correction.apply(once, network.layers)
    for layer in network.layers:
        if layer.bias:  # there was little left to correct
            np.testing.assert_allclose(twice[layer.bias], once[layer.bias], rtol=0.05, atol=0.05)


def test_every_pruner_deploys_at_every_level(network: Network, tmp_path: Path) -> None:
    layer = network.layers[1]
    dense = to_canonical(layer, network.dense(layer.weight)).contiguous()
    levels = levels_for("unstructured")[1::10]
    hessian = torch.eye(dense[0].numel(), dtype=torch.float64)
    for prune in PRUNERS.values():
        for level, weight in zip(levels, prune(dense, hessian, levels), strict=True):
            values = from_canonical(layer, weight).contiguous()
            deploy(
                network.prepared,
                PrunedNetwork.with_zeros(network, {layer.weight: values}, {layer.name: level}),
                tmp_path / "model.onnx",
            )


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return fixed


@pytest.mark.parametrize("size", [1, 8])
def test_a_network_that_fixes_its_batch_is_corrected_as_with_an_open_one(
    model: onnx.ModelProto, samples: Samples, size: int
) -> None:
    def corrected(one: onnx.ModelProto) -> Weights:
        network = Network(Prepared(one))
        return StatisticsCorrection(network, samples).apply(pruned_network(network).weights, network.layers)

    expected, found = corrected(model), corrected(with_batch(model, size))
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_is_corrected_by_its_own_statistics_as_if_the_weights_had_been(
    model: onnx.ModelProto, samples: Samples, bias: bool
) -> None:
    if not bias:
        model = onnx.ModelProto.FromString(model.SerializeToString())
        del model.graph.node[0].input[2]
        del model.graph.initializer[1]
    network, batch = Network(Prepared(model)), samples.take(slice(0, 64))
    within = BatchCorrection(network, [Padding(batch.samples_first)])
    with torch.inference_mode():
        with within.remember(0):
            dense = network.run(batch)["output"]
        correction = StatisticsCorrection(network, batch)
        layers = [one for one in network.layers if one.op != "Gemm"]  # a dense layer stays as it is
        dense_weights = {layer.weight: network.dense(layer.weight) for layer in layers}
        pruned = {name: weight * (weight.abs() > weight.abs().median()) for name, weight in dense_weights.items()}
        plain = network.run(batch, pruned)["output"]
        with within.apply(0, pruned):
            found = network.run(batch, pruned)["output"]
        torch.testing.assert_close(network.run(batch, pruned)["output"], plain)
        expected = network.run(batch, correction.apply(pruned, layers))["output"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (found - dense).square().sum() < 0.9 * (plain - dense).square().sum()


def test_too_few_samples_for_a_fixed_batch_are_not_corrected(model: onnx.ModelProto, samples: Samples) -> None:
    with pytest.raises(NotCorrected, match="4 samples don't fill one batch of 8"):
        StatisticsCorrection(Network(Prepared(with_batch(model, 8))), samples.take(slice(0, 4)))


def test_groups_that_lost_nothing_need_not_be_layers(network: Network, tmp_path: Path) -> None:
    """As in a network that is fast enough in int8 alone, whose levels are those of groups."""
    whole = PrunedNetwork(network.prepared, {}, {"a group": Level.parse("int8")})
    assert deploy(network.prepared, whole, tmp_path / "model.onnx") == network.model
