"""A language model through the whole path: from its PyTorch module back into it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from onnx_spdy.models import export_module, load_model, prepare, save_model, write_module
from onnx_spdy.runtimes import RuntimeFailure, Workload, open_runtime
from onnx_spdy.tools.cli import main
from tests.encoder import encoder, sentences

USER = """
import numpy as np
from tests.encoder import encoder, sentences

def network():
    module, example = encoder()
    return module, example, {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}

def data():
    return sentences(96)

def dev():
    return sentences(33, seed=1) | {"target": np.arange(33.0)}

def loss(outputs, dense, target):
    assert set(outputs) == set(dense) == {"output_0", "output_1"}
    return (outputs["output_1"] - dense["output_1"]).square().sum(1).mean()

def nearest(outputs, target):
    states, embedding = outputs["output_0"], outputs["output_1"]
    assert states.shape == (33, 12, 32) and target.shape == (33,)
    return float((embedding @ embedding.T).mean())
"""


def run_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict:
    (folder / "user.py").write_text(USER)
    monkeypatch.chdir(folder)
    options = ("--runtime", "fake", "--batch", "8", "--speedup", "1.02", "--out", "out", "--eval", "user.py:dev")
    with pytest.raises(SystemExit) as caught:
        main(["run", "user.py:network", "--data", "user.py:data", "--metric", "user.py:nearest", *options, *more])
    assert not caught.value.code
    return json.loads((folder / "out" / "report.json").read_text())


def test_run_takes_a_module_with_a_mask_and_the_result_goes_back_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run_in(tmp_path, monkeypatch, "--loss", "user.py:loss", "--finetune", "gap")
    assert report["loss_name"].startswith("loss@")
    assert report["measured_speedup_lower"] >= 1.02
    assert len(report["layers"]) == 12  # all linear layers: no embedding, no product of two activations
    assert 0 < report["metric_dense"] != report["metric_pruned"]

    module, _ = encoder()
    pruned = load_model(tmp_path / "out" / "model.onnx")
    changed = write_module(module, load_model(tmp_path / "out" / "dense.onnx"), pruned)
    assert {name for name in changed if name.endswith("weight")}
    inputs = sentences(4, seed=2)
    session = onnxruntime.InferenceSession(pruned.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(values) for name, values in inputs.items()})
    for found, wanted in zip(session.run(None, inputs), expected, strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


def test_several_outputs_are_compared_by_their_squared_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_in(tmp_path, monkeypatch)["loss_name"] == "squared-error per channel"


@pytest.mark.engine
def test_the_sparse_engine_optimises_norms_and_activations(tmp_path: Path) -> None:
    save_model(prepare(export_module(*encoder(embedding=False))).proto, tmp_path / "dense.onnx")
    inputs = sentences(8)
    with open_runtime("deepsparse") as sparse, open_runtime("onnxruntime") as oracle:
        try:
            sparse.check()
        except RuntimeFailure as exc:
            pytest.skip(str(exc))
        results = []
        for engine in (sparse, oracle):
            with engine.open(tmp_path / "dense.onnx", Workload(8, inputs=inputs)) as session:
                results.append(session.run(inputs)["output"])
                if engine is sparse:
                    refused = session.fallback or ""
        rows = sparse.layer_seconds(tmp_path / "dense.onnx", Workload(8, inputs=inputs), iterations=1, warmup=0)
    assert "LayerNormalization" not in refused and "Erf" not in refused
    np.testing.assert_allclose(*results, atol=1e-4)
    own = {name for node in load_model(tmp_path / "dense.onnx").graph.node for name in node.output}
    assert {name for row in rows for name in row.outputs} <= own  # whatever the engine's copy is made of
