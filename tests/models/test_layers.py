"""Which layers are found, which are skipped and why, and the order of their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import (
    TorchGraph,
    UnsupportedOperator,
    find_layers,
    from_canonical,
    load_model,
    prepare,
    to_canonical,
)


def node(op, inputs, output, name, **attributes):
    return helper.make_node(op, inputs, [output], name, **attributes)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def only_layer(build, nodes, shape, out, initializers, **options):
    model = build(nodes, {"x": shape}, {"y": out}, initializers)
    layers = find_layers(model, **options)
    assert len(layers) == 1
    return layers[0]


def test_layers_come_in_graph_order_with_names_and_shapes(small_cnn):
    conv, depthwise, fc = find_layers(small_cnn)
    assert (conv.name, conv.op, conv.weight, conv.bias, conv.output) == (
        "conv1",
        "Conv",
        "conv1.weight",
        "conv1.bias",
        "c1",
    )
    assert conv.shape == (16, 3, 3, 3) and not conv.transposed and conv.prunable
    assert depthwise.shape == (16, 1, 3, 3) and depthwise.bias is None
    assert depthwise.skip == "depthwise convolution (16 groups)" and not depthwise.prunable
    assert fc.shape == (20, 16) and not fc.transposed and fc.prunable


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gemm_can_be_stored_either_way(build, transposed):
    stored = ones(16, 32) if transposed else ones(32, 16)
    nodes = [node("Gemm", ["x", "w", "b"], "y", "fc", transB=int(not transposed))]
    layer = only_layer(build, nodes, [1, 16], [1, 32], {"w": stored, "b": ones(32)})
    assert layer.shape == (32, 16) and layer.transposed is transposed and layer.bias == "b"


def test_the_bias_of_a_matmul_is_the_add_that_follows_it(build):
    nodes = [node("MatMul", ["x", "w"], "m", "proj"), node("Add", ["b", "m"], "y", "add")]
    layer = only_layer(build, nodes, [1, 7, 16], [1, 7, 32], {"w": ones(16, 32), "b": ones(32)})
    assert layer.shape == (32, 16) and layer.transposed and layer.bias == "b" and layer.output == "m"


@pytest.mark.parametrize(
    ("more", "bias_shape"),
    [
        ([node("Add", ["m", "b"], "a", "add"), node("Mul", ["a", "m"], "y", "again")], (32,)),  # m is read twice
        ([node("Add", ["m", "b"], "a", "add"), node("Add", ["a", "b"], "y", "again")], (32,)),  # b is shared
        ([node("Add", ["m", "b"], "y", "add")], (7, 32)),  # differs from position to position
        ([node("Add", ["m", "b"], "y", "add")], (1,)),  # one value for all outputs
        ([node("Mul", ["m", "b"], "y", "mul")], (32,)),
    ],
)
def test_anything_else_after_a_matmul_is_no_bias(build, more, bias_shape):
    nodes = [node("MatMul", ["x", "w"], "m", "proj"), *more]
    layer = only_layer(build, nodes, [1, 7, 16], [1, 7, 32], {"w": ones(16, 32), "b": ones(*bias_shape)})
    assert layer.bias is None and layer.prunable


def test_a_bias_that_two_layers_share_counts_for_none(build):
    nodes = [node("Gemm", ["x", "w1", "b"], "m", "a"), node("Gemm", ["m", "w2", "b"], "y", "b")]
    model = build(nodes, {"x": [1, 16]}, {"y": [1, 16]}, {"w1": ones(16, 16), "w2": ones(16, 16), "b": ones(16)})
    assert [layer.bias for layer in find_layers(model)] == [None, None]


def test_a_weight_that_several_nodes_share_is_one_layer(build):
    nodes = [node("MatMul", ["x", "w"], "m", "a"), node("MatMul", ["m", "w"], "y", "b")]
    model = build(nodes, {"x": [1, 16]}, {"y": [1, 16]}, {"w": ones(16, 16)})
    first, second = find_layers(model)
    assert first.prunable and first.nodes == ("a", "b") and first.outputs == ("m", "y")
    assert second.skip == "its weight 'w' is that of 'a' and pruned there" and second.nodes == ("b",)


@pytest.mark.parametrize(
    "other",
    [
        node("Gemm", ["m", "w"], "y", "b", transB=1),
        node("Add", ["m", "w"], "y", "b"),
        node("MatMul", ["w", "m"], "y", "b"),
    ],
)
def test_a_weight_that_is_used_in_different_ways_is_skipped(build, other):
    nodes = [node("MatMul", ["x", "w"], "m", "a"), other]
    model = build(nodes, {"x": [16, 16]}, {"y": [16, 16]}, {"w": ones(16, 16)})
    first = find_layers(model)[0]
    assert first.skip == "its weight 'w' is shared by 2 uses of different kinds" and first.more_uses == ()


def test_a_convolution_with_another_stride_is_another_kind(build):
    nodes = [node("Conv", ["x", "w"], "m", "a"), node("Conv", ["m", "w"], "y", "b", strides=[2, 2])]
    model = build(nodes, {"x": [1, 16, 4, 4]}, {"y": [1, 16, 2, 2]}, {"w": ones(16, 16, 1, 1)})
    assert all("different kinds" in layer.skip for layer in find_layers(model))


def test_reasons_to_skip(build):
    conv = [node("Conv", ["x", "w"], "y", "c")]
    grouped = [node("Conv", ["x", "w"], "y", "c", group=2)]
    up = [node("ConvTranspose", ["x", "w"], "y", "c")]
    square, wide = [1, 16, 1, 1], [1, 32, 1, 1]
    assert (
        "only 512 weights" in only_layer(build, conv, square, wide, {"w": ones(32, 16, 1, 1)}, minimum_weights=513).skip
    )
    assert only_layer(build, conv, square, wide, {"w": ones(32, 16, 1, 1)}, minimum_weights=512).prunable
    assert only_layer(build, grouped, square, wide, {"w": ones(32, 8, 1, 1)}).skip == "grouped convolution (2 groups)"
    layer = only_layer(build, up, square, wide, {"w": ones(16, 32, 1, 1)})
    assert "transposed convolution" in layer.skip and layer.shape == (32, 16, 1, 1)


def test_matmuls_that_hold_no_matrix_on_the_right_are_skipped(build):
    product = [node("MatMul", ["x", "w"], "y", "m")]
    left = [node("MatMul", ["w", "x"], "y", "m")]
    computed = [node("Transpose", ["x"], "t", "t", perm=[0, 2, 1]), node("MatMul", ["x", "t"], "y", "m")]
    batch = [1, 16, 16]
    assert "3 dimensions" in only_layer(build, product, batch, batch, {"w": ones(1, 16, 16)}).skip
    assert "left operand" in only_layer(build, left, batch, batch, {"w": ones(16, 16)}).skip
    attention = only_layer(build, computed, batch, batch, {})
    assert "computed" in attention.skip and attention.shape == ()


def test_a_weight_that_is_also_an_input_is_skipped(small_cnn):
    small_cnn.graph.input.append(helper.make_tensor_value_info("fc.weight", TensorProto.FLOAT, [20, 16]))
    assert "input or output" in find_layers(small_cnn)[2].skip


def test_an_integer_weight_is_skipped(build):
    model = build(
        [node("MatMul", ["x", "w"], "y", "m")],
        {"x": (TensorProto.INT32, [1, 16])},
        {"y": (TensorProto.INT32, [1, 16])},
        {"w": ones(16, 16, dtype=np.int32)},
    )
    assert "INT32" in find_layers(model)[0].skip


@pytest.mark.parametrize("transposed", [False, True])
def test_canonical_order_has_an_exact_inverse(build, transposed):
    stored = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    if not transposed:
        stored = stored.T
    nodes = [node("Gemm", ["x", "w"], "y", "fc", transB=int(not transposed))]
    layer = only_layer(build, nodes, [1, 16], [1, 32], {"w": stored})
    for array in (stored, torch.from_numpy(stored.copy())):
        canonical = to_canonical(layer, array)
        assert tuple(canonical.shape) == layer.shape
        back = from_canonical(layer, canonical)
        assert type(back) is type(array) and bool((back == array).all())


def test_a_conv_weight_is_canonical_as_it_is(small_cnn):
    conv = find_layers(small_cnn)[0]
    array = numpy_helper.to_array(small_cnn.graph.initializer[0])
    assert to_canonical(conv, array) is array and from_canonical(conv, array) is array


@pytest.mark.parametrize(
    ("file", "all_layers", "prunable"),
    [("resnet20_cifar10", 20, 20), ("dscnn_kws", 10, 6), ("mobilenet_v2_ilsvrc", 53, 36), ("yolox_nano_coco", 113, 80)],
)
def test_layers_of_real_networks(real_file, file, all_layers, prunable):
    layers = prepare(load_model(real_file(f"{file}.onnx"))).layers
    assert len(layers) == all_layers
    assert sum(layer.prunable for layer in layers) == prunable


def test_other_nodes_with_weights_are_listed_with_their_reason(build):
    nodes = [
        node("LSTM", ["x", "w", "r"], "h", "lstm", hidden_size=8),
        node("Einsum", ["h", "e"], "y", "mix", equation="tdbh,hk->tdbk"),
    ]
    initializers = {"w": ones(1, 32, 16), "r": ones(1, 32, 8), "e": ones(8, 40)}
    lstm, einsum = find_layers(build(nodes, {"x": [5, 2, 16]}, {"y": [5, 1, 2, 40]}, initializers))
    assert (lstm.weight, lstm.op, lstm.skip) == ("w", "LSTM", "recurrent layers aren't pruned")
    assert einsum.weight == "e" and "Einsum" in einsum.skip


def test_a_weight_behind_nodes_that_prepare_could_not_fold_is_traced(build):
    nodes = [
        node("DequantizeLinear", ["q", "scale"], "d", "dequantize"),
        node("Transpose", ["d"], "t", "transpose", perm=[1, 0]),
        node("MatMul", ["x", "t"], "y", "m"),
    ]
    layer = only_layer(build, nodes, [1, 16], [1, 32], {"q": np.ones((32, 16), np.int8), "scale": np.float32(0.1)})
    assert "computed from 'q' by DequantizeLinear, Transpose" in layer.skip


@pytest.mark.parametrize("hidden", ["Transpose", "Reshape", "Cast", "Identity", "Constant", "two Identities"])
def test_prepare_brings_hidden_weights_into_sight(build, hidden):
    """Each computes x @ w with `w` behind something; prepared, the weight is stored and its layer can be pruned."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 32)).astype(np.float32)
    stored, shape = {"w": w}, {"shape": np.array([16, 32], np.int64)}
    before = {
        "Transpose": ([node("Transpose", ["w"], "v", "t", perm=[1, 0])], {"w": np.ascontiguousarray(w.T)}),
        "Reshape": ([node("Reshape", ["w", "shape"], "v", "r")], {"w": w.reshape(8, 64), **shape}),
        "Cast": ([node("Cast", ["w"], "v", "c", to=TensorProto.FLOAT)], {"w": w.astype(np.float64)}),
        "Identity": ([node("Identity", ["w"], "v", "i")], stored),
        "Constant": ([node("Constant", [], "v", "c", value=numpy_helper.from_array(w))], {}),
        "two Identities": ([node("Identity", ["w"], "u", "i"), node("Identity", ["u"], "v", "j")], stored),
    }
    nodes, initializers = before[hidden]
    model = build([*nodes, node("MatMul", ["x", "v"], "y", "m")], {"x": [2, 16]}, {"y": [2, 32]}, initializers)
    (layer,) = prepare(model).layers
    assert layer.prunable and layer.shape == (32, 16)


def test_what_onnx_runtime_has_optimised_says_to_prune_before(build):
    """Its optimiser makes one operator of a MatMul and a Gelu, say, and convolutions of a domain of its own."""
    conv = helper.make_node("Conv", ["x", "w"], ["y"], "conv", domain="com.microsoft.nchwc")
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": [1, 16, 8, 8]}, {"y": [1, 16, 6, 6]})
    model.graph.node[0].CopyFrom(conv)
    weight = np.ones((16, 16, 3, 3), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.opset_import.add(domain="com.microsoft.nchwc", version=1)
    (layer,) = find_layers(model)
    assert layer.name == "conv" and "prune before optimising" in str(layer.skip)
    message = r"com\.microsoft\.nchwc\.Conv \(node 'conv'\): .*prune before optimising, that is give the original file"
    with pytest.raises(UnsupportedOperator, match=message):
        TorchGraph(model)


@pytest.mark.parametrize("readers", ["embedding", "none"])
def test_a_tied_embedding_is_called_that_and_not_computed(build, readers):
    nodes = [
        node("Transpose", ["table"], "turned", "turn", perm=[1, 0]),
        node("MatMul", ["x", "turned"], "a" if readers == "embedding" else "y", "head"),
    ]
    extra = {"table": ones(40, 16)}
    if readers == "embedding":
        nodes += [node("Gather", ["table", "ids"], "g", "look up"), node("MatMul", ["a", "g"], "y", "other")]
        extra["ids"] = np.arange(40)
    model = build(nodes, {"x": [4, 16]}, {"y": [4, 16 if readers == "embedding" else 40]}, extra)
    head = next(layer for layer in find_layers(model) if layer.name == "head")
    assert ("embedding 'table'" in head.skip and "'look up'" in head.skip) == (readers == "embedding")
    assert ("computed" in head.skip) == (readers == "none")
