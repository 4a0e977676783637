"""Narrow networks: cut out of masked ones, written, repaired and fine-tuned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from onnx_spdy.models import Prepared, load_model, write_weights
from onnx_spdy.models.graph import ModelError
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import build_database
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.deploy import DeployError, deploy
from onnx_spdy.pipeline.level import Level, levels_for
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.site import find_sites
from onnx_spdy.pipeline.stitch import CorrectedStitcher, Stitcher
from onnx_spdy.pipeline.training.finetune import FinetuneError, finetune
from onnx_spdy.pipeline.training.repair import repair
from onnx_spdy.pipeline.widths import cut_out, is_narrower, kept_outputs, touched

HALF = Level("channels", 0.5)


def masked_network(network: Network, seed: int = 0) -> tuple[PrunedNetwork, dict[str, tuple[int, ...]]]:
    """Half of the units of each group count for nothing."""
    rng = np.random.default_rng(seed)
    weights: dict[str, torch.Tensor] = {}
    widths = {}
    for site in find_sites(network.prepared, levels_for("channels")):
        assert site.group is not None
        kept = np.sort(rng.permutation(site.group.units)[: site.kept(HALF)])
        widths[site.name] = tuple(kept.tolist())
        for layer in site.layers:
            canonical = network.dense(layer.weight).clone()
            values = canonical.T if layer.transposed else canonical
            for unit in set(range(site.group.units)) - set(widths[site.name]):
                values[:, list(site.inputs(layer)[unit])] = 0
            weights[layer.weight] = canonical
    sites = find_sites(network.prepared, levels_for("channels"))
    layers = tuple(layer for site in sites for layer in site.layers)
    return PrunedNetwork(network.prepared, weights, dict.fromkeys(widths, HALF), layers), widths


def outputs(model: onnx.ModelProto, samples: Samples) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, samples.inputs)[0]


def sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


@pytest.fixture
def narrow(network: Network, samples: Samples) -> PrunedNetwork:
    pruned, widths = masked_network(network)
    return cut_out(pruned, widths, samples)


def test_what_was_cut_out_gives_the_outputs_of_what_was_masked(network: Network, samples: Samples) -> None:
    pruned, widths = masked_network(network)
    masked = write_weights(network.model, {name: values.numpy() for name, values in pruned.weights.items()})
    narrow = cut_out(pruned, widths, samples)
    assert sizes(narrow.base.proto)["b.weight"] == (12, 8, 3, 3)
    np.testing.assert_allclose(outputs(narrow.base.proto, samples), outputs(masked, samples), rtol=1e-4, atol=1e-5)


def test_units_that_still_count_cannot_be_cut_out(network: Network, samples: Samples) -> None:
    pruned, widths = masked_network(network)
    others = {name: tuple(sorted(set(range(2 * len(units))) - set(units))) for name, units in widths.items()}
    with pytest.raises(ModelError, match="cutting units out changed output 'output'"):
        cut_out(pruned, others, samples)


def test_deploy_writes_the_narrow_graph(network: Network, narrow: PrunedNetwork, tmp_path: Path) -> None:
    deploy(network.prepared, narrow, tmp_path / "model.onnx")
    written = load_model(tmp_path / "model.onnx")
    assert [(node.name, node.op_type) for node in written.graph.node] == [
        (node.name, node.op_type) for node in network.model.graph.node
    ]
    assert sizes(written) == {
        **sizes(network.model), "a.weight": (8, 3, 3, 3), "a.bias": (8,), "b.weight": (12, 8, 3, 3), "b.bias": (12,),
        "c.weight": (16, 12), "c.bias": (16,), "d.weight": (16, 10),
    }  # fmt: skip


def test_deploy_refuses_other_widths_and_other_changes(network: Network, narrow: PrunedNetwork, tmp_path: Path) -> None:
    wider = {name: (*units, 1 + max(units)) for name, units in narrow.widths.items() if max(units) < 2 * len(units) - 1}
    with pytest.raises(DeployError, match="by its groups' widths"):
        deploy(network.prepared, replace(narrow, widths={**narrow.widths, **wider}), tmp_path / "model.onnx")
    first = {"conv_a": narrow.widths["conv_a"]}
    pruned, _ = masked_network(network)
    only = {"b.weight": pruned.weights["b.weight"]}
    (layer,) = (layer for layer in network.layers if layer.weight == "b.weight")
    one = cut_out(replace(pruned, weights=only, layers=(layer,)), first)
    with pytest.raises(DeployError, match=r"'d\.weight' changed, but belongs to no group"):
        deploy(network.prepared, replace(one, weights={"d.weight": torch.zeros(32, 10)}), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_shrinking_touches(network: Network, narrow: PrunedNetwork) -> None:
    first = {"conv_a": narrow.widths["conv_a"]}
    assert [layer.name for layer in touched(network.prepared, first)] == ["conv_a", "conv_b"]
    kept = kept_outputs(network.prepared, first)
    assert {name: some.tolist() for name, some in kept.items()} == {"a.weight": list(narrow.widths["conv_a"])}


def test_repair_trains_the_narrow_network(network: Network, narrow: PrunedNetwork, samples: Samples) -> None:
    before = network.run(samples)["output"]
    repaired, training = repair(network, narrow, samples, epochs=8)
    assert training and training.loss_after < 0.7 * training.loss_before
    names = {"a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias", "d.weight", "d.bias"}
    assert set(repaired.weights) == names
    for name, values in repaired.weights.items():
        assert tuple(values.shape) == sizes(narrow.base.proto)[name]
    assert torch.equal(network.run(samples)["output"], before)


def test_repair_of_a_narrow_network_is_deployed(
    network: Network, narrow: PrunedNetwork, samples: Samples, tmp_path: Path
) -> None:
    measured = deploy(network.prepared, narrow, tmp_path / "model.onnx")
    repaired, _ = repair(network, narrow, samples, epochs=1)
    written = deploy(network.prepared, repaired, tmp_path / "model.onnx", measured)
    assert sizes(written) == sizes(measured)
    assert not np.allclose(outputs(written, samples), outputs(measured, samples), rtol=1e-3)


def test_finetune_trains_a_narrow_network(
    network: Network, narrow: PrunedNetwork, samples: Samples, tmp_path: Path
) -> None:
    measured = deploy(network.prepared, narrow, tmp_path / "model.onnx")
    found = finetune(network.prepared, measured, samples, epochs=4)
    assert found.training.loss_after < found.training.loss_before
    assert sizes(found.model) == sizes(measured)
    assert is_narrower(found.model, network.model)


@pytest.mark.parametrize("level", [HALF, Level("channels", 0.9)])
def test_layers_that_are_too_small_for_zeros_lose_units(
    model: onnx.ModelProto, samples: Samples, tmp_path: Path, level: Level
) -> None:
    """Of 24 x 10 weights before, and at the higher level all of the narrow network's."""
    small = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in small.graph.initializer:
        if tensor.name in ("c.weight", "c.bias", "d.weight"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:24], tensor.name))
    network = Network(Prepared(small))
    assert [layer.name for layer in network.layers] == ["conv_a", "conv_b", "gemm_c"]
    compression = Compression(levels_for("channels"), pruner_named("obs"))
    database = build_database(network, samples, compression, tmp_path / "database")
    pruned = CorrectedStitcher(Stitcher(network, database), samples).stitch_levels(database.all_at(level))
    assert sizes(pruned.in_float())["d.weight"][0] < 24
    repaired, training = repair(network, pruned, samples, epochs=2, batch=16)
    assert training is not None
    deploy(network.prepared, repaired, tmp_path / "repaired.onnx")
    tuned = finetune(network.prepared, load_model(tmp_path / "repaired.onnx"), samples, epochs=2, batch=16)
    assert sizes(tuned.model) == sizes(repaired.in_float())


def test_finetune_refuses_a_profile_of_widths(network: Network, narrow: PrunedNetwork, samples: Samples) -> None:
    with pytest.raises(FinetuneError, match="a profile of widths can't be reached gradually"):
        finetune(network.prepared, network.model, samples, levels=narrow.levels, epochs=1)


def test_what_counts_as_narrower(network: Network, narrow: PrunedNetwork) -> None:
    other = Prepared(onnx.ModelProto.FromString(narrow.base.proto.SerializeToString())).proto
    other.graph.node[1].op_type = "Sigmoid"
    assert is_narrower(narrow.base.proto, network.model)
    assert not is_narrower(network.model, network.model)
    assert not is_narrower(network.model, narrow.base.proto)
    assert not is_narrower(other, network.model)
