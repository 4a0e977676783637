"""Narrower graphs of whole networks: of the corpus, of both exporters, and of real ones where they are at hand.

A few networks by default; others, or all, as `test_corpus` takes them (CORPUS=all, CORPUS=Gpt,HfBert, ...).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from onnx_spdy.models import GroupError, Prepared, export_module, find_groups, find_layers, masked, narrowed, prepare
from tests.encoder import encoder, sentences
from tests.models.narrowing import check_narrow_is_masked, network, outputs_of, random_inputs, random_keep, shapes_of
from tests.models.test_corpus import CHOSEN, NOT_OLDER, made, older_export

# Residuals and heads; shared key heads; detection, concatenation and shuffling; positions, cross attention.
NEWER = CHOSEN or ["EfficientNet", "Swin", "HfLlama"]
OLDER = CHOSEN or ["DenseNet", "RegNet", "ShuffleNet", "RetinaNet", "Siamese", "Vgg", "HfBart"]
REAL = ("resnet20_cifar10", "mobilenet_v2_ilsvrc", "dscnn_kws", "yolox_nano_coco")

CHAIN = """
g (float[n, 3, 8, 8] x) => (float[n, 5, 8, 8] y) <float[8, 3, 1, 1] w1, float[5, 8, 1, 1] w2>
{
    [first] a = Conv (x, w1)
    r = Sigmoid (a)
    [second] y = Conv (r, w2)
}"""


def check_at_random_widths(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], seeds: int = 3) -> None:
    groups = find_groups(model)
    told = {name for group in groups for name in group.producers}
    assert {layer.name for layer in find_layers(model) if layer.prunable} <= told
    assert len({group.name for group in groups}) == len(groups)
    for seed in range(seeds):
        check_narrow_is_masked(model, random_keep(groups, seed), dict(inputs))


@pytest.mark.parametrize("name", NEWER)
def test_networks_at_random_widths(name):
    module, inputs = made(name)
    model = prepare(export_module(module, inputs if len(inputs) > 1 else tuple(inputs.values()))).proto
    names = [value.name for value in model.graph.input]
    check_at_random_widths(model, dict(zip(names, (value.numpy() for value in inputs.values()), strict=True)))


@pytest.mark.parametrize("heads", ["counted", "the rest"])
def test_layers_that_share_the_shape_of_an_open_length_have_heads_of_their_own(heads, monkeypatch):
    """However the exporter writes the shape: (batch, length, heads, size), with -1 for one of them or not."""
    module, example = encoder()
    if heads == "counted":
        monkeypatch.setattr(torch.Tensor, "unflatten", lambda x, _, sizes: x.reshape(*x.shape[:-1], sizes[0], 8))
    axes = {name: {1: "length"} for name in example}
    model = prepare(export_module(module, example, axes)).proto
    assert [group.kind for group in find_groups(model) if group.prunable].count("heads") == len(module.layers)
    check_at_random_widths(model, sentences(4), seeds=4)


def test_layers_that_share_the_shape_of_repeated_keys_have_heads_of_their_own():
    """With an open batch the shape is computed: (batch, heads of keys, queries for each, length, size)."""
    module, inputs = made("HfLlama")
    groups = find_groups(prepare(export_module(module, inputs)))
    heads = [group for group in groups if group.prunable and group.kind == "heads"]
    assert [(len(group.producers), group.units) for group in heads] == [(3, 2), (3, 2)]


@pytest.mark.parametrize("name", OLDER)
def test_networks_of_the_older_exporter_at_random_widths(name):
    if name in NOT_OLDER:
        pytest.skip(NOT_OLDER[name])
    module, inputs = made(name)
    model = prepare(older_export(module, inputs)).proto
    names = [value.name for value in model.graph.input]
    check_at_random_widths(model, dict(zip(names, (value.numpy() for value in inputs.values()), strict=True)))


@pytest.mark.parametrize("name", REAL)
def test_real_networks_at_random_widths(real_file, name):
    model = prepare(onnx.load(real_file(f"{name}.onnx"))).proto
    check_at_random_widths(model, random_inputs(model, batch=1), seeds=1)


def test_all_units_are_the_whole_network():
    model = network(CHAIN)
    keep = {"first": range(8)}
    assert narrowed(model, keep).SerializeToString() == model.SerializeToString()
    assert masked(Prepared(model), keep).SerializeToString() == model.SerializeToString()


def test_only_what_holds_the_width_changes():
    model = network(CHAIN)
    model.metadata_props.add(key="who", value="me")
    model.graph.value_info.append(helper.make_tensor_value_info("r", 1, ["n", 8, 8, 8]))
    model.graph.node[1].doc_string = "a note"
    narrow = narrowed(model, {"first": [1, 6, 2]})
    assert shapes_of(narrow) == {"w1": (3, 3, 1, 1), "w2": (5, 3, 1, 1)}
    assert list(narrow.graph.node) == list(model.graph.node)
    assert narrow.metadata_props == model.metadata_props
    assert not narrow.graph.value_info
    dense, small = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in one.graph.initializer} for one in (model, narrow)
    )
    assert np.array_equal(small["w1"], dense["w1"][[1, 2, 6]])  # in their order, however they were given
    assert np.array_equal(small["w2"], dense["w2"][:, [1, 2, 6]])


def test_a_unit_is_removed_by_its_consumers_not_by_zeros_where_it_is_made():
    model = network(CHAIN)
    dense = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeroed = {tensor.name: numpy_helper.to_array(tensor) for tensor in masked(model, {"first": [0]}).graph.initializer}
    assert np.array_equal(zeroed["w1"], dense["w1"])
    assert not zeroed["w2"][:, 1:].any()
    made_zero = network(CHAIN)
    values = dense["w1"].copy()
    values[1:] = 0
    made_zero.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w1"))
    inputs = random_inputs(model)
    (narrow,), (wrong,) = (outputs_of(one, inputs) for one in (narrowed(model, {"first": [0]}), made_zero))
    assert np.abs(narrow - wrong).max() > 0.1  # because Sigmoid(0) = 0.5


def test_half_precision_is_kept():
    text = CHAIN.replace("float[", "float16[")
    narrow = narrowed(network(text), {"first": [3]})
    assert {tensor.data_type for tensor in narrow.graph.initializer} == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"third": [0]}, "there is no group 'third'; those that can shrink are first"),
        ({"first": []}, "none of the 8 units of group 'first' is kept"),
        ({"first": [8]}, "group 'first' has units 0 to 7, not 8"),
        ({"first": [-1]}, "group 'first' has units 0 to 7, not -1"),
        ({"second": [0]}, "group 'second' can't shrink: output 'y' of the graph keeps its shape"),
    ],
)
def test_what_cannot_be_removed_is_told(keep, message):
    for make in (narrowed, masked):
        with pytest.raises(GroupError, match=message) as caught:
            make(network(CHAIN), keep)
        assert isinstance(caught.value, ValueError)
