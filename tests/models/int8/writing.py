"""What the tests of networks in int8 share: a network written with the ranges that are seen on a batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.grid import Grid, grid_between
from onnx_spdy.models.int8.nearest import nearest
from onnx_spdy.models.int8.place import Placement, find_placement
from onnx_spdy.models.int8.write import Integers, write_int8


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
    model: onnx.ModelProto, form: Form, inputs: Mapping[str, np.ndarray]
) -> tuple[onnx.ModelProto, Placement, Integers]:
    """The network in int8: whole ranges, weights rounded to the nearest."""
    placement, values = find_placement(model, form), all_values(model, inputs)
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
