"""Files that are wrong in ways that happen: each ends in one line that names it, soon, in little memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.tools.cli import main
from onnx_spdy.tools.fuzz.damage import DATA_FILE, Files
from onnx_spdy.tools.fuzz.graphs import examples, with_external_data
from onnx_spdy.tools.fuzz.inspect import inspected

Change = Callable[[onnx.ModelProto], None]


def images() -> onnx.ModelProto:
    return examples()[0]


def tensor(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(one for one in model.graph.initializer if one.name == name)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(one for one in model.graph.node if one.name == name)


def changed(change: Change) -> bytes:
    model = images()
    change(model)
    return model.SerializeToString()


def cut(part: float) -> bytes:
    data = images().SerializeToString()
    return data[: int(part * len(data))]


def cycle(model):
    node(model, "clip").input[0] = "d"


def output_twice(model):
    node(model, "clip").output[0] = "c"
    node(model, "pool").input[0] = "c"


def value_from_nowhere(model):
    node(model, "pool").input[0] = "missing"


def name_missing(model):
    node(model, "norm").output[0] = ""


def weight_twice(model):
    model.graph.initializer.add().CopyFrom(tensor(model, "w1"))


def input_twice(model):
    model.graph.input.add().CopyFrom(model.graph.input[0])


def huge_weight(model):
    tensor(model, "w3").dims[:] = [2**40, 2**40]


def overflowing_weight(model):
    tensor(model, "w3").dims[:] = [2**33, 2**33 + 5]  # their product is 5 * 2**33 in 64 bits


def huge_input(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 2**40


def overflowing_input(model):
    for dim in model.graph.input[0].type.tensor_type.shape.dim:
        dim.dim_value = 2**62


def more_than_it_claims(model):
    """The declared output is small, what a node makes of a constant is 8 GiB."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**31 - 1]), "shape"))
    model.graph.node.add(op_type="ConstantOfShape", input=["shape"], output=["z"])
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, [2]))


def no_weights(model):
    weight = tensor(model, "w1")
    weight.dims[0] = 0
    weight.raw_data = b""


def nan_weight(model):
    values = numpy_helper.to_array(tensor(model, "w1")).copy()
    values[0, 0, 0, 0] = np.nan
    tensor(model, "w1").raw_data = values.tobytes()


def huge_pads(model):
    node(model, "conv1").attribute[0].ints[:] = [2**40] * 4


def large_pads(model):
    """Just what fits into an allocation that a machine may grant: 10 GB."""
    node(model, "conv1").attribute[0].ints[:] = [9000] * 4


def no_stride(model):
    node(model, "conv1").attribute[1].ints[:] = [0, 0]


def no_stride_in_a_branch(model):
    conv = onnx.NodeProto()
    no_stride(model)
    conv.CopyFrom(node(model, "conv1"))
    branch = helper.make_graph([conv], "branch", [], [onnx.ValueInfoProto(name=conv.output[0])])
    choice = helper.make_node("If", ["on"], conv.output, "choice", then_branch=branch, else_branch=branch)
    node(model, "conv1").CopyFrom(choice)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))


def no_stride_in_a_function(model):
    conv = onnx.NodeProto()
    no_stride(model)
    conv.CopyFrom(node(model, "conv1"))
    model.functions.append(helper.make_function("own", "Window", conv.input, conv.output, [conv], model.opset_import))
    node(model, "conv1").CopyFrom(helper.make_node("Window", conv.input, conv.output, "window", domain="own"))
    model.opset_import.append(helper.make_opsetid("own", 1))


def negative_kernel(model):
    node(model, "pool").attribute[0].ints[:] = [-2, -2]


def unknown_operator(model):
    node(model, "pool").op_type = "Unheard"


def no_outputs(model):
    del model.graph.output[:]


def newer_than_known(model):
    model.opset_import[0].version = 4000


WRONG: dict[str, bytes] = {
    "empty": b"",
    "random bytes": np.random.default_rng(0).bytes(5000),
    "text": b"not a network\n" * 30,
    **{f"{part:.1%} of it": cut(part) for part in (0.02, 0.3, 0.9, 0.999)},
    **{
        one.__name__: changed(one)
        for one in (
            cycle, output_twice, value_from_nowhere, name_missing, weight_twice, input_twice, huge_weight,
            overflowing_weight, more_than_it_claims, huge_input,
            overflowing_input, no_weights, nan_weight, huge_pads, large_pads, no_stride,
            no_stride_in_a_branch, no_stride_in_a_function,
            negative_kernel, unknown_operator, no_outputs, newer_than_known,
        )
    },
}  # fmt: skip

SHAPES = """
<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 16] x) => (float y)
<float[16, 16] w, int64[3] shape = {{{shape}}}, bool on = {{1}}, int64 steps = {{{steps}}}>
{{
    a = MatMul (x, w)
    z = {computed}
    s = ReduceMax <keepdims = 0> (z)
    t = ReduceMax <keepdims = 0> (a)
    y = Add (s, t)
}}
"""
COMPUTED = {
    "huge constant": ("ConstantOfShape (shape)", "1048576, 4096, 4096"),
    "a constant as large as memory": ("ConstantOfShape (shape)", "4, 32768, 32768"),
    "overflowing constant": ("ConstantOfShape (shape)", "4294967296, 4294967296, 2"),
    "huge expand": ("Expand (a, shape)", "1048576, 1048576, 16"),
    "overflowing expand": ("Expand (a, shape)", "4611686018427387904, 1, 16"),
    "huge reshape": ("Reshape (a, shape)", "4611686018427387904, 4, 16"),
    "negative constant": ("ConstantOfShape (shape)", "-5, 2, 2"),
    "endless loop": (
        "Loop (steps, on, a) <body = b (int64 i, bool go, float[batch, 16] u) => (bool more, float[batch, 16] v) "
        "{ more = Identity (go) v = MatMul (u, w) }>",
        "1, 1, 1",
    ),
}


def computed(what: str) -> bytes:
    expression, shape = COMPUTED[what]
    model = onnx.parser.parse_model(SHAPES.format(computed=expression, shape=shape, steps=2**62))
    model.graph.ClearField("value_info")
    model.graph.initializer.append(numpy_helper.from_array(np.eye(16, dtype=np.float32), "w"))
    return model.SerializeToString()


def external(**entries: str) -> Files:
    """The example with its weights in a second file, and other entries for one of them."""
    model, data = with_external_data(images(), DATA_FILE)
    places = {item.key: item for item in tensor(model, "w1").external_data}
    for key, value in entries.items():
        places[key].value = value
    return Files(model.SerializeToString(), data)


ELSEWHERE = {
    "missing": {"location": "no.bin"},
    "parent": {"location": "../weights.bin"},
    "absolute": {"location": "/etc/hostname"},
    "device": {"location": "/dev/zero"},
    "folder": {"location": "."},
    "beyond its end": {"offset": "1000000"},
    "too long": {"length": str(2**62)},
    "negative": {"offset": "-4"},
    "no number": {"length": "many"},
    "another size": {"length": "12"},
}


def test_a_file_name_that_is_no_text_is_refused(tmp_path):
    files = external()
    refused_in_one_line(Files(files.model.replace(DATA_FILE.encode(), b"w\xe5ights.bin"), files.data), tmp_path)


def refused_in_one_line(files: Files, folder) -> None:
    outcome = inspected(files, folder / "case")
    assert outcome.trouble is None and not outcome.accepted, (outcome.trouble, outcome.text)
    lines = [line for line in outcome.text.splitlines() if line and not line.startswith("WARNING")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000


@pytest.mark.parametrize("what", WRONG)
def test_wrong_files_are_refused(what, tmp_path):
    refused_in_one_line(Files(WRONG[what]), tmp_path)


@pytest.mark.parametrize("what", COMPUTED)
def test_what_would_take_all_memory_or_time_is_refused(what, tmp_path):
    refused_in_one_line(Files(computed(what)), tmp_path)


@pytest.mark.parametrize("where", ELSEWHERE)
def test_external_data_that_isnt_there_or_isnt_ours_is_refused(where, tmp_path):
    refused_in_one_line(external(**ELSEWHERE[where]), tmp_path)


@pytest.mark.parametrize("what", ["random bytes", "cycle", "huge_weight", "nan_weight"])
def test_prepare_refuses_them_too_and_writes_nothing(what, tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(WRONG[what])
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", str(tmp_path / "model.onnx"), "--out", str(tmp_path / "prepared.onnx")])
    message = capsys.readouterr().err
    assert stopped.value.code == 1 and message.startswith("error: ") and message.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_nodes_of_one_name_are_no_reason_to_refuse(tmp_path):
    model = images()
    for one in model.graph.node:
        one.name = "same"
    assert inspected(Files(model.SerializeToString()), tmp_path / "case").accepted
