"""Architectures of all kinds from export to pruned file and back into the module.

A few by default; all with CORPUS=all, those of the `transformers` library with CORPUS=transformers (it has to be
installed), some with CORPUS=Gpt,Vgg,HfBert.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from onnx_spdy.models import (
    TorchGraph,
    differences,
    export_module,
    find_layers,
    fixed_batch,
    load_model,
    prepare,
    write_module,
)
from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.run import Target, run
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.runtimes import open_runtime
from tests.models import corpus_transformers
from tests.models.corpus import NETWORKS

ASKED = os.environ.get("CORPUS", "")
GROUPS = {"all": list(NETWORKS), "transformers": list(corpus_transformers.NETWORKS)}
CHOSEN = GROUPS.get(ASKED) or [name for name in ASKED.split(",") if name]
# A few kinds of graphs: convolutions and norms, attention and masks, several outputs, a model of the `transformers`
# library, recurrence, rank 5.
NEWER = CHOSEN or ["EfficientNet", "Bert", "RetinaNet", "HfBert"]
OLDER = CHOSEN or ["FeaturePyramidDetector", "SpeechLstm", "Video"]
NOT_OLDER = {
    "Llama": "PyTorch's older exporter has no RMSNorm",
    "Detr": "the `fake` runtime can't infer a shape behind this exporter's attention",
}
# ONNX Runtime 1.32 itself crashes when it optimises an LSTM in float16.
HALF = {"ConvNeXt", "EfficientNet", "ResNet", "UNet", "VisionTransformer"}
NOT_WRITTEN_BACK = {
    "Gpt": "its head is the embedding",
    "Whisper": "its head is the embedding",
    "SpeechGru": "its weights are unrolled",
    "Siamese": "each branch has its own copy of the weights, with the BatchNormalization folded into it",
    **dict.fromkeys(
        ("Detr", "T5"),
        "the graph holds slices of the cross attention's one matrix; `write_module` knows whole parameters",
    ),
}
TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2  # of the largest absolute output


def made(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if name in corpus_transformers.NETWORKS:
        pytest.importorskip("transformers")
        module, inputs = corpus_transformers.NETWORKS[name]()
    else:
        module, inputs = NETWORKS[name]()
    for part in module.modules():  # as after training: no statistic at its start value
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
    return module.eval(), inputs


def outputs_of(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def assert_close(actual, expected) -> None:
    actual = [actual] if isinstance(actual, torch.Tensor) else list(actual)
    for a, b in zip(actual, expected, strict=True):
        tolerance = HALF_TOLERANCE if b.dtype == np.float16 else TOLERANCE
        assert np.abs(np.asarray(a.detach()) - b).max() <= tolerance * max(np.abs(b).max(), 1e-6)


def older_export(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> onnx.ModelProto:
    file = io.BytesIO()
    with warnings.catch_warnings():  # it announces its own deprecation, and traces Python numbers
        warnings.simplefilter("ignore")
        axes = {name: {0: "batch"} for name in inputs}
        values = tuple(inputs.values())
        torch.onnx.export(
            module, values, file, dynamo=False, opset_version=17, input_names=list(inputs), dynamic_axes=axes
        )
    return onnx.load_from_string(file.getvalue())


def goes_all_the_way(module: torch.nn.Module, inputs: dict[str, torch.Tensor], model: onnx.ModelProto, out: Path):
    """Prepared, run in PyTorch, pruned for the `fake` runtime, written; returns the dense and the pruned graph."""
    names = [value.name for value in model.graph.input]
    arrays = dict(zip(names, (value.numpy() for value in inputs.values()), strict=True))
    expected = outputs_of(model, arrays)
    with torch.no_grad():
        assert_close(module(*inputs.values()), expected)
        prepared = prepare(model).proto
        assert fixed_batch(prepared) == fixed_batch(model)
        for graph in (model, prepared):
            given = {name: torch.from_numpy(array) for name, array in arrays.items()}
            assert_close(TorchGraph(graph)(given).values(), expected)
    samples = Samples({name: np.concatenate([array] * 4) for name, array in arrays.items()})
    options = {"layer_overhead_seconds": 0.0, "node_seconds": 1e-9}
    with open_runtime("fake", **options) as runtime:
        run(
            prepare(model), samples, runtime, workload_of(samples, len(next(iter(arrays.values())))),
            Target(1.2, out), search=SearchSettings(time_limit_seconds=2),
        )  # fmt: skip
    dense, pruned = load_model(out / "dense.onnx"), load_model(out / "model.onnx")
    assert differences(dense, pruned) == []
    assert_close(TorchGraph(pruned)(given).values(), outputs_of(pruned, arrays))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in pruned.graph.initializer}
    assert any((stored[layer.weight] == 0).any() for layer in find_layers(pruned) if layer.prunable)
    return dense, pruned, outputs_of(pruned, arrays)


@pytest.mark.parametrize("name", NEWER)
def test_from_pytorch_to_the_pruned_file_and_back_into_the_module(name, tmp_path):
    module, inputs = made(name)
    model = export_module(module, inputs if len(inputs) > 1 else tuple(inputs.values()))
    dense, pruned, expected = goes_all_the_way(module, inputs, model, tmp_path)
    if name in NOT_WRITTEN_BACK:
        pytest.skip(f"pruned, but not written back: {NOT_WRITTEN_BACK[name]}")
    changed = write_module(module, dense, pruned)
    assert changed
    with torch.no_grad():
        assert_close(module(*inputs.values()), expected)


@pytest.mark.parametrize("name", OLDER)
def test_files_of_the_older_exporter_are_pruned_as_well(name, tmp_path):
    if name in NOT_OLDER:
        pytest.skip(NOT_OLDER[name])
    module, inputs = made(name)
    goes_all_the_way(module, inputs, older_export(module, inputs), tmp_path)


@pytest.mark.parametrize("name", CHOSEN or ["UNet"])
def test_half_precision(name, tmp_path):
    if name not in HALF:
        pytest.skip("not one of the networks that are tried in half precision")
    module, inputs = made(name)
    module, inputs = module.half(), {key: x.half() for key, x in inputs.items()}
    model = export_module(module, inputs if len(inputs) > 1 else tuple(inputs.values()))
    goes_all_the_way(module, inputs, model, tmp_path)


def test_the_corpus_is_as_large_as_promised():
    assert len(NETWORKS) >= 30
