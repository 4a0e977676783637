"""Every rule of the groups against the operator tests that the `onnx` package ships.

Each input of a case, on each of its axes in turn, is what a layer makes, and another layer takes in all that comes out;
the case's other inputs are stored. If the groups say that units can go, the narrower graph must run and compute what
the masked one does. A rule that lets pass what an operator mixes, or that misses a size, fails here.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

from onnx_spdy.models import find_groups, masked, narrowed
from onnx_spdy.models.groups.rules import RULES
from tests.models.narrowing import TOLERANCE, outputs_of, random_inputs, random_keep


@pytest.fixture(scope="module")
def cases() -> dict[str, list]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the suite overflows and divides by zero on purpose
        found = load_model_tests(kind="node")
    if found[0].model is None:
        pytest.skip("this onnx has the cases of its operators in files")
    by_operator = defaultdict(list)
    for case in found:
        if len(case.model.graph.node) == 1:
            by_operator[case.model.graph.node[0].op_type].append(case)
    return by_operator


def surrounded(case, position: int, axis: int) -> Iterator[onnx.ModelProto]:
    """x -> MatMul along an axis -> the case's node -> MatMul of all values; nothing where that can't be."""
    model, values = onnx.ModelProto(), list(case.data_sets[0][0])
    model.CopyFrom(case.model)
    given, output = model.graph.input[position], model.graph.output[0]
    value = values[position]
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim < 2 or value.shape[axis] < 2:
        return
    if output.type.tensor_type.elem_type != TensorProto.FLOAT:
        return
    rng = np.random.default_rng(position + axis)
    order = [*(k for k in range(value.ndim) if k != axis), axis]
    tensors = {
        "first.weight": rng.uniform(0.1, 1, (3, value.shape[axis])).astype(np.float32),
        "all": np.array([1, -1]),
        "last.weight": rng.standard_normal((np.asarray(case.data_sets[0][1][0]).size, 2)).astype(np.float32),
    }
    for k, (info, stored) in enumerate(zip(model.graph.input, values, strict=True)):
        if k != position and isinstance(stored, np.ndarray):
            tensors[info.name] = stored
    shape = [*(value.shape[k] for k in order[:-1]), 3]
    nodes = [
        helper.make_node("MatMul", ["made from", "first.weight"], ["wide"], "first"),
        helper.make_node("Transpose", ["wide"], [given.name], "back", perm=np.argsort(order).tolist()),
        *model.graph.node,
        helper.make_node("Reshape", [output.name, "all"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "last.weight"], ["result"], "last"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("made from", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=model.opset_import, ir_version=10)
    try:
        onnx.checker.check_model(made)
        (result,) = outputs_of(made, positive_inputs(made))
    except Exception:  # a case that ONNX Runtime doesn't run, for whatever reason
        return
    if np.isfinite(result).all():  # 0 times infinity would not be 0
        yield made


@pytest.mark.parametrize("operator", sorted(RULES))
def test_the_rest_computes_the_same_without_units_that_can_go(operator: str, cases: dict[str, list]) -> None:
    tried = 0
    for case in cases[operator]:
        for position, value in enumerate(case.data_sets[0][0]):
            for axis in range(np.ndim(value)):
                for model in surrounded(case, position, axis):
                    groups = [group for group in find_groups(model) if "first" in group.producers]
                    keep = random_keep(groups, seed=axis)
                    tried += bool(keep)
                    if keep:
                        compare(model, keep, f"{case.name}, input {position}, axis {axis}")
    if not tried:
        pytest.skip("no case with a matrix of numbers in and out, and units that can go, that this ONNX Runtime runs")


def positive_inputs(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """So that logarithms and roots are numbers."""
    return {name: np.abs(values) + np.float32(0.1) for name, values in random_inputs(model).items()}


def compare(model: onnx.ModelProto, keep: dict[str, list[int]], what: str) -> None:
    (actual,), (expected,) = (outputs_of(make(model, keep), positive_inputs(model)) for make in (narrowed, masked))
    largest = max(np.abs(expected).max(), 1e-6)
    assert np.allclose(actual, expected, atol=TOLERANCE * largest, rtol=0), what
