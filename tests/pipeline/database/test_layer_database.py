from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Layer, Prepared, export_module, prepare, to_canonical, write_weights
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.correct import StatisticsCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.compression import Compression, SeveralLevels
from onnx_spdy.pipeline.database.hessian import collect_hessians, hessian_bytes, squared_error
from onnx_spdy.pipeline.database.layer_database import (
    LayerDatabase,
    MemoryTooSmall,
    build_database,
    open_database,
    work_bytes,
)
from onnx_spdy.pipeline.database.pruners import NamedPruner, Pruner, PrunerFailed
from onnx_spdy.pipeline.database.pruners.magnitude import magnitude
from onnx_spdy.pipeline.database.pruners.obs import obs
from onnx_spdy.pipeline.level import DENSE, Level, levels_for
from onnx_spdy.pipeline.mask import level_violation
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, Weights
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.search.profile_loss import ProfileLoss
from onnx_spdy.pipeline.site import Site
from onnx_spdy.pipeline.stitch import Stitcher
from onnx_spdy.runtimes.atomic import UNFINISHED
from tests.encoder import encoder, sentences

LEVELS = (DENSE, *levels_for("unstructured")[1::8])


def compression(prune: Pruner, name: str, levels: tuple[Level, ...] = LEVELS) -> Compression:
    return Compression(levels, NamedPruner(name, prune))


def weights_of(database: LayerDatabase, network: Network, layer: Layer, level: Level) -> Weights:
    return database.weights(network, Site(layer.name, (layer,)), level)


def test_what_comes_back_is_what_the_pruner_gave(network: Network, samples: Samples, tmp_path: Path) -> None:
    build_database(network, samples, compression(magnitude, "magnitude"), tmp_path)
    database = open_database(tmp_path)
    database.verify()
    hessians = collect_hessians(network, network.layers, samples)
    errors = database.errors([layer.name for layer in network.layers])
    for row, layer in enumerate(network.layers):
        dense = to_canonical(layer, network.dense(layer.weight)).contiguous()
        power = squared_error(dense.flatten(1).double(), hessians[layer.name])
        assert not weights_of(database, network, layer, DENSE)
        expected = magnitude(dense, hessians[layer.name], LEVELS[1:])
        for column, (level, weight) in enumerate(zip(LEVELS[1:], expected, strict=True), start=1):
            assert torch.equal(to_canonical(layer, weights_of(database, network, layer, level)[layer.weight]), weight)
            change = (weight - dense).flatten(1).double()
            assert errors[row, column] == pytest.approx(squared_error(change, hessians[layer.name]) / power, rel=1e-3)


def test_weights_near_the_end_of_float32_have_the_errors_of_small_ones(samples: Samples, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((48, 16)).astype(np.float32)
    found = []
    for name, factor in (("small", 1), ("large", 2.0**120)):
        nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("Gemm", ["flat", "w"], ["y"])]
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes, name, [value("input", TensorProto.FLOAT, ["n", 48])], [value("y", TensorProto.FLOAT, ["n", 16])],
            [numpy_helper.from_array(weight * np.float32(factor), "w")],
        )  # fmt: skip
        network = Network(Prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])))
        some = Samples({"input": np.random.default_rng(1).standard_normal((64, 48)).astype(np.float32)})
        database = build_database(network, some, compression(magnitude, "magnitude"), tmp_path / name)
        found.append(database.errors([layer.name for layer in network.layers]))
    assert (found[0][:, 1:] > 0).all()
    np.testing.assert_array_equal(*found)


def test_sparse_levels_take_the_room_of_what_they_hold(network: Network, samples: Samples, tmp_path: Path) -> None:
    levels = levels_for("unstructured")
    build_database(network, samples, compression(magnitude, "magnitude", levels), tmp_path)
    dense_bytes = 4 * sum(network.dense(layer.weight).numel() for layer in network.layers)
    headers = 200 * len(levels) * len(network.layers)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 8 * dense_bytes + headers


ONE_LEVEL = (DENSE, Level("unstructured", 0.5))


def sequential(prune: Pruner, name: str = "obs") -> Compression:
    return Compression(ONE_LEVEL, NamedPruner(name, prune), sequential=True)


@pytest.mark.parametrize("made", [compression, sequential])
def test_work_that_was_stopped_continues_with_the_next_layer(
    network: Network, samples: Samples, tmp_path: Path, made: Callable[[Pruner, str], Compression]
) -> None:
    calls = []

    def stops_at_third(weight, hessian, levels):
        calls.append(weight.shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from obs(weight, hessian, levels)

    def counts(weight, hessian, levels):
        calls.append(weight.shape)
        yield from obs(weight, hessian, levels)

    with pytest.raises(KeyboardInterrupt):
        build_database(network, samples, made(stops_at_third, "obs"), tmp_path)
    assert len(open_database(tmp_path).layers) == 2
    calls.clear()
    continued = build_database(network, samples, made(counts, "obs"), tmp_path)
    assert len(calls) == len(network.layers) - 2
    whole = build_database(network, samples, made(obs, "obs"), tmp_path / "whole")
    for layer in network.layers:
        assert continued.layers[layer.name]["sha256"] == whole.layers[layer.name]["sha256"]
    assert not [*tmp_path.rglob(f"*{UNFINISHED}")]


def test_a_database_of_something_else_is_refused(network: Network, samples: Samples, tmp_path: Path) -> None:
    build_database(network, samples, compression(magnitude, "magnitude"), tmp_path)
    with pytest.raises(ArtifactError, match="its pruner is magnitude, this run's is obs"):
        build_database(network, samples, compression(obs, "obs"), tmp_path)
    with pytest.raises(ArtifactError, match="data_sha256"):
        build_database(network, samples.take(slice(0, 9)), compression(magnitude, "magnitude"), tmp_path)
    with pytest.raises(ArtifactError, match="levels"):
        build_database(network, samples, compression(magnitude, "magnitude", LEVELS[:-1]), tmp_path)
    build_database(network, samples, sequential(obs), tmp_path / "sequential")
    with pytest.raises(ArtifactError, match=r"its pruner is obs, sequential, this run's is obs"):
        build_database(network, samples, compression(obs, "obs", ONE_LEVEL), tmp_path / "sequential")


def test_damage_is_noticed(network: Network, samples: Samples, tmp_path: Path) -> None:
    build_database(network, samples, compression(magnitude, "magnitude"), tmp_path)
    victim = tmp_path / "0001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"0001\.safetensors is missing or damaged"):
        build_database(network, samples, compression(magnitude, "magnitude"), tmp_path)
    victim.unlink()
    with pytest.raises(ArtifactError, match="is missing or damaged"):
        weights_of(open_database(tmp_path), network, network.layers[1], LEVELS[1])


def test_a_pruner_that_breaks_its_promise_is_an_error(network: Network, samples: Samples, tmp_path: Path) -> None:
    def does_nothing(weight, hessian, levels):
        for _ in levels:
            yield weight.clone()

    with pytest.raises(PrunerFailed, match="it promises 173"):
        build_database(network, samples, compression(does_nothing, "nothing"), tmp_path)


def test_stitching_loads_only_what_changes_and_repeats_cost_nothing(
    network: Network, samples: Samples, tmp_path: Path
) -> None:
    database = build_database(network, samples, compression(obs, "obs"), tmp_path)
    loaded = []

    class Spy:
        levels = database.levels

        def weights(self, network, site, level):
            loaded.append((site.name, str(level)))
            return database.weights(network, site, level)

    objective = Objective(network, samples)
    score = ProfileLoss(Stitcher(network, Spy()), objective)  # type: ignore[arg-type]
    count = len(network.layers)
    assert score(np.zeros(count, int)) == pytest.approx(0, abs=1e-6)
    assert not loaded
    low = score(np.array([1, *[0] * (count - 1)]))
    assert loaded == [(network.layers[0].name, str(LEVELS[1]))]
    high = score(np.array([5, *[0] * (count - 1)]))
    assert 0 < low < high
    assert score.evaluations == 3
    assert score(np.array([1, *[0] * (count - 1)])) == low
    assert score.evaluations == 3
    assert len(loaded) == 2


def test_what_others_run_changes_nothing_of_a_pruned_network(
    network: Network, samples: Samples, tmp_path: Path
) -> None:
    """A pruned network is a value: no dense pass, no other profile, no training in between can turn it dense again."""
    database = build_database(network, samples, compression(magnitude, "magnitude"), tmp_path)
    weights = Stitcher(network, database).weights([LEVELS[3]] * len(network.layers))
    objective = Objective(network, samples)
    alone = objective(weights)
    StatisticsCorrection(network, samples)
    collect_hessians(network, network.layers, samples)
    with network.trainable([network.layers[0].weight], weights) as parameters, torch.no_grad():
        parameters[network.layers[0].weight].zero_()
    assert objective(weights) == alone
    assert objective(DENSE_WEIGHTS) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "block4"])
def test_a_pruner_that_misses_its_pattern_is_an_error(
    network: Network, samples: Samples, tmp_path: Path, pattern: str
) -> None:
    def anywhere(weight, hessian, levels):  # as many zeros as are asked for, but not where
        yield from magnitude(weight, hessian, [Level("unstructured", level.sparsity) for level in levels])

    with pytest.raises(PrunerFailed, match="non-zeros in a group of 4" if pattern == "2:4" else "blocks are zero"):
        build_database(network, samples, compression(anywhere, "anywhere", (DENSE, levels_for(pattern)[-1])), tmp_path)


def test_levels_of_several_patterns_live_in_one_database(network: Network, samples: Samples, tmp_path: Path) -> None:
    levels = (DENSE, *levels_for("unstructured,2:4,block4")[1::10], Level.parse("2:4"))
    database = build_database(network, samples, compression(obs, "obs", levels), tmp_path)
    for layer in network.layers:
        for level in database.levels[1:]:
            weight = to_canonical(layer, weights_of(database, network, layer, level)[layer.weight])
            assert level_violation(weight.numpy(), level) is None


def test_one_after_another_each_layer_is_pruned_for_the_inputs_that_pruned_ones_give(
    network: Network, samples: Samples, tmp_path: Path
) -> None:
    given = []

    def seen(weight, hessian, levels):
        given.append(hessian.clone())
        yield from obs(weight, hessian, levels)

    database = build_database(network, samples, sequential(seen), tmp_path)
    before: dict[str, np.ndarray] = {}
    for layer, hessian in zip(network.layers, given, strict=True):
        pruned = Network(Prepared(write_weights(network.model, before)))
        expected = collect_hessians(pruned, [layer], samples)[layer.name]
        torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
        weights = database.weights(network, Site(layer.name, (layer,)), ONE_LEVEL[1])
        before |= {name: values.numpy() for name, values in weights.items()}
    dense = collect_hessians(network, network.layers[-1:], samples)[network.layers[-1].name]
    assert not torch.allclose(given[-1], dense, rtol=1e-3)


def test_layers_that_read_the_same_are_pruned_for_the_same_inputs(tmp_path: Path) -> None:
    module, example = encoder()
    network = Network(prepare(export_module(module, example)))
    given = {}

    def seen(weight, hessian, levels):
        given[len(given)] = hessian.clone()
        yield from magnitude(weight, hessian, levels)

    build_database(network, Samples(sentences(8)), sequential(seen, "seen"), tmp_path)
    names = [network.model.graph.node[network.graph.step_of(layer.name)].input[0] for layer in network.layers]
    pairs = [(one, other) for one in given for other in given if one < other and names[one] == names[other]]
    assert pairs
    assert all(torch.equal(given[one], given[other]) for one, other in pairs)


@pytest.mark.parametrize("levels", [LEVELS, (DENSE, Level("int8", 0.0))])
def test_one_after_another_takes_one_level_of_zeros(levels: tuple[Level, ...]) -> None:
    with pytest.raises(SeveralLevels, match="needs one level of zeros"):
        Compression(levels, sequential=True)


def test_little_memory_takes_several_passes_and_gives_the_same(
    network: Network, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_database(network, samples, compression(obs, "obs"), tmp_path / "whole")
    monkeypatch.setattr("onnx_spdy.pipeline.database.layer_database.peak_bytes", lambda: 0)
    widest = max(hessian_bytes(layer) for layer in network.layers)
    work = max(work_bytes(Site(layer.name, (layer,)), len(LEVELS)) for layer in network.layers)
    seen = []
    parts = build_database(
        network, samples, replace(compression(obs, "obs"), memory_bytes=widest + work), tmp_path / "parts",
        lambda done, total, what: seen.append(what),
    )  # fmt: skip
    assert "hessians, pass 3 of 3" in seen
    assert parts.layers == whole.layers
    with pytest.raises(MemoryTooSmall, match=r"--memory gives 0\.0; give more"):
        build_database(network, samples, replace(compression(obs, "obs"), memory_bytes=1000), tmp_path / "none")
