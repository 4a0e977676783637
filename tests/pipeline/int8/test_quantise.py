"""Whole networks in int8: near the original in every form, and what can't be is one line."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from onnx_spdy.models import Prepared, export_module, fixed_batch, narrowed, prepare
from onnx_spdy.models.graph import ModelError
from onnx_spdy.models.int8.form import FORMS
from onnx_spdy.models.int8.place import NothingToQuantise
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.pruners.quadratic import UnusableHessian
from onnx_spdy.pipeline.int8.pruned import in_int8
from onnx_spdy.pipeline.int8.quantise import quantise, with_int8_opset
from onnx_spdy.pipeline.level import levels_for
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.ranges import RANGES, RangeError
from onnx_spdy.pipeline.site import find_sites
from onnx_spdy.runtimes import OnnxSpdyError
from tests.models.corpus import NETWORKS
from tests.models.int8.writing import plain_session
from tests.models.narrowing import network as network_of
from tests.models.test_corpus import made

ASKED = os.environ.get("CORPUS", "")
ARCHITECTURES = {"all": list(NETWORKS)}.get(ASKED) or [name for name in ASKED.split(",") if name in NETWORKS]
TOLERANCE = 0.15  # of the outputs' norm; a sampling grid in 8 bits makes most of it
forms = pytest.mark.parametrize("form", ["onnxruntime", "openvino", "tensorrt"])


def outputs(model: onnx.ModelProto, inputs: dict[str, np.ndarray], optimised: bool = True) -> list[np.ndarray]:
    return plain_session(model, optimised).run(None, inputs)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-6))


def integer_weights(model: onnx.ModelProto) -> list[str]:
    kept = model.graph.initializer
    return [tensor.name for tensor in kept if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1]


@forms
def test_a_network_is_nearly_the_same_in_every_form(network: Network, samples: Samples, form: str) -> None:
    before = network.model.SerializeToString()
    told: list[tuple[int, int, str]] = []
    found = quantise(network, samples, FORMS[form], progress=lambda *one: told.append(one))
    assert network.model.SerializeToString() == before
    onnx.checker.check_model(found.proto, full_check=True)
    assert integer_weights(found.proto) == ["a.weight_int8", "b.weight_int8", "c.weight_int8", "d.weight_int8"]
    assert found.layers == ("conv_a", "conv_b", "gemm_c", "matmul_d")
    assert found.ranges in RANGES
    assert found.skipped == {}
    (expected,), (values,) = outputs(network.model, samples.inputs), outputs(found.proto, samples.inputs)
    assert 0 < relative_error(values, expected) < 0.03
    done, of = [one[0] for one in told], {one[1] for one in told}
    assert done == sorted(done)
    assert of == {done[-1]}


def test_the_seed_makes_the_bytes(network: Network, samples: Samples) -> None:
    def made_with(seed: int) -> bytes:
        return quantise(network, samples, FORMS["openvino"], seed=seed).proto.SerializeToString(deterministic=True)

    assert made_with(3) == made_with(3)


def test_what_is_kept_is_no_worse_than_any_range_alone(network: Network, samples: Samples) -> None:
    best = quantise(network, samples, FORMS["openvino"])
    for name in RANGES:
        alone = quantise(network, samples, FORMS["openvino"], ranges=(name,))
        assert alone.ranges == name
        assert best.loss <= alone.loss * (1 + 1e-6)


def test_only_the_layers_that_are_named_are_in_int8(network: Network, samples: Samples) -> None:
    found = quantise(network, samples, FORMS["openvino"], layers={"conv_b"})
    assert found.layers == ("conv_b",)
    assert integer_weights(found.proto) == ["b.weight_int8"]
    with pytest.raises(NothingToQuantise):
        quantise(network, samples, FORMS["openvino"], layers={"no such layer"})


@pytest.mark.parametrize("count", [1, 5])
def test_a_graph_that_fixes_its_batch_takes_any_number_of_samples(
    model: onnx.ModelProto, samples: Samples, count: int
) -> None:
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    assert fixed_batch(fixed) == 4
    found = quantise(Network(Prepared(fixed)), samples.take(slice(0, count)), FORMS["onnxruntime"])
    one = {"input": samples.inputs["input"][:4]}
    assert relative_error(outputs(found.proto, one)[0], outputs(model, one)[0]) < 0.3 / count


def test_one_sample_is_enough(network: Network, samples: Samples) -> None:
    one = samples.take(slice(0, 1))
    found = quantise(network, one, FORMS["openvino"])
    assert relative_error(outputs(found.proto, one.inputs)[0], outputs(network.model, one.inputs)[0]) < 0.05


@forms
def test_an_output_that_is_always_the_same_stays_so(samples: Samples, model: onnx.ModelProto, form: str) -> None:
    """Dead units: whatever comes in, the bias comes out."""
    dead = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in dead.graph.initializer:
        if tensor.name == "c.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(32, -1000, np.float32), "c.bias"))
    found = quantise(Network(Prepared(dead)), samples, FORMS[form])
    bias = next(numpy_helper.to_array(t) for t in dead.graph.initializer if t.name == "d.bias")
    np.testing.assert_allclose(outputs(found.proto, samples.inputs)[0], np.tile(bias, (96, 1)), rtol=1e-2, atol=1e-3)


def test_an_older_opset_is_raised_first(model: onnx.ModelProto, samples: Samples) -> None:
    old = onnx.ModelProto.FromString(model.SerializeToString())
    old.opset_import[0].version = 11
    prepared = Prepared(old)
    with pytest.raises(ModelError, match="opset 11; int8 weights need opset 13"):
        quantise(Network(prepared), samples, FORMS["openvino"])
    raised = with_int8_opset(prepared)
    assert raised.proto.opset_import[0].version == 13
    assert [node.name for node in raised.proto.graph.node] == [node.name for node in old.graph.node]
    assert with_int8_opset(raised) is raised
    found = quantise(Network(raised), samples, FORMS["openvino"])
    assert relative_error(outputs(found.proto, samples.inputs)[0], outputs(old, samples.inputs)[0]) < 0.03


def test_an_opset_that_cannot_be_raised_is_one_line(model: onnx.ModelProto) -> None:
    old = onnx.ModelProto.FromString(model.SerializeToString())
    old.opset_import[0].version = 11
    old.graph.node[1].op_type = "Frobnicate"
    with pytest.raises(
        ModelError, match="int8 needs opset 13, and this graph of opset 11 can't be converted"
    ) as caught:
        with_int8_opset(Prepared(old))
    assert "\n" not in str(caught.value)


def test_weights_in_half_precision_are_a_reason(model: onnx.ModelProto, samples: Samples) -> None:
    text = """
    g (float[n, 16] x) => (float[n, 16] y) <float16[16, 16] w, float16[16, 16] v>
    { h = Cast <to = 10> (x) [one] a = MatMul (h, w) [two] b = MatMul (a, v) y = Cast <to = 1> (b) }"""
    data = Samples({"x": np.ones((4, 16), np.float32)})
    with pytest.raises(NothingToQuantise) as caught:
        quantise(Network(Prepared(network_of(text))), data, FORMS["openvino"])
    assert str(caught.value) == (
        "no layer of the network can compute in int8 "
        "(one: its weight is FLOAT16, not float32; two: its weight is FLOAT16, not float32)"
    )


def test_a_network_of_other_layers_is_told_in_one_line() -> None:
    text = """
    g (float[n, 8, 4, 4] x) => (float[n, 8, 8, 8] y) <float[8, 8, 2, 2] w, float[8, 8, 2, 2] u>
    { [up] a = ConvTranspose (x, w) [again] y = ConvTranspose <strides = [2, 2], output_shape = [8, 8]> (a, u) }"""
    data = Samples({"x": np.ones((4, 8, 4, 4), np.float32)})
    with pytest.raises(OnnxSpdyError) as caught:  # there is nothing to prune in it either
        quantise(Network(Prepared(network_of(text))), data, FORMS["openvino"])
    assert "up: transposed convolutions" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_told(network: Network, samples: Samples, value: float) -> None:
    samples.inputs["input"][5, 0, 0, 0] = value
    with pytest.raises((RangeError, UnusableHessian), match="NaN or infinite") as caught:
        quantise(network, samples, FORMS["openvino"])
    assert "\n" not in str(caught.value)


def sparse(network: Network) -> PrunedNetwork:
    weights = {layer.weight: network.dense(layer.weight).clone() for layer in network.layers}
    for values in weights.values():
        values[values.abs() < values.abs().median()] = 0
    return PrunedNetwork(network.prepared, weights, {})


def test_zeros_of_a_pruned_network_are_zeros_in_int8(network: Network, samples: Samples) -> None:
    pruned = sparse(network)
    found = in_int8(pruned, samples, FORMS["onnxruntime"])
    assert found.int8 is not None
    assert found.weights is pruned.weights  # the floating point stays at hand
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.int8.proto.graph.initializer}
    for name, values in pruned.weights.items():
        assert not stored[f"{name}_int8"][values.numpy() == 0].any()


@pytest.mark.parametrize("kept", [8, 2])
def test_a_narrow_network_goes_into_int8_however_small_it_became(network: Network, samples: Samples, kept: int) -> None:
    sites = find_sites(network.prepared, levels_for("channels"))
    widths = {site.name: tuple(range(kept)) for site in sites}
    narrow = narrowed(network.prepared, widths)
    found = in_int8(PrunedNetwork(Prepared(narrow), {}, {}, widths=widths), samples, FORMS["openvino"])
    assert found.int8 is not None
    assert len(found.int8.layers) == 4
    expected, values = (outputs(one, samples.inputs)[0] for one in (narrow, found.int8.proto))
    assert relative_error(values, expected) < 0.1


@pytest.mark.parametrize("name", ARCHITECTURES or ["ResNet", "MobileNetV3", "Bert"])
def test_architectures_of_all_kinds(name: str) -> None:
    module, given = made(name)
    dense = prepare(export_module(module, given if len(given) > 1 else tuple(given.values())))
    inputs = dict(zip([value.name for value in dense.proto.graph.input], map(as_array, given.values()), strict=True))
    samples = Samples({key: np.concatenate([array] * 4) for key, array in inputs.items()})
    expected = outputs(dense.proto, inputs)
    for form in ("onnxruntime", "openvino", "tensorrt"):
        found = quantise(Network(dense), samples, FORMS[form])
        onnx.checker.check_model(found.proto, full_check=True)
        assert integer_weights(found.proto)
        for wanted, values in zip(expected, outputs(found.proto, inputs), strict=True):
            if wanted.dtype == np.float32:
                assert relative_error(values, wanted) < TOLERANCE, form


def as_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy()
