"""What the tests of networks in int8 share: a network written with the ranges that are seen on a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.grid import Grid, grid_between
from onnx_spdy.models.int8.nearest import nearest
from onnx_spdy.models.int8.place import Placement, find_placement
from onnx_spdy.models.int8.write import Integers, write_int8


def residual() -> onnx.ModelProto:
    """Two residual blocks of two convolutions between two others; behind the first one a pool."""
    rng = np.random.default_rng(0)
    stored = [
        numpy_helper.from_array(rng.normal(size=(4, 4, 1, 1)).astype(np.float32), f"w{number}") for number in range(6)
    ]

    def conv(number: int, before: str) -> onnx.NodeProto:
        return helper.make_node("Conv", [before, f"w{number}"], [f"c{number}"], f"conv{number}")

    nodes = [conv(0, "input"), helper.make_node("Relu", ["c0"], ["r0"], "relu0")]
    nodes.append(helper.make_node("MaxPool", ["r0"], ["p0"], "pool0", kernel_shape=[2, 2]))
    before = "p0"
    for block in (1, 2):
        first, second = 2 * block - 1, 2 * block
        nodes += [
            conv(first, before),
            helper.make_node("Relu", [f"c{first}"], [f"r{first}"], f"relu{first}"),
            conv(second, f"r{first}"),
            helper.make_node("Add", [f"c{second}", before], [f"a{block}"], f"add{block}"),
        ]
        before = f"a{block}"
    nodes.append(conv(5, before))
    sizes = {"input": 9, "c5": 8}
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, size, size]) for name, size in sizes.items()
    ]
    graph = helper.make_graph(nodes, "residual", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def all_values(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every tensor that the graph makes or is given, by ONNX Runtime with nothing optimised."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    known = {value.name for value in told.graph.output}
    made = [name for node in told.graph.node for name in node.output if name and name not in known]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    session = plain_session(told)
    names = [value.name for value in session.get_outputs()]
    return {**inputs, **dict(zip(names, session.run(None, dict(inputs)), strict=True))}


def plain_session(model: onnx.ModelProto, optimised: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def written(
    model: onnx.ModelProto, form: Form, inputs: Mapping[str, np.ndarray], layers: Collection[str] | None = None
) -> tuple[onnx.ModelProto, Placement, Integers]:
    """The network in int8: whole ranges, weights rounded to the nearest."""
    placement, values = find_placement(model, form, layers), all_values(model, inputs)
    grids: dict[str, Grid] = {}
    for name in placement.points:
        by_channel = form.per_channel and name in placement.depthwise
        axes = tuple(axis for axis in range(values[name].ndim) if axis != 1) if by_channel else None
        low, high = values[name].min(axes), values[name].max(axes)
        signed = not form.unsigned or bool(np.min(low) < 0)
        grids[name] = grid_between(low, high, signed=signed, symmetric=True, axis=1 if by_channel else None)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {one.name: nearest(stored[one.name], one.axis) for one in placement.weights}
    integers = Integers(grids, weights, form.int32_bias)
    return write_int8(model, placement, integers), placement, integers
