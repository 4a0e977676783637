"""The GPU benchmark, dry: on the CPU its times mean nothing, but everything else is what it will be."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_spdy.models import find_layers, to_canonical
from onnx_spdy.runtimes.nvidia.semi_structured import has_pattern
from onnx_spdy.tools.bench.gpu import CASES, TINY, encoder, semi_structured
from onnx_spdy.tools.results import read_results


def test_a_dry_run_writes_a_small_file_that_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "onnx_spdy.tools.bench", "gpu", "--dry-run", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Networks" in done.stdout
    assert path.stat().st_size < 20_000
    found = read_results(path, "bench_gpu")
    assert found["environment"]["command"].endswith(f"-m onnx_spdy.tools.bench gpu --dry-run --json {path}")
    (content,) = found["cases"]
    assert dict(content["engine"]["options"])["device"] == "stand-in for a GPU"
    assert len(content["layers"]) == 6 * TINY[0].layers
    for layer in content["layers"]:
        assert min(layer[f"{kind}_seconds"] for kind in ("dense", "sparse", "cold_dense", "cold_sparse")) > 0
        assert layer["kernel"] == "stand-in_2:4"  # whether it wins or not
    assert {*content["networks"]} == {"dense", "all 2:4", "selective"}
    assert content["networks"]["dense"]["speedup"] == 1
    assert 0 < content["selective_predicted_seconds"] <= content["networks"]["dense"]["median_seconds"]


def test_the_encoder_is_a_network_whose_layers_become_2_4() -> None:
    model = encoder(TINY[0])
    onnx.checker.check_model(model)
    layers = [layer for layer in find_layers(model) if layer.prunable]
    pruned = semi_structured(model, layers)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}
    for layer in layers:
        assert has_pattern(to_canonical(layer, arrays[layer.weight]))
        assert (arrays[layer.weight] == 0).mean() == pytest.approx(0.5)
    x = np.random.default_rng(0).standard_normal((2, 16, 64)).astype(np.float32)
    outputs = [
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"input": x}
        )[0]
        for one in (model, pruned)
    ]
    assert outputs[0].mean(axis=-1) == pytest.approx(0, abs=1e-5)  # it ends in a normalisation
    assert 0.1 < np.abs(outputs[0] - outputs[1]).mean() < 1.5


def test_no_case_is_there_twice() -> None:
    assert len({str(case) for case in CASES}) == len(CASES)
