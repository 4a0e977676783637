"""The whole path with the sparse engine, and on real networks where they are at hand."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from onnx_spdy.models import Prepared, TorchGraph, export_module, load_model, prepare
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.pruners import pruner_named
from onnx_spdy.pipeline.deploy import check_deployed
from onnx_spdy.pipeline.metric import Evaluation, top1
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.runtimes import Runtime, RuntimeFailure, Workload, open_runtime
from onnx_spdy.tools.specs import load_network, load_samples

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the development networks are not at hand")


@pytest.fixture(scope="module")
def deepsparse():
    with open_runtime("deepsparse") as runtime:
        try:
            runtime.check()
        except RuntimeFailure as exc:
            pytest.skip(str(exc))
        yield runtime


def check_written(out: Path, runtime: Runtime, batch: int, inputs: dict[str, np.ndarray]) -> None:
    """The written file is the dense graph with the profile's zeros, and every engine computes the same with it."""
    dense, pruned = load_model(out / "dense.onnx"), load_model(out / "model.onnx")
    onnx.checker.check_model(pruned)
    check_deployed(Prepared(dense), pruned, Profile.load(out / "profile.json").levels)
    for name, model in (("dense.onnx", dense), ("model.onnx", pruned)):
        results = []
        with open_runtime("onnxruntime") as oracle:
            for engine in (oracle, runtime):
                with engine.open(out / name, Workload(batch, inputs=inputs)) as session:
                    results.append(session.run(inputs))
        graph = TorchGraph(model).eval()
        with torch.inference_mode():
            results.append(
                {k: v.numpy() for k, v in graph({k: torch.from_numpy(v) for k, v in inputs.items()}).items()}
            )
        for other in results[1:]:
            for key, expected in results[0].items():
                assert np.abs(other[key] - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.engine
def test_the_sparse_engine_runs_what_was_promised(deepsparse: Runtime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in [(3, 64), (64, 96), (96, 96)]:
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)).eval()
    dense = prepare(export_module(module, (torch.zeros(2, 3, 16, 16),)))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 3, 16, 16)).astype(np.float32)
    samples = Samples({"input": images}, rng.integers(0, 10, 64))
    run(
        dense, samples, deepsparse, workload_of(samples, 32), Target(1.2, tmp_path),
        evaluation=Evaluation(samples, top1, "top1"), allow_busy=True,
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    # How fast it is depends on what else the machine does just now; that it is sparse, and measured, does not.
    assert any(layer["kernel"].startswith("ks_") for layer in report["layers"])
    assert report["fallback"] is None
    assert 0 < report["measured_speedup_lower"] <= report["measured_speedup"] <= report["measured_speedup_upper"]
    assert report["environment"]["runtime"] == "deepsparse"
    beside = {(one["role"], one["name"]) for one in report["alternatives"]["measured"]}
    assert beside >= {("pruned", "deepsparse fp32"), ("dense", "deepsparse fp32"), ("dense", "onnxruntime fp32")}
    assert report["alternatives"]["verdict"]
    check_written(tmp_path, deepsparse, 32, {"input": images[:32]})


@needs_shared
@pytest.mark.parametrize(
    ("network", "data"),
    [("resnet20_cifar10.onnx", "cifar_calibration"), ("dscnn_kws.onnx", "kws_dev")],
)
def test_real_networks_go_the_whole_way(network: str, data: str, tmp_path: Path) -> None:
    dense = load_network(str(SHARED / network))
    samples = load_samples(f"{SHARED / 'providers.py'}:{data}", dense).take(slice(0, 128))
    with open_runtime("fake", layer_overhead_seconds=0.0) as runtime:
        run(
            dense, samples, runtime, workload_of(samples, 16), Target(1.3, tmp_path),
            compression=Compression(pruner=pruner_named("magnitude")), search=SearchSettings("uniform"),
            evaluation=Evaluation(samples, top1, "top1"),
        )  # fmt: skip
        check_written(tmp_path, runtime, 16, samples.take(slice(0, 16)).inputs)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["measured_speedup_lower"] >= 1.3
    assert report["metric_pruned"] > 0.3
