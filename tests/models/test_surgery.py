"""Editing with onnx-graphsurgeon: what isn't edited stays, to the byte."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import ModelError, export_module
from onnx_spdy.models.surgery import edit, read
from tests.models.corpus import NETWORKS
from tests.models.test_corpus import NOT_OLDER, made, older_export


def content(model: onnx.ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def branching() -> onnx.ModelProto:
    """Both branches of an If read the weight `w`; a second one inside reads `v`, and nothing else does."""
    return onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[batch, 2] x, bool on) => (float[batch, 2] y)
            <float[2, 2] w = {1, 2, 3, 4}, float[2] v = {5, 6}, float[2] unread = {7, 8}> {
            [choose] c = If (on) <
                then_branch = a () => (float[n, 2] t) {
                    p = MatMul (x, w)
                    t = If (on) <
                        then_branch = aa () => (float[n, 2] tt) { tt = Add (p, v) },
                        else_branch = ab () => (float[n, 2] te) { te = Identity (p) }>
                },
                else_branch = b () => (float[n, 2] e) { e = MatMul (x, w) }>
            [relu] y = Relu (c)
        }""")


def odd() -> onnx.ModelProto:
    """All that a file may hold besides nodes and weights; not a network that runs."""
    model = branching()
    graph = model.graph
    model.producer_name, model.doc_string, graph.doc_string = "someone", "a model", "a graph"
    model.metadata_props.add(key="classes", value="cat,dog")
    model.opset_import.add(domain="custom", version=3)
    model.training_info.add().initialization.name = "start"
    body = [helper.make_node("Sigmoid", ["a"], ["b"])]
    model.functions.append(
        helper.make_function("custom", "Double", ["a"], ["b"], body, [helper.make_opsetid("", 18)], ["factor"])
    )
    model.functions[0].metadata_props.add(key="from", value="here")
    graph.metadata_props.add(key="of", value="the graph")
    graph.quantization_annotation.add(tensor_name="w").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="v")
    graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", 2]))
    graph.value_info[0].metadata_props.add(key="of", value="a value")
    graph.node[1].doc_string, graph.node[1].overload = "a node", "one"
    graph.node[1].metadata_props.add(key="line", value="12")
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    graph.output.append(helper.make_value_info("maps", maps))
    value = helper.make_tensor("s", TensorProto.FLOAT, [1], [3.0])
    sparse = helper.make_sparse_tensor(value, helper.make_tensor("i", TensorProto.INT64, [1], [2]), [4])
    graph.node.append(helper.make_node("ZipMap", ["y"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]))
    graph.node.append(helper.make_node("Constant", [], ["unused"], sparse_value=sparse))
    for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2fnuz, ml_dtypes.int4):
        name = np.dtype(kind).name
        graph.initializer.append(numpy_helper.from_array(np.arange(-3, 3).astype(kind), name))
        graph.node.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=TensorProto.FLOAT))
    graph.sparse_initializer.append(sparse)
    far = graph.initializer.add(name="far", data_type=TensorProto.FLOAT, dims=[2])
    far.data_location = TensorProto.EXTERNAL
    far.external_data.add(key="location", value="weights.bin")
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_an_edit_that_changes_nothing_leaves_every_network_equal(name):
    module, inputs = made(name)
    new = name in NOT_OLDER
    model = export_module(module, tuple(inputs.values())) if new else older_export(module, inputs)
    before = content(model)
    with edit(model):
        pass
    assert content(model) == before


@pytest.mark.parametrize("change", [lambda graph: None, lambda graph: graph.nodes.append(gs.Node("Nothing", "new"))])
def test_what_graphsurgeon_does_not_know_stays(change, capfd):
    model, before = odd(), odd()
    with edit(model) as graph:
        change(graph)
    if graph.nodes[-1].name == "new":
        before.graph.node.add(op_type="Nothing", name="new")
    assert content(model) == content(before)
    assert capfd.readouterr() == ("", "")


def test_a_weight_that_only_inner_graphs_read_stays_once_and_outside():
    model, before = branching(), branching()
    with edit(model) as graph:
        graph.cleanup(recurse_subgraphs=False)
    assert content(model) == content(before)


def test_inner_graphs_follow_a_weight_that_is_renamed():
    model, before = branching(), branching()
    with edit(model) as graph:
        for node in next(iter(graph.nodes[0].subgraphs())).nodes:
            for inner in node.subgraphs():
                for tensor in inner.nodes[0].inputs:
                    tensor.name = {"v": "bias"}.get(tensor.name, tensor.name)
    assert [tensor.name for tensor in model.graph.initializer] == ["w", "bias", "unread"]
    (choose, _), expected = model.graph.node, before.graph.node[0]
    expected.attribute[0].g.node[1].attribute[0].g.node[0].input[1] = "bias"
    assert choose == expected


def test_what_an_edit_leaves_unread_goes_and_new_constants_come():
    model = branching()
    with edit(model) as graph:
        relu = graph.nodes[1]
        scaled = gs.Variable("scaled")
        graph.nodes = [
            gs.Node("Mul", "scale", inputs=[graph.inputs[0], gs.Constant("two", np.float32([2, 2]))], outputs=[scaled]),
            relu,
        ]
        relu.inputs = [scaled]
    assert [(node.op_type, node.name, list(node.input)) for node in model.graph.node] == [
        ("Mul", "scale", ["x", "two"]),
        ("Relu", "relu", ["scaled"]),
    ]
    assert [tensor.name for tensor in model.graph.initializer] == ["unread", "two"]  # that one was unread before
    onnx.checker.check_model(model)


def test_names_may_be_exchanged():
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        g (float[2] a, float[2] b) => (float[2] y) <float[2] s = {1, 2}> { m = Mul (a, s) y = Sub (m, b) }""")
    with edit(model) as graph:
        tensors = graph.tensors()
        for old, new in {"a": "b", "b": "a", "y": "z", "s": "scale"}.items():
            tensors[old].name = new
    assert [list(node.input) for node in model.graph.node] == [["b", "scale"], ["m", "a"]]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["b", "a", "z"]
    assert model.graph.initializer[0].name == "scale"


def test_constants_are_neither_copied_nor_converted():
    model = odd()
    with edit(model) as graph:
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant) and tensor.name != "s":
                assert tensor.values is not None  # reading them doesn't change what is stored either
    assert content(model) == content(odd())


def test_a_graph_that_cannot_be_read_is_one_line():
    model = branching()
    model.graph.initializer[0].data_type = 99
    with pytest.raises(ModelError, match=r"^this graph can't be read: .*99"):
        read(model)
    model = branching()
    model.graph.node.add(op_type="Custom", output=["c2"]).attribute.append(helper.make_attribute("text", b"\xff\xfe"))
    with pytest.raises(ModelError, match=r"^this graph can't be read: UnicodeDecodeError"):
        read(model)


def test_a_graph_over_which_graphsurgeon_stumbles_is_one_line():
    message = r"^this graph can't be rewritten: Encountered a node not in the graph"
    with pytest.raises(ModelError, match=message), edit(branching()) as graph:
        relu = graph.nodes.pop()  # it still makes the output
        graph.nodes.append(gs.Node("Neg", inputs=list(relu.inputs), outputs=list(relu.outputs)))
        graph.cleanup()
