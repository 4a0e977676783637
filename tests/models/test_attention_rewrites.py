"""Attention of today's exporter in the form that engines know, with the same results."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from onnx_spdy.models import export_module, prepare


class Attention(nn.Module):
    """With `split` keys come from a linear layer over tokens, as in BERT; without it they come as they are."""

    def __init__(self, split: bool) -> None:
        super().__init__()
        self.split = split
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        parts = [part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in self.parts]
        if not self.split:
            parts[1] = parts[1] * parts[1].sigmoid()
        allowed = mask[:, None, None, :].bool() if mask.ndim == 2 else mask
        return scaled_dot_product_attention(*parts, attn_mask=allowed).transpose(1, 2).flatten(2)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def results(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_keys_are_transposed_once_and_no_guard_is_left(split: bool, is_open: bool) -> None:
    example = torch.rand(2, 5, 16), torch.ones(2, 5, dtype=torch.long)
    axes = {"x": {1: "sequence"}, "mask": {1: "sequence"}} if is_open else None
    module = Attention(split).eval()
    model = export_module(module, example, axes)
    assert operators(model)["IsNaN"]
    prepared = prepare(model).proto
    found = operators(prepared)
    assert (found["IsNaN"], found["Transpose"], found["Reshape"]) == (0, 4 + (not split), 4)
    inputs = {"x": np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)}
    inputs["mask"] = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    np.testing.assert_allclose(results(prepared, inputs), results(model, inputs), atol=1e-6)
    assert prepare(prepared).proto.SerializeToString() == prepared.SerializeToString()


def test_a_guard_stays_where_a_row_may_be_ruled_out_by_minus_infinity() -> None:
    scores = torch.zeros(2, 1, 5, 5)
    model = export_module(Attention(True).eval(), (torch.rand(2, 5, 16), scores))
    prepared = prepare(model).proto
    assert operators(prepared)["IsNaN"] == operators(model)["IsNaN"]
    inputs = {"x": np.ones((2, 5, 16), np.float32), "mask": np.full((2, 1, 5, 5), -np.inf, np.float32)}
    assert np.isfinite(results(prepared, inputs)).all() == np.isfinite(results(model, inputs)).all()
