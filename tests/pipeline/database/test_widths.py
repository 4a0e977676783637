"""The database of widths: what comes back is what the pruner gave, for each group of a network."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import Prepared, export_module, masked, prepare, to_canonical
from onnx_spdy.models.groups import FFN, HEADS
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database import layer_database
from onnx_spdy.pipeline.database.compression import Compression, NoUnitPruner
from onnx_spdy.pipeline.database.hessian import CalibrationPass, collect_hessians, hessian_bytes, squared_error
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, build_database, open_database, work_bytes
from onnx_spdy.pipeline.database.pruners import (
    PRUNERS,
    UNIT_PRUNERS,
    NamedPruner,
    PrunerFailed,
    UnitPruner,
    pruner_named,
)
from onnx_spdy.pipeline.database.pruners.magnitude import magnitude
from onnx_spdy.pipeline.database.pruners.obs_units import obs_units
from onnx_spdy.pipeline.database.pruners.quadratic import damped
from onnx_spdy.pipeline.level import DENSE, levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.site import Site, find_sites
from tests.encoder import encoder, sentences

LEVELS = levels_for("channels")


def compression(prune_units: UnitPruner = obs_units, name: str = "obs") -> Compression:
    return Compression(LEVELS, NamedPruner(name, magnitude, prune_units))


def branches() -> Prepared:
    """Two convolutions whose outputs one layer takes in together, and another takes in those of the first."""
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 3, 3, 3), "b": (8, 3, 1, 1), "c": (6, 24, 3, 3), "d": (5, 16, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["va"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["va"], ["ra"], "relu_first"),
        helper.make_node("Conv", ["x", "b"], ["vb"], "second"),
        helper.make_node("Sigmoid", ["vb"], ["rb"], "sigmoid_second"),
        helper.make_node("Concat", ["rb", "ra"], ["both"], "concat", axis=1),
        helper.make_node("Conv", ["both", "c"], ["y"], "together"),
        helper.make_node("Conv", ["ra", "d"], ["z"], "alone"),
    ]
    image = ["n", 3, 10, 10]
    graph = helper.make_graph(
        nodes, "branches", [helper.make_tensor_value_info("x", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"],
        [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name) for name, shape in shapes.items()],
    )  # fmt: skip
    return Prepared(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


def images() -> Samples:
    return Samples({"x": np.random.default_rng(1).normal(size=(64, 3, 10, 10)).astype(np.float32).cumsum(axis=3)})


def sites_of(network: Network) -> tuple[Site, ...]:
    return find_sites(network.prepared, LEVELS)


def removed_columns(site: Site, layer_name: str, kept: tuple[int, ...]) -> list[int]:
    """Input channels of a consumer on which units that are gone lie."""
    layer = next(layer for layer in site.layers if layer.name == layer_name)
    return [index for unit, one in enumerate(site.inputs(layer)) if unit not in kept for index in one]


def check(network: Network, samples: Samples, database: LayerDatabase) -> None:
    """Weights are the least-squares solution for their units, errors what they say, and zeros where units are gone."""
    sites = sites_of(network)
    layers = {layer.name: layer for site in sites for layer in site.layers}
    hessians = collect_hessians(network, [*layers.values()], samples)
    errors = database.errors([site.name for site in sites])
    for row, site in enumerate(sites):
        for column, level in enumerate(LEVELS):
            kept, weights = database.kept(site, level), database.weights(network, site, level)
            assert kept == tuple(sorted(set(kept))) and len(kept) == site.kept(level)
            if len(kept) == site.group.units:
                assert not weights and errors[row, column] == 0
                continue
            assert [*weights] == [layer.weight for layer in site.layers]
            expected = 0.0
            for layer in site.layers:
                stored = network.dense(layer.weight)
                assert weights[layer.weight].shape == stored.shape and weights[layer.weight].dtype == stored.dtype
                dense = to_canonical(layer, stored).flatten(1).double()
                found = to_canonical(layer, weights[layer.weight]).flatten(1).double()
                gone = torch.zeros(layer.shape[1:], dtype=torch.bool)
                gone[removed_columns(site, layer.name, kept)] = True
                stay = ~gone.flatten()
                hessian = damped(hessians[layer.name])
                exact = torch.zeros_like(dense)
                exact[:, stay] = torch.linalg.solve(hessian[stay][:, stay], (dense @ hessian)[:, stay].T).T
                torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
                power = squared_error(dense, hessians[layer.name])
                expected += squared_error(found - dense, hessians[layer.name]) / power
            assert errors[row, column] == pytest.approx(expected, rel=1e-3)
    assert (np.diff(errors) >= 0).all() and (errors[:, -1] > errors[:, 1]).all()


def test_what_comes_back_is_least_squares_on_the_units_that_stay(
    network: Network, samples: Samples, tmp_path: Path
) -> None:
    database = build_database(network, samples, compression(), tmp_path)
    database.verify()
    assert [*database.layers] == [site.name for site in sites_of(network)] == ["conv_a", "conv_b", "gemm_c"]
    check(network, samples, database)
    check(network, samples, open_database(tmp_path))


def test_consumers_that_take_several_groups_in_lose_only_what_is_their_groups(tmp_path: Path) -> None:
    network = Network(branches())
    sites = sites_of(network)
    assert [(site.name, [layer.name for layer in site.layers]) for site in sites] == [
        ("first", ["together", "alone"]), ("second", ["together"]),
    ]  # fmt: skip
    check(network, images(), build_database(network, images(), compression(), tmp_path))


def test_heads_and_feed_forward_units_of_a_language_model(tmp_path: Path) -> None:
    network, samples = Network(prepare(export_module(*encoder()))), Samples(sentences())
    assert [(site.group.kind, site.group.units) for site in sites_of(network)] == [(HEADS, 4), (FFN, 64)] * 2
    check(network, samples, build_database(network, samples, compression(), tmp_path))


def test_a_network_with_these_weights_is_the_masked_one_with_adapted_weights(tmp_path: Path) -> None:
    """By magnitude nothing is adapted, so it is the masked network itself."""
    network, samples = Network(branches()), images()
    database = build_database(network, samples, compression(UNIT_PRUNERS["magnitude"], "magnitude"), tmp_path)
    for site in sites_of(network):
        for level in LEVELS[::13]:
            mask = masked(network.prepared, {site.name: database.kept(site, level)})
            expected = Network(Prepared(mask)).run(samples)
            found = network.run(samples, database.weights(network, site, level))
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values)


def test_levels_that_leave_equally_many_units_are_stored_once(
    network: Network, samples: Samples, tmp_path: Path
) -> None:
    widths = []

    def spy(consumers, counts):
        widths.append([*counts])
        yield from obs_units(consumers, counts)

    build_database(network, samples, compression(spy), tmp_path)
    assert widths == [[12, 8, 4], [20, 16, 12, 8, 4], [24, 16, 8]]
    dense_bytes = 4 * sum(layer.shape[0] * np.prod(layer.shape[1:]) for s in sites_of(network) for layer in s.layers)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 2.5 * dense_bytes + 3 * 2000  # 24 units: 60 of 24 columns at five widths; and headers


def test_work_that_was_stopped_continues_with_the_next_group(
    network: Network, samples: Samples, tmp_path: Path
) -> None:
    calls = []

    def stops_at_third(consumers, widths):
        calls.append(len(consumers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        yield from obs_units(consumers, widths)

    with pytest.raises(KeyboardInterrupt):
        build_database(network, samples, compression(stops_at_third), tmp_path)
    assert [*open_database(tmp_path).layers] == ["conv_a", "conv_b"]
    calls.clear()
    continued = build_database(network, samples, compression(), tmp_path)
    whole = build_database(network, samples, compression(), tmp_path / "whole")
    assert continued.layers == whole.layers


def test_little_memory_takes_several_passes_and_collects_what_groups_share_once_in_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, samples = Network(branches()), images()
    whole = build_database(network, samples, compression(), tmp_path / "whole")
    collected = []

    class Spy(CalibrationPass):
        def hessians(self, layers, *rest, **more):
            collected.append([layer.name for layer in layers])
            return super().hessians(layers, *rest, **more)

    monkeypatch.setattr(layer_database, "CalibrationPass", Spy)
    monkeypatch.setattr(layer_database, "peak_bytes", lambda: 0)
    first, second = sites_of(network)
    work = max(work_bytes(site, len(LEVELS)) for site in (first, second))
    room = sum(map(hessian_bytes, first.layers))  # what the second needs is there already
    for memory, passes in ((room, [["together", "alone"]]), (room - 1, None)):
        little = replace(compression(), memory_bytes=work + memory)
        if passes is None:
            with pytest.raises(layer_database.MemoryTooSmall, match="group 'first' needs"):
                build_database(network, samples, little, tmp_path / "none")
            continue
        assert build_database(network, samples, little, tmp_path / "parts").layers == whole.layers
        assert collected == passes


def test_each_group_of_a_chain_may_take_a_pass_of_its_own(
    network: Network, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_database(network, samples, compression(), tmp_path / "whole")
    monkeypatch.setattr(layer_database, "peak_bytes", lambda: 0)
    sites, seen = sites_of(network), []
    memory = max(work_bytes(site, len(LEVELS)) for site in sites)
    memory += max(hessian_bytes(layer) for site in sites for layer in site.layers)
    parts = build_database(
        network, samples, replace(compression(), memory_bytes=memory), tmp_path / "parts",
        lambda done, total, what: seen.append((total, what)),
    )  # fmt: skip
    assert (96, "hessians, pass 2 of 2") in seen and seen[-1] == (3, "groups")
    assert parts.layers == whole.layers


@pytest.mark.parametrize("name", [name for name in PRUNERS if name not in UNIT_PRUNERS])
def test_pruners_of_single_weights_refuse_widths_before_anything_is_done(name: str) -> None:
    with pytest.raises(NoUnitPruner, match=f"pruner '{name}' .* can't choose widths; take magnitude or obs"):
        Compression(LEVELS, pruner_named(name))
    assert Compression(LEVELS, pruner_named("obs")).pruner.prune_units is obs_units


def test_a_database_of_layers_is_not_continued_with_widths(network: Network, samples: Samples, tmp_path: Path) -> None:
    build_database(network, samples, Compression(levels_for("2:4"), pruner_named("magnitude")), tmp_path)
    with pytest.raises(ArtifactError, match="levels"):
        build_database(network, samples, Compression(LEVELS, pruner_named("magnitude")), tmp_path)


def test_damage_is_noticed(network: Network, samples: Samples, tmp_path: Path) -> None:
    build_database(network, samples, compression(), tmp_path)
    victim = tmp_path / "0001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    database, site = open_database(tmp_path), sites_of(network)[1]
    assert len(database.kept(site, DENSE)) == 24
    for read in (database.kept, lambda site, level: database.weights(network, site, level)):
        with pytest.raises(ArtifactError, match=r"0001\.safetensors is missing or damaged"):
            read(site, LEVELS[20])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda units, weight: (units.flip(0), weight), "not 12 in ascending order"),
        (lambda units, weight: (units[1:], weight), "kept 11 units"),
        (lambda units, weight: (units + 16, weight), "not 12 in ascending order"),
        (lambda units, weight: (units, weight[:, 1:]), "the pruner gave"),
        (lambda units, weight: (units, weight * float("nan")), "NaN"),
        (lambda units, weight: (units, torch.ones_like(weight)), "left weights for units that are gone"),
    ],
)
def test_a_unit_pruner_that_breaks_its_promise_is_an_error(
    network: Network, samples: Samples, tmp_path: Path, wrong, message: str
) -> None:
    def bad(consumers, widths):
        for units, (weight,) in obs_units(consumers, widths):
            units, weight = wrong(units, weight)
            yield units, [weight]

    with pytest.raises(PrunerFailed, match=message):
        build_database(network, samples, compression(bad), tmp_path)


def test_inputs_that_overflow_are_told_with_the_layer(network: Network, samples: Samples, tmp_path: Path) -> None:
    huge = replace(samples, inputs={"input": samples.inputs["input"] * np.float32(1e30)})
    with pytest.raises(ValueError, match="layer 'conv_b' can't be pruned"):
        build_database(network, huge, compression(), tmp_path)
