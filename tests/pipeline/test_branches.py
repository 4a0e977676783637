"""Residual branches that go as a whole: chosen, cut out, corrected, trained and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from onnx_spdy.models import Prepared, load_model
from onnx_spdy.pipeline.correct import StatisticsCorrection
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, build_database
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.deploy import deploy
from onnx_spdy.pipeline.level import Level, levels_for
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.stitch import Stitcher
from onnx_spdy.pipeline.training.finetune import finetune
from onnx_spdy.pipeline.training.repair import repair
from onnx_spdy.pipeline.widths import cut_out, is_narrower, trained_and_compared
from onnx_spdy.runtimes import open_runtime
from tests.models.narrowing import two_blocks

LEVELS = levels_for("channels")
NOTHING, HALF, WHOLE = LEVELS[-1], Level("channels", 0.5), LEVELS[0]
SITES = ("stem", "one", "down", "three")


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(Prepared(two_blocks()))


@pytest.fixture(scope="module")
def data() -> Samples:
    rng = np.random.default_rng(1)
    images = rng.normal(size=(96, 3, 16, 16)).astype(np.float32).cumsum(axis=3) / 4
    return Samples({"x": images}, rng.integers(0, 10, 96))


@pytest.fixture(scope="module")
def database(network: Network, data: Samples, tmp_path_factory: pytest.TempPathFactory) -> LayerDatabase:
    folder = tmp_path_factory.mktemp("database")
    return build_database(network, data, Compression(LEVELS, pruner_named("obs")), folder)


def pruned(network: Network, database: LayerDatabase, data: Samples, **levels: Level) -> PrunedNetwork:
    """The network of these levels, whole where none is named, as it is cut out."""
    stitcher = Stitcher(network, database)
    assert tuple(site.name for site in stitcher.sites) == SITES
    chosen = {name: levels.get(name, WHOLE) for name in SITES}
    weights = stitcher.weights([*chosen.values()])
    full = PrunedNetwork(network.prepared, weights, chosen, stitcher.changed(chosen))
    return cut_out(full, stitcher.widths(chosen), data)


def nodes(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node]


def test_the_database_has_what_is_left_of_nothing(network: Network, database: LayerDatabase) -> None:
    errors = database.errors(SITES)
    assert errors[1, -1] == errors[3, -1] == 1.0  # all of the consumer's output
    assert (errors[:, -2] < 1).all()
    stitcher = Stitcher(network, database)
    first, second = (stitcher.sites[number] for number in (1, 3))
    weights = database.weights(network, first, NOTHING)
    assert set(weights) == {"w2", "b2"}  # behind an activation: what it adds is dropped
    assert not any(values.any() for values in weights.values())
    assert set(database.weights(network, second, NOTHING)) == {"w5"}
    assert database.kept(first, NOTHING) == ()
    assert len(database.kept(stitcher.sites[0], NOTHING)) == 4  # no branch


def test_branches_are_cut_out_and_written(
    network: Network, database: LayerDatabase, data: Samples, tmp_path: Path
) -> None:
    found = pruned(network, database, data, stem=HALF, one=NOTHING, three=NOTHING)
    deploy(network.prepared, found, tmp_path / "model.onnx")
    written = load_model(tmp_path / "model.onnx")
    assert nodes(written) == ["stem", "r0", "down", "pool", "flat", "head"]
    assert is_narrower(written, network.model)
    assert not is_narrower(network.model, written)
    trained, compared = trained_and_compared(network.prepared, found)
    assert [layer.name for layer in trained] == ["stem", "down", "head"]
    assert [layer.name for layer in compared] == ["head"]  # what the second branch added is in `down`'s bias


def test_the_correction_gives_a_branch_its_mean_where_something_can_add_it(
    network: Network, database: LayerDatabase, data: Samples
) -> None:
    stitcher = Stitcher(network, database)
    chosen = dict(zip(SITES, (WHOLE, NOTHING, WHOLE, NOTHING), strict=True))
    weights = stitcher.weights([*chosen.values()])
    corrected = StatisticsCorrection(network, data).apply(weights, stitcher.changed(chosen))
    assert not corrected["b2"].any()
    assert not torch.equal(corrected["b5"], network.dense("b5"))
    full = PrunedNetwork(network.prepared, corrected, chosen, stitcher.changed(chosen))
    assert nodes(cut_out(full, stitcher.widths(chosen), data).base.proto)[2:4] == ["down", "pool"]


def test_what_is_left_is_repaired_and_trained(
    network: Network, database: LayerDatabase, data: Samples, tmp_path: Path
) -> None:
    found = pruned(network, database, data, one=NOTHING, three=HALF)
    trained, compared = trained_and_compared(network.prepared, found)
    assert [layer.name for layer in trained] == ["stem", "down", "three", "four", "head"]
    assert [layer.name for layer in compared] == ["down", "three", "four", "head"]
    repaired, training = repair(network, found, data, epochs=6)
    assert training and training.loss_after < training.loss_before
    written = deploy(network.prepared, repaired, tmp_path / "model.onnx")
    trained = finetune(network.prepared, written, data, epochs=4)
    assert trained.training.loss_after < trained.training.loss_before
    assert nodes(trained.model) == nodes(written)


@pytest.mark.parametrize("pattern", ["channels", "channels+int8"])
@pytest.mark.parametrize("finetune", ["none", "full"])
def test_a_target_that_no_width_reaches_is_met_without_branches(
    data: Samples, tmp_path: Path, pattern: str, finetune: str
) -> None:
    """Each node takes time whatever its width, so only fewer nodes make the network fast enough."""
    model, target = two_blocks(), 1.6 if pattern == "channels" else 2.0
    with open_runtime("fake", layer_overhead_seconds=1e-3, node_seconds=1e-9) as runtime:
        report = run(
            Prepared(model), data, runtime, workload_of(data, 8), Target(target, tmp_path),
            compression=Compression(levels_for(pattern), pruner_named("magnitude")),
            search=SearchSettings("thompson", time_limit_seconds=5), finetune=finetune,
        ).content  # fmt: skip
    assert report["measured_speedup_lower"] >= target
    gone = [row for row in report["layers"] if row["kept"] == 0]
    assert gone and all(row["level"].startswith("channels@1.0000") for row in gone)
    written = load_model(tmp_path / "model.onnx")
    assert len([node for node in written.graph.node if node.op_type == "Conv"]) < 6
