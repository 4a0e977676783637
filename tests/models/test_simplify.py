"""What the simplifier breaks is left out, and the rest is done."""

from __future__ import annotations

import logging
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from onnx_spdy.models import ModelError, find_layers, prepare, simplify
from onnx_spdy.models.simplify import WHOLE, all_steps, simplified

RNG = np.random.default_rng(0)
WEIGHTS = {
    "k1": RNG.standard_normal((16, 3, 3, 3), np.float32) / 5,
    "k2": RNG.standard_normal((16, 16, 3, 3), np.float32) / 12,
}
node = helper.make_node
TAIL = [node("Relu", ["a"], ["r"], "relu"), node("Conv", ["r", "k2"], ["y"], "conv2", pads=[1] * 4)]


def pad_with_axes() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    more = {"pads": np.array([0, 0, 1, 1]), "zero": np.float32(0), "axes": np.array([2, 3])}
    return [node("Pad", ["x", *more], ["p"], "pad"), node("Conv", ["p", "k1"], ["a"], "conv1", strides=[2, 2])], more


def window_as_long_as_the_channels() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    more = {"window": np.hanning(18)[1:17].astype(np.float32)}
    first = node("Conv", ["x", "k1"], ["c"], "conv1", pads=[1] * 4)
    return [first, node("Mul", ["c", "window"], ["a"], "mul")], more


def weight_that_is_computed() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    more = {"gamma": np.full((16, 1, 1), 1.1, np.float32)}
    size = node("ReduceMean", ["x"], ["s"], "size", axes=[0, 1, 2, 3], keepdims=0)
    weight, conv = node("Mul", ["k1", "s"], ["k"], "weight"), node("Conv", ["x", "k"], ["c"], "conv1", pads=[1] * 4)
    return [size, weight, conv, node("Mul", ["c", "gamma"], ["a"], "mul")], more


CASES = [
    (pad_with_axes, "FusionPadConv", 18),
    (window_as_long_as_the_channels, "FusionConvMul", 17),
    (weight_that_is_computed, "FusionConvMul", 17),
]


@pytest.mark.parametrize(("case", "step", "opset"), CASES)
def test_a_step_that_breaks_the_network_is_left_out_with_a_warning(build, caplog, case, step, opset):
    nodes, more = case()
    nodes = [*nodes, *TAIL, node("Mul", ["one", "one"], ["folded"], "fold"), node("Add", ["y", "folded"], ["z"], "end")]
    arrays = WEIGHTS | more | {"one": np.float32(1)}
    model = build(nodes, {"x": ["batch", 3, 16, 16]}, {"z": ["batch", 16, "h", "w"]}, arrays, opset)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(model).proto
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [f"onnxslim's step {step} was left out"]
    operators = Counter(one.op_type for one in prepared.graph.node)
    assert operators == Counter(one.op_type for one in nodes) - Counter(["Mul"])  # constants are folded all the same
    assert {layer.name for layer in find_layers(prepared) if layer.prunable} >= {"conv2"}
    x = {"x": RNG.standard_normal((3, 3, 16, 16), np.float32)}
    found, expected = (ort.InferenceSession(one.SerializeToString()).run(None, x)[0] for one in (prepared, model))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert prepare(prepared).proto == prepared


@pytest.mark.parametrize("broken", [WHOLE, "subexpression_elimination", "FusionConvAdd"])
def test_what_breaks_a_network_is_found_among_all_steps(caplog, broken):
    tried = []

    def attempt(steps):
        tried.append(list(steps))
        if broken in steps:
            raise ModelError("broken")
        return onnx.ModelProto(producer_name=" ".join(steps))

    with caplog.at_level(logging.WARNING):
        result = simplified(attempt).producer_name.split()
    assert result == ([] if broken == WHOLE else " ".join(step for step in all_steps() if step != broken).split())
    assert len(caplog.records) == 1 and len(tried) < 10


def test_two_steps_that_break_a_network_are_both_left_out(caplog):
    broken = {"FusionConvAdd", "dead_node_elimination"}

    def attempt(steps):
        if broken & set(steps):
            raise ModelError("broken")
        return onnx.ModelProto(producer_name=str(len(steps)))

    with caplog.at_level(logging.WARNING):
        assert simplified(attempt).producer_name == str(len(all_steps()) - 2)
    assert len(caplog.records) == 2 and broken <= set(all_steps())


def test_what_breaks_without_the_simplifier_too_is_an_error():
    tried = []

    def attempt(steps):
        tried.append(steps)
        raise ModelError(f"{len(steps)} steps")

    with pytest.raises(ModelError, match=r"^0 steps$"):
        simplified(attempt)
    assert len(tried) == 2


def test_without_the_simplifier_a_network_is_still_prepared(small_cnn, monkeypatch, caplog):
    def fails(model, steps):
        raise ModelError("no")

    expected = prepare(small_cnn).proto
    monkeypatch.setattr(sys.modules[prepare.__module__], "slim", fails)
    with caplog.at_level(logging.WARNING):
        assert prepare(small_cnn).proto == expected
    assert caplog.records[0].getMessage() == "onnxslim was left out, because it breaks this network: no"


def test_the_steps_that_are_never_done_exist():
    assert set(simplify._optimisations()) > simplify.SKIPPED_OPTIMISATIONS | {simplify.FUSION}
    assert set(simplify._fusions()) > simplify.SKIPPED_FUSIONS
