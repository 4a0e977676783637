"""A decoder whose weights stay in their file, from database to pruned file: the same bits as in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from onnx_spdy.models import Prepared, load_model, prepare
from onnx_spdy.models import load as load_module
from onnx_spdy.models.stored import is_mapped
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database import hessian as hessian_module
from onnx_spdy.pipeline.database import layer_database
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.hessian import CalibrationPass, collect_hessians
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, build_database
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.deploy import DeployError, deploy
from onnx_spdy.pipeline.level import DENSE, levels_for
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, PrunedNetwork
from onnx_spdy.pipeline.stitch import CorrectedStitcher, Stitcher
from onnx_spdy.tools.bench.decoder import SIZES, random_tokens, write_decoder
from onnx_spdy.tools.bench.memory import PATTERN, every_layer_pruned

SIZE = SIZES["tiny"]
LARGE = 4096
LEVELS = levels_for(PATTERN)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    write_decoder(SIZE, path)
    return path


@pytest.fixture(scope="module")
def samples() -> Samples:
    return Samples({"input_ids": random_tokens(SIZE, 40)})


@pytest.fixture
def whole(path: Path) -> Network:
    return Network(prepare(load_model(path)))


@pytest.fixture
def mapped(path: Path, monkeypatch: pytest.MonkeyPatch) -> Network:
    for module, name in ((load_module, "MAPPED_BYTES"), (sys.modules[prepare.__module__], "UNTOUCHED_BYTES")):
        monkeypatch.setattr(module, name, LARGE)
        monkeypatch.setattr(module, "LARGE_MODEL_BYTES", LARGE)
    network = Network(prepare(load_model(path, mapped=True)))
    assert sum(map(is_mapped, network.model.graph.initializer)) > 10
    return network


def built(network: Network, samples: Samples, folder: Path) -> LayerDatabase:
    return build_database(network, samples, Compression(LEVELS, pruner_named("sparsegpt")), folder)


def test_the_database_is_the_same(whole: Network, mapped: Network, samples: Samples, tmp_path: Path) -> None:
    assert built(mapped, samples, tmp_path / "mapped").layers == built(whole, samples, tmp_path / "whole").layers
    assert mapped._dense == {}


def test_the_pruned_file_holds_the_same(whole: Network, mapped: Network, samples: Samples, tmp_path: Path) -> None:
    database = built(whole, samples, tmp_path / "database")
    profile = every_layer_pruned(database.folder)
    for network, name in ((whole, "whole.onnx"), (mapped, "mapped.onnx")):
        pruned = CorrectedStitcher(Stitcher(network, database), None).stitch(profile)
        written = deploy(network.prepared, pruned, tmp_path / name)
        assert Prepared(written).sha256 == Prepared(load_model(tmp_path / name)).sha256
    assert load_model(tmp_path / "mapped.onnx") == load_model(tmp_path / "whole.onnx")
    assert (tmp_path / "mapped.onnx.data").exists() and not (tmp_path / "whole.onnx.data").exists()


def test_a_file_that_is_not_what_the_profile_says_is_not_written(mapped: Network, tmp_path: Path) -> None:
    layer = mapped.layers[0]
    with pytest.raises(DeployError, match="it promises"):
        deploy(mapped.prepared, PrunedNetwork.with_zeros(mapped, {}, {layer.name: LEVELS[-1]}), tmp_path / "x.onnx")
    head = mapped.layers[-1]
    surplus = PrunedNetwork.with_zeros(mapped, {head.weight: torch.zeros(64, 512)}, {head.name: DENSE})
    with pytest.raises(DeployError, match="profile prunes no layer"):
        deploy(mapped.prepared, surplus, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_let_go_are_the_same_afterwards(mapped: Network, samples: Samples) -> None:
    batch = samples.take(slice(0, 4))
    dense = mapped.run(batch)["logits"]
    first, last = mapped.layers[0].weight, mapped.layers[-1].weight
    pruned = {first: torch.zeros_like(mapped.dense(first)), last: mapped.dense(last) * 2}
    other = mapped.run(batch, pruned)["logits"]
    mapped.let_go()  # what is loaded stays
    assert torch.equal(mapped.forward(batch)["logits"], other) and not torch.equal(other, dense)
    mapped.load(DENSE_WEIGHTS)
    mapped.let_go()
    assert torch.equal(mapped.run(batch)["logits"], dense)


@pytest.mark.parametrize("kept_bytes", [1 << 28, 0])
def test_samples_go_on_where_they_stopped_and_hessians_are_the_same(
    whole: Network, samples: Samples, monkeypatch: pytest.MonkeyPatch, kept_bytes: int
) -> None:
    monkeypatch.setattr(hessian_module, "KEPT_BYTES", kept_bytes)
    expected = collect_hessians(whole, whole.layers, samples)
    ran = []
    hook = whole.graph.node("embed").register_forward_pre_hook(lambda module, inputs: ran.append(len(inputs[1])))
    calibration, found = CalibrationPass(whole, samples), {}
    for start in range(0, len(whole.layers), 4):
        found |= calibration.hessians(whole.layers[start : start + 4], goes_on=True)
    assert ran == [32, 8] * (1 if kept_bytes else 4)
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    again = calibration.hessians(whole.layers[:2])  # those before: from the start
    hook.remove()
    assert ran == [32, 8] * (2 if kept_bytes else 5)
    assert all(torch.equal(again[name], expected[name]) for name in again)


def test_without_a_limit_the_layers_are_taken_some_at_a_time(
    whole: Network, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    expected = built(whole, samples, tmp_path / "whole").layers
    monkeypatch.setattr(layer_database, "HESSIANS_BYTES", 1)
    compression = Compression(LEVELS, pruner_named("sparsegpt"))
    found = build_database(whole, samples, compression, tmp_path / "parts", lambda done, total, what: seen.append(what))
    assert found.layers == expected and any("hessians, pass 2 of" in what for what in seen)


def test_few_files_of_a_database_stay_open(
    whole: Network, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = built(whole, samples, tmp_path)
    monkeypatch.setattr(layer_database, "OPEN_BYTES", 40_000)
    stitcher = Stitcher(whole, database)
    levels = [LEVELS[1]] * len(stitcher.sites)
    eager, lazy = stitcher.weights(levels), stitcher.weights_when_asked(levels)
    assert 1 <= len(database._open) < len(stitcher.sites)
    assert [*lazy] == [*eager] and len(lazy) == len(eager)
    assert all(torch.equal(lazy[name], eager[name]) for name in lazy)
