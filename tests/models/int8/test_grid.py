"""Grids of 8 bits, against what ONNX's reference implementation makes of them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnx_spdy.models.int8.grid import Grid, grid_between
from onnx_spdy.models.int8.nearest import LARGEST, nearest

FLOATS = st.floats(-1e6, 1e6, width=32)


def there_and_back(values: np.ndarray, grid: Grid) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear as ONNX defines them."""
    axis = {} if grid.axis is None else {"axis": grid.axis}
    names = ["scale", "zero"]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", *names], ["q"], **axis),
            helper.make_node("DequantizeLinear", ["q", *names], ["y"], **axis),
        ],
        "grid",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)],
        [numpy_helper.from_array(grid.scale, "scale"), numpy_helper.from_array(np.asarray(grid.zeros), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, {"x": values})[0]


@given(FLOATS, FLOATS, st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_what_lies_between_is_off_by_half_a_step_and_zero_by_nothing(
    one: float, other: float, signed: bool, symmetric: bool
) -> None:
    low, high = sorted((one, other))
    if symmetric and not signed:
        low, high = abs(low), abs(high)  # that is for what is never negative
        low, high = min(low, high), max(low, high)
    grid = grid_between(np.asarray(low), np.asarray(high), signed=signed, symmetric=symmetric)
    assert grid.bounds[0] <= grid.zero <= grid.bounds[1]
    assert grid.dtype == (np.int8 if signed else np.uint8)
    assert not symmetric or grid.zero == 0
    values = np.array([0.0, low, high, *np.linspace(low, high, 50)], np.float32)
    found = there_and_back(values, grid)
    assert found[0] == 0
    # An end may lie half a step outside, because 0 lies on the grid.
    assert np.abs(found - values).max() <= (0.5 if symmetric else 1.0) * float(grid.scale) * (1 + 1e-3)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_and_empty_ranges_have_a_grid(signed: bool, symmetric: bool, value: float) -> None:
    if symmetric and not signed and value < 0:
        pytest.skip("that is for what is never negative")
    grid = grid_between(np.asarray(value), np.asarray(value), signed=signed, symmetric=symmetric)
    assert float(grid.scale) > 0
    values = np.array([value, 0.0], np.float32)
    np.testing.assert_allclose(there_and_back(values, grid), values, rtol=1e-6)


def test_an_asymmetric_grid_is_finer_where_values_lie_on_one_side() -> None:
    plain = grid_between(np.asarray(-2.0), np.asarray(8.0), signed=True, symmetric=True)
    own = grid_between(np.asarray(-2.0), np.asarray(8.0), signed=False, symmetric=False)
    assert (plain.zero, own.zero) == (0, 51)
    assert float(own.scale) == pytest.approx(10 / 255)
    assert float(plain.scale) == pytest.approx(8 / 127)


def test_channels_have_scales_of_their_own() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32) * np.array([[[1], [10], [0]]], "f")
    grid = grid_between(values.min((0, 2)), values.max((0, 2)), signed=True, symmetric=True, axis=1)
    assert grid.scale.shape == grid.zeros.shape == (3,)
    error = np.abs(there_and_back(values, grid) - values).max((0, 2))
    assert (error <= grid.scale / 2 * (1 + 1e-5)).all()
    assert error[0] < 0.2 * error[1]
    assert error[2] == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_rounded_to_the_nearest_step_of_their_channel(axis: int) -> None:
    values = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    values[2], values[:, 3], values[0, 0] = 0, 0, 0
    found = nearest(values, axis)
    assert found.values.dtype == np.int8
    assert found.scale.shape == (values.shape[axis],)
    assert np.abs(found.values).max() == LARGEST
    scale = np.expand_dims(found.scale, 1 - axis)
    assert (np.abs(found.values * scale - values) <= scale / 2 * (1 + 1e-5)).all()
    assert (found.values[values == 0] == 0).all()
    largest = np.abs(found.values).max(1 - axis)
    assert set(largest) == {0, LARGEST}  # every channel that has weights uses all of its grid
