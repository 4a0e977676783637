"""Preparation: the same results, names that stay, and what engines need."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import helper

from onnx_spdy.models import ModelError, find_layers, input_shapes, load_model, node_names, ort_process, prepare
from onnx_spdy.models.agreement import Reference, check_same_results

FLOAT = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [1])


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("file", "gone"),
    [
        ("resnet20_cifar10", {"ConstantOfShape", "Constant", "Cast"}),
        ("dscnn_kws", {"Pad", "ConstantOfShape", "ReduceMean", "Constant"}),
        ("mobilenet_v2_ilsvrc", {"Pad", "ConstantOfShape", "ReduceMean", "Constant"}),
        ("yolox_nano_coco", set()),
    ],
)
def test_real_networks(real_file, file, gone):
    model = load_model(real_file(f"{file}.onnx"))
    before = model.SerializeToString()
    prepared = prepare(model).proto
    assert model.SerializeToString() == before
    assert not gone & set(operators(prepared))
    assert input_shapes(prepared) == input_shapes(model)
    weights = {layer.weight for layer in find_layers(prepared)}
    assert weights <= {tensor.name for tensor in model.graph.initializer}
    assert prepare(model).proto.SerializeToString() == prepared.SerializeToString()
    assert prepare(prepared).proto.SerializeToString() == prepared.SerializeToString()


MEANS = [
    (17, {"axes": [2, 3], "keepdims": 1}, None, 4),
    (17, {"axes": [-1, -2], "keepdims": 0}, None, 4),
    (18, {"keepdims": 1}, [-1, -2], 4),
    (18, {"keepdims": 0}, [2, 3], 4),
    (18, {}, [2, 3], 4),
    (18, {"keepdims": 0}, [4, 2, 3], 5),
]


@pytest.mark.parametrize(("opset", "attributes", "axes", "rank"), MEANS)
def test_a_mean_over_all_pixels_becomes_pooling(build, opset, attributes, axes, rank):
    shape = [8, 5, 4, 3][: rank - 1]
    names = ["r"] if axes is None else ["r", "axes"]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("ReduceMean", names, ["m"], "mean", **attributes),
        helper.make_node("Sigmoid", ["m"], ["y"], "sigmoid"),
    ]
    out = [8] if attributes.get("keepdims") == 0 else [8, *[1] * (rank - 2)]
    initializers = {} if axes is None else {"axes": np.array(axes)}
    model = build(nodes, {"x": ["batch", *shape]}, {"y": ["batch", *out]}, initializers, opset)
    prepared = prepare(model).proto
    assert "ReduceMean" not in operators(prepared) and operators(prepared)["GlobalAveragePool"] == 1
    assert not prepared.graph.initializer
    assert next(node.name for node in prepared.graph.node if node.op_type == "GlobalAveragePool") == "mean"
    x = random(3, *shape)
    np.testing.assert_allclose(run(prepared, {"x": x})[0], run(model, {"x": x})[0], rtol=1e-5)
    assert prepare(prepared).proto.SerializeToString() == prepared.SerializeToString()


@pytest.mark.parametrize("axes", [[1, 2], [3], [1, 2, 3], [0, 2, 3]])
def test_other_means_stay(build, axes):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["m"]),
        helper.make_node("Sigmoid", ["m"], ["y"]),
    ]
    model = build(nodes, {"x": [2, 8, 5, 4]}, {"y": [None] * 4}, {"axes": np.array(axes)})
    assert operators(prepare(model).proto)["ReduceMean"] == 1


def test_a_folded_batchnorm_leaves_the_names_of_the_convolution(build):
    numbers = {name: np.abs(random(8)) + 0.1 for name in ("scale", "shift", "mean", "var")}
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], "conv"),
        helper.make_node("BatchNormalization", ["c", "scale", "shift", "mean", "var"], ["b"], "bn"),
        helper.make_node("Relu", ["b"], ["y"], "relu"),
    ]
    initializers = {"conv.weight": random(8, 4, 3, 3), "conv.bias": random(8), **numbers}
    model = build(nodes, {"x": ["batch", 4, 6, 6]}, {"y": ["batch", 8, 4, 4]}, initializers)
    prepared = prepare(model).proto
    assert [(node.op_type, node.name) for node in prepared.graph.node] == [("Conv", "conv"), ("Relu", "relu")]
    assert [tensor.name for tensor in prepared.graph.initializer] == ["conv.weight", "conv.bias"]
    x = random(2, 4, 6, 6)
    np.testing.assert_allclose(run(prepared, {"x": x})[0], run(model, {"x": x})[0], rtol=1e-4, atol=1e-5)


def test_a_convolution_keeps_its_name_when_padding_is_folded_into_it(build):
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["p"], "pad"),
        helper.make_node("Conv", ["p", "w"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    initializers = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": random(8, 4, 3, 3)}
    prepared = prepare(build(nodes, {"x": ["batch", 4, 6, 6]}, {"y": ["batch", 8, 6, 6]}, initializers)).proto
    assert [(node.op_type, node.name) for node in prepared.graph.node] == [("Conv", "conv"), ("Relu", "relu")]


def test_linear_layers_keep_their_weight(build):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], "proj"),
        helper.make_node("Add", ["m", "b"], ["y"], "bias"),
    ]
    model = build(nodes, {"x": [2, 7, 16]}, {"y": [2, 7, 32]}, {"w": random(16, 32), "b": random(32)})
    (layer,) = prepare(model).layers
    assert (layer.weight, layer.bias, layer.shape) == ("w", "b", (32, 16))


def test_equal_biases_stay_apart(build):
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["m"], "a"),
        helper.make_node("Gemm", ["m", "w2", "b2"], ["y"], "b"),
    ]
    zeros = {"b1": np.zeros(16, np.float32), "b2": np.zeros(16, np.float32)}
    model = build(nodes, {"x": [1, 16]}, {"y": [1, 16]}, {"w1": random(16, 16), "w2": random(16, 16), **zeros})
    assert [layer.bias for layer in prepare(model).layers] == ["b1", "b2"]


def test_what_surrounds_the_nodes_stays(small_cnn):
    small_cnn.metadata_props.add(key="classes", value="cat,dog")
    small_cnn.producer_name = "someone"
    small_cnn.graph.input.append(helper.make_tensor_value_info("unused", onnx.TensorProto.FLOAT, ["batch", 2]))
    prepared = prepare(small_cnn).proto
    assert [(entry.key, entry.value) for entry in prepared.metadata_props] == [("classes", "cat,dog")]
    assert (prepared.producer_name, prepared.ir_version) == ("someone", small_cnn.ir_version)
    assert list(prepared.graph.input) == list(small_cnn.graph.input)
    assert list(prepared.graph.output) == list(small_cnn.graph.output)
    assert prepared.opset_import == small_cnn.opset_import


def test_nodes_get_unique_names(small_cnn):
    for node in small_cnn.graph.node:
        node.name = "same" if node.op_type == "Conv" else ""
    prepared = prepare(small_cnn).proto
    names = [node.name for node in prepared.graph.node]
    assert all(names) and len(set(names)) == len(names) and names == node_names(prepared.graph)


def test_nothing_is_printed(small_cnn, capfd):
    prepare(small_cnn)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_computes_something_else_is_noticed(small_cnn):
    changed = onnx.ModelProto()
    changed.CopyFrom(small_cnn)
    changed.graph.node[1].op_type = "Sigmoid"
    with pytest.raises(ModelError, match="changed output 'logits'"):
        check_same_results(small_cnn, changed)


def far_lookup(build) -> onnx.ModelProto:
    """An index that is out of range for every random input; inputs from -104 to -101 are right."""
    nodes = [
        helper.make_node("Add", ["ids", "far"], ["i"]),
        helper.make_node("Gather", ["w", "i"], ["e"]),
        helper.make_node("Add", ["e", "zero"], ["y"]),
    ]
    initializers = {"far": np.int64(100), "w": random(4, 2), "zero": np.zeros(2, np.float32)}
    return build(nodes, {"ids": (onnx.TensorProto.INT64, ["batch"])}, {"y": ["batch", 2]}, initializers)


def test_a_network_that_no_random_input_suits_is_refused(build):
    with pytest.raises(ModelError, match=r"out of data bounds.*; random inputs don't suit .*: give example inputs"):
        prepare(far_lookup(build))


def test_a_network_that_no_random_input_suits_is_compared_on_the_users_examples(build, monkeypatch):
    model, examples = far_lookup(build), {"ids": np.array([-101, -104], np.int32)}
    assert operators(prepare(model, examples).proto) == {"Add": 1, "Gather": 1}

    def wrong(graph):
        lookup = graph.nodes[0]
        outputs = list(lookup.outputs)
        lookup.outputs.clear()
        graph.nodes[0] = gs.Node("Sub", "wrong", inputs=list(lookup.inputs), outputs=outputs)

    monkeypatch.setattr(sys.modules[prepare.__module__], "pool_instead_of_mean", wrong)
    with pytest.raises(ModelError, match="can't run the prepared model"):
        prepare(model, examples)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"ids": np.array([0])}, "with the example inputs, and random ones don't suit it either"),
        ({"other": np.array([-101])}, "'ids' is missing, or no input of the model"),
    ],
)
def test_examples_that_do_not_suit_are_refused(build, examples, message):
    with pytest.raises(ModelError, match=message):
        prepare(far_lookup(build), examples)


def test_examples_may_be_left_for_random_inputs_where_they_do_not_suit(small_cnn):
    assert prepare(small_cnn, {"input": random(2, 5, 8, 8)}).proto == prepare(small_cnn).proto


def test_a_model_that_onnx_runtime_cannot_run_is_an_error(build):
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"])]
    model = build(nodes, {"x": [2, 3]}, {"y": [7]}, {"s": np.array([7])})
    with pytest.raises(ModelError, match="can't run the model"):
        prepare(model)


def test_a_model_that_onnx_runtime_cannot_load_is_an_error(small_cnn):
    small_cnn.graph.node[1].op_type = "NoSuchOperator"
    small_cnn.graph.node[1].domain = "nowhere"
    small_cnn.opset_import.add(domain="nowhere", version=1)
    with pytest.raises(ModelError, match="NoSuchOperator"):
        prepare(small_cnn)


def test_functions_are_inlined(build):
    model = build([helper.make_node("Relu", ["x"], ["y"], "call")], {"x": ["batch", 4]}, {"y": ["batch", 4]})
    model.graph.node[0].op_type, model.graph.node[0].domain = "Double", "mine"
    body = [helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Add", ["s", "a"], ["b"])]
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("mine", "Double", ["a"], ["b"], body, opsets))
    model.opset_import.add(domain="mine", version=1)
    prepared = prepare(model).proto
    assert operators(prepared) == {"Sigmoid": 1, "Add": 1} and not prepared.functions


def test_what_no_engine_runs_in_half_precision_is_refused_with_advice(build):
    import ml_dtypes

    kind = onnx.TensorProto.BFLOAT16
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"])]
    model = build(
        nodes,
        {"x": (kind, [1, 4, 4, 4])},
        {"y": (kind, [1, 8, 2, 2])},
        {"w": np.ones((8, 4, 3, 3), ml_dtypes.bfloat16)},
    )
    with pytest.raises(ModelError, match=r"can't load the model: .*; export the network in float32"):
        prepare(model)


def test_a_run_without_an_end_is_stopped(monkeypatch):
    """A loop that ends when a value is large enough, which it never is."""
    monkeypatch.setattr(ort_process, "LONGEST_RUN_SECONDS", 0.5)
    endless = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[batch, 4] x) => (float[batch, 4] y) <bool on = {1}, float large = {1e30}> {
            y = Loop (, on, x) <body = b (int64 i, bool go, float[batch, 4] u) => (bool more, float[batch, 4] v) {
                v = Tanh (u)
                size = ReduceMax <keepdims = 0> (v)
                more = Less (size, large)
            }>
        }""")
    with pytest.raises(ModelError, match=r"takes more than 0\.5 s"):
        check_same_results(endless, endless)


@pytest.mark.parametrize(
    ("role", "kind", "message"),
    [
        ("output", helper.make_sequence_type_proto(FLOAT), "output 'parts' of the model is a sequence, not a tensor"),
        ("output", helper.make_optional_type_proto(FLOAT), "output 'parts' of the model is optional, not a tensor"),
        ("input", helper.make_sequence_type_proto(FLOAT), "input 'parts' of the model is a sequence, not a tensor"),
        ("input", helper.make_map_type_proto(onnx.TensorProto.INT64, FLOAT), "input 'parts' of the model is a map"),
    ],
)
def test_what_is_no_tensor_is_refused_in_one_line(small_cnn, role, kind, message):
    getattr(small_cnn.graph, role).append(helper.make_value_info("parts", kind))
    with pytest.raises(ModelError, match=message):
        prepare(small_cnn)


def test_dictionaries_of_classes_are_refused_with_the_converters_option(small_cnn):
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(onnx.TensorProto.INT64, FLOAT))
    small_cnn.graph.node.append(helper.make_node("ZipMap", ["logits"], ["classes"], domain="ai.onnx.ml"))
    small_cnn.graph.output.append(helper.make_value_info("classes", maps))
    with pytest.raises(ModelError, match=r"'classes' of the model is a sequence, .*: convert .* with zipmap=False"):
        prepare(small_cnn)


def test_texts_are_random_too(build):
    labels = helper.make_node(
        "LabelEncoder", ["t"], ["y"], domain="ai.onnx.ml", keys_strings=["0", "1"], values_floats=[2.0, 3.0]
    )
    model = build([helper.make_node("Relu", ["x"], ["z"])], {"x": ["batch"]}, {"z": ["batch"]})
    model.graph.node.append(labels)
    model.graph.input.append(helper.make_tensor_value_info("t", onnx.TensorProto.STRING, ["batch"]))
    model.graph.output.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch"]))
    model.opset_import.add(domain="ai.onnx.ml", version=2)
    assert operators(prepare(model).proto) == {"Relu": 1, "LabelEncoder": 1}


# A Scan whose state and sequence are exchanged, behind a Loop, so that their ranks aren't known before it runs.
CRASH = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[batch, 5, 16] x) => (float[batch, 5, 16] y, float[steps, batch, 16] seen)
        <int64 three = {3}, bool on = {1}, float half = {0.5}> {
        d = Loop (three, on, x) <body = s (int64 i, bool go, float[batch, 5, 16] u)
            => (bool more, float[batch, 5, 16] v) { v = Tanh (u) more = Identity (go) }>
        turned = Transpose <perm = [1, 0, 2]> (d)
        zero = ReduceMax <axes = [1], keepdims = 0> (d)
        last, seen = Scan (turned, zero) <num_scan_inputs = 1, body = b (float[batch, 16] h, float[batch, 16] e)
            => (float[batch, 16] k, float[batch, 16] o) { k = Add (h, e) o = Mul (k, half) }>
        y = Identity (d)
    }"""


def test_a_graph_that_makes_onnx_runtime_abort_is_one_line():
    with pytest.raises(ModelError, match=r"ONNX Runtime crashes when it runs the model \(SIGABRT"):
        prepare(onnx.parser.parse_model(CRASH))


def test_a_prepared_graph_that_makes_it_abort_is_one_line_and_the_next_is_compared_again():
    harmless = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]>
        g (float[batch, 5, 16] x) => (float[batch, 5, 16] y, float[5, batch, 16] seen) {
            y = Tanh (x)
            seen = Transpose <perm = [1, 0, 2]> (x)
        }"""
    )
    with Reference(harmless) as reference:
        with pytest.raises(ModelError, match=r"crashes when it runs the prepared model"):
            reference.check(onnx.parser.parse_model(CRASH))
        reference.check(harmless)


def test_a_process_that_was_ended_from_outside_is_started_again(small_cnn):
    with Reference(small_cnn) as reference:
        reference._process._process.kill()
        reference._process._process.wait()
        reference.check(small_cnn)


def test_a_full_disk_is_one_line(small_cnn, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ModelError, match=r"cannot write the model to .*: No space left on device; set TMPDIR"):
        prepare(small_cnn)


def test_nothing_is_left_behind(small_cnn, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prepare(small_cnn)
    with pytest.raises(ModelError):
        prepare(onnx.parser.parse_model(CRASH))
    assert not list(tmp_path.iterdir())
