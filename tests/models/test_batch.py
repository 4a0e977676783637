"""A batch that is written into a graph which declares it open."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models import fixed_batch, prepare

LENGTH, WIDTH, CLASSES = 6, 8, 5
node = helper.make_node
integers = TensorProto.INT64


def network(nodes, output=("batch", LENGTH, CLASSES), others=(), batch="batch", **constants):
    """MatMul "up", the nodes from "h" to "mixed", MatMul "down"."""
    rng = np.random.default_rng(0)
    constants |= {
        "w1": rng.standard_normal((WIDTH, WIDTH)).astype(np.float32),
        "w2": rng.standard_normal((WIDTH, CLASSES)).astype(np.float32),
    }
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        [node("MatMul", ["x", "w1"], ["h"], "up"), *nodes, node("MatMul", ["mixed", "w2"], ["y"], "down")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, LENGTH, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output), *others],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def attention(source="h", result="mixed"):
    """Every position looks at every other one of its row."""
    return [
        node("Transpose", [source], [f"{source}_t"], perm=[0, 2, 1]),
        node("MatMul", [source, f"{source}_t"], [f"{source}_scores"]),
        node("Softmax", [f"{source}_scores"], [f"{source}_p"], axis=-1),
        node("MatMul", [f"{source}_p", source], [result]),
    ]


def shape(*sizes):
    return np.array(sizes, np.int64)


BAKED = {
    "tokens of all samples attend to each other": (
        [
            node("Reshape", ["h", "flat"], ["one"]),
            *attention("one", "seen"),
            node("Reshape", ["seen", "back"], ["mixed"]),
        ],
        {"flat": shape(1, -1, WIDTH), "back": shape(-1, LENGTH, WIDTH)},
        ("batch", LENGTH, CLASSES),
        1,
    ),
    "all samples are one row of the output": (
        [
            node("Reshape", ["h", "flat"], ["one"]),
            node("ReduceMean", ["one"], ["mixed"], axes=[1], keepdims=0),
        ],
        {"flat": shape(1, -1, WIDTH)},
        ("batch", CLASSES),
        1,
    ),
    "the output keeps its first axis": (
        [node("Reshape", ["h", "flat"], ["mixed"])],
        {"flat": shape(1, -1, WIDTH)},
        ("batch", LENGTH, CLASSES),
        1,
    ),
    "two samples don't fit": (
        [node("Reshape", ["h", "fixed"], ["mixed"])],
        {"fixed": shape(1, LENGTH, WIDTH)},
        ("batch", LENGTH, CLASSES),
        1,
    ),
    "the first sample is cut off": (
        [node("Slice", ["h", "zero", "one", "zero"], ["mixed"])],
        {"zero": shape(0), "one": shape(1)},
        ("batch", LENGTH, CLASSES),
        1,
    ),
    "the first sample is added to all": (
        [node("Gather", ["h", "zero"], ["first"], axis=0), node("Add", ["h", "first"], ["mixed"])],
        {"zero": shape(0)},
        ("batch", LENGTH, CLASSES),
        1,
    ),
    "a token is expanded to the batch of the example": (
        [node("Expand", ["token", "size"], ["tokens"]), node("Concat", ["tokens", "h"], ["mixed"], axis=1)],
        {"token": np.ones((1, 1, WIDTH), np.float32), "size": shape(1, 1, WIDTH)},
        ("batch", LENGTH + 1, CLASSES),
        1,
    ),
    "a constant has the batch of the example, 4": (
        [node("Add", ["h", "positions"], ["mixed"])],
        {"positions": np.random.default_rng(1).standard_normal((4, LENGTH, WIDTH)).astype(np.float32)},
        ("batch", LENGTH, CLASSES),
        4,
    ),
    "a constant has the batch of the example, 2": (
        [node("Add", ["h", "positions"], ["mixed"])],
        {"positions": np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)},
        ("batch", LENGTH, CLASSES),
        2,
    ),
    "a batch of 8 in a reshape": (
        [
            node("Reshape", ["h", "heads"], ["split"]),
            node("Reshape", ["split", "back"], ["mixed"]),
        ],
        {"heads": shape(8, LENGTH, 2, WIDTH // 2), "back": shape(-1, LENGTH, WIDTH)},
        ("batch", LENGTH, CLASSES),
        8,
    ),
}


@pytest.mark.parametrize("name", BAKED)
def test_a_batch_that_is_written_into_the_graph_is_fixed_and_a_warning_says_so(name, caplog):
    nodes, constants, output, size = BAKED[name]
    model = network(nodes, output, **constants)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(model).proto
    assert fixed_batch(prepared) == size
    assert f"right for a batch of {size} only" in caplog.text
    assert prepared.graph.output[0].type.tensor_type.shape.dim[0].dim_value == size
    x = np.random.default_rng(2).standard_normal((size, LENGTH, WIDTH)).astype(np.float32)
    expected, found = (
        ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for one in (model, prepared)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert prepare(prepared).proto == prepared


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


OPEN = {
    "each sample alone": (attention(), {}, {}),
    "flattened, and taken apart again": (
        [node("Reshape", ["h", "flat"], ["one"]), node("Reshape", ["one", "back"], ["mixed"])],
        {"flat": shape(1, -1, WIDTH), "back": shape(-1, LENGTH, WIDTH)},
        {},
    ),
    "samples and positions in one axis": (
        [node("Reshape", ["h", "flat"], ["mixed"])],
        {"flat": shape(-1, WIDTH)},
        {"output": ("tokens", CLASSES)},
    ),
    "time first": (
        [node("Transpose", ["h"], ["mixed"], perm=[1, 0, 2])],
        {},
        {"output": (LENGTH, "batch", CLASSES)},
    ),
    "a mean over the batch beside the samples": (
        [node("Identity", ["h"], ["mixed"]), node("ReduceMean", ["h"], ["aux"], axes=[0, 1, 2], keepdims=0)],
        {},
        {"others": [value("aux", [])]},
    ),
    "a mean over the batch alone": (
        [node("ReduceMean", ["h"], ["mixed"], axes=[0], keepdims=1)],
        {},
        {"output": (1, LENGTH, CLASSES)},
    ),
    "statistics of the batch": (
        [
            node("ReduceMean", ["h"], ["mean"], axes=[0], keepdims=1),
            node("Sub", ["h", "mean"], ["centred"]),
            node("Tanh", ["centred"], ["mixed"]),
        ],
        {},
        {},
    ),
    "a softmax over the batch": ([node("Softmax", ["h"], ["mixed"], axis=0)], {}, {}),
    "scaled by the largest of the batch": (
        [node("ReduceMax", ["h"], ["largest"], axes=[0, 1, 2], keepdims=1), node("Div", ["h", "largest"], ["mixed"])],
        {},
        {},
    ),
    "every sample with every other one": (
        [
            node("ReduceMean", ["h"], ["one"], axes=[1], keepdims=0),
            node("Transpose", ["one"], ["turned"], perm=[1, 0]),
            node("MatMul", ["one", "turned"], ["similar"]),
            node("Identity", ["h"], ["mixed"]),
        ],
        {},
        {"others": [value("similar", ["batch", "batch"])]},
    ),
    "what is large, wherever it is": (
        [
            node("Greater", ["h", "limit"], ["large"]),
            node("NonZero", ["large"], ["places"]),
            node("Identity", ["h"], ["mixed"]),
        ],
        {"limit": np.float32(1)},
        {"others": [value("places", [3, "found"], integers)]},
    ),
    "the same numbers for any input": (
        [node("Identity", ["h"], ["mixed"]), node("Mul", ["grid", "two"], ["anchors"])],
        {"grid": np.ones((1, 4), np.float32), "two": np.float32(2)},
        {"others": [value("anchors", [1, 4])]},
    ),
}


@pytest.mark.parametrize("name", OPEN)
def test_a_batch_that_is_open_stays_open_however_samples_work_together(name, caplog):
    nodes, constants, more = OPEN[name]
    with caplog.at_level(logging.WARNING):
        prepared = prepare(
            network(nodes, more.get("output", ("batch", LENGTH, CLASSES)), more.get("others", ()), **constants)
        )
    assert fixed_batch(prepared.proto) is None
    assert not caplog.text


def test_a_batch_that_the_file_fixes_is_nobodys_mistake(caplog):
    nodes, constants, *_ = BAKED["a constant has the batch of the example, 4"]
    prepared = prepare(network(nodes, (4, LENGTH, CLASSES), batch=4, **constants))
    assert fixed_batch(prepared.proto) == 4
    assert not caplog.text
