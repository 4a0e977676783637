"""Ranges of activations, against what ONNX Runtime computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnx_spdy.models import Prepared
from onnx_spdy.models.int8.form import FORMS
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.ranges import RANGES, TAIL, RangeError, Seen, extremes, grids, observe
from tests.models.int8.writing import all_values
from tests.models.narrowing import network as network_of

TENSORS = ("input", "a", "ra", "pooled", "output")


def seen_of(network: Network, samples: Samples, by_channel: tuple[str, ...] = ()) -> dict[str, Seen]:
    return observe(network, {*TENSORS, *by_channel}, by_channel, samples, np.random.default_rng(0))


@pytest.mark.parametrize("count", [96, 40, 1])
def test_ranges_are_those_of_onnx_runtime(network: Network, samples: Samples, count: int) -> None:
    some = samples.take(slice(0, count))
    seen, values = seen_of(network, some), all_values(network.model, some.inputs)
    assert set(seen) == set(TENSORS)
    for name, one in seen.items():
        scale = np.abs(values[name]).max()
        np.testing.assert_allclose((one.low, one.high), (values[name].min(), values[name].max()), atol=1e-5 * scale)
        rows = values[name].reshape(count, -1)
        np.testing.assert_allclose(one.lows, rows.min(1), atol=1e-5 * scale)
        np.testing.assert_allclose(one.highs, rows.max(1), atol=1e-5 * scale)
        drawn = np.concatenate(one.values)
        assert drawn.min() >= one.low and drawn.max() <= one.high


def test_a_range_of_each_channel(network: Network, samples: Samples) -> None:
    one = seen_of(network, samples, ("b",))["b"]
    values = all_values(network.model, samples.inputs)["b"]
    assert one.low.shape == one.high.shape == (24,)
    np.testing.assert_allclose(one.low, values.min((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(one.high, values.max((0, 2, 3)), atol=1e-4)
    for method in RANGES.values():  # which are for tensors with one scale
        np.testing.assert_array_equal(method(one), (one.low, one.high))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_no_number_is_told_with_the_tensor(network: Network, samples: Samples, value: float) -> None:
    samples.inputs["input"][90, 1, 2, 3] = value
    with pytest.raises(RangeError, match=r"^tensor 'input' is NaN or infinite for some calibration sample"):
        seen_of(network, samples)


def test_an_overflow_inside_is_told_with_the_tensor() -> None:
    model = network_of(
        "g (float[n, 16] x) => (float[n, 16] y) <float[16, 16] w> { [e] e = Exp (x) [y] y = MatMul (e, w) }"
    )
    samples = Samples({"x": np.full((4, 16), 1000, np.float32)})
    with pytest.raises(RangeError, match=r"^tensor 'e' is NaN or infinite"):
        observe(Network(Prepared(model)), {"x", "e"}, (), samples, np.random.default_rng(0))


def test_a_tensor_without_a_value_has_a_range_all_the_same() -> None:
    """As the state of a language model has before its first word."""
    model = network_of("""
    g (float[n, 4, 16] x, float[n, p, 16] past) => (float[n, s, 16] y) <float[16, 16] w>
    { [a] a = MatMul (x, w) [both] y = Concat <axis = 1> (past, a) }""")
    samples = Samples({"x": np.ones((4, 4, 16), np.float32), "past": np.zeros((4, 0, 16), np.float32)})
    seen = observe(Network(Prepared(model)), {"past", "a"}, (), samples, np.random.default_rng(0))
    assert (seen["past"].low, seen["past"].high) == (0, 0)
    for form in FORMS.values():
        for method in RANGES.values():
            assert float(grids(seen, form, method)["past"].scale) > 0


def heavy_tailed() -> Seen:
    rng = np.random.default_rng(0)
    rows = rng.standard_t(3, (64, 4000)).astype(np.float32)
    low, high = rows.min(), rows.max()
    return Seen(np.asarray(low), np.asarray(high), [*rows.min(1)], [*rows.max(1)], [rows.ravel()])


def squared_error(seen: Seen, name: str) -> float:
    grid = grids({"x": seen}, FORMS["openvino"], RANGES[name])["x"]
    values = np.concatenate(seen.values).astype(np.float64)
    scale, (least, most) = float(grid.scale), grid.bounds
    back = (np.clip(np.round(values / scale) + grid.zero, least, most) - grid.zero) * scale
    return float(np.square(back - values).sum())


def test_narrow_ranges_lie_within_wide_ones_and_least_squares_has_the_least_error() -> None:
    seen = heavy_tailed()
    low, high = extremes(seen)
    for method in RANGES.values():
        own = method(seen)
        assert low <= own[0] < 0 < own[1] <= high
    errors = {name: squared_error(seen, name) for name in RANGES}
    assert errors["least squares"] <= 1.02 * min(errors.values())
    assert errors["least squares"] < 0.8 * errors["extremes"]
    np.testing.assert_allclose(RANGES["usual extremes"](seen), (np.mean(seen.lows), np.mean(seen.highs)))
    values, (least, most) = np.concatenate(seen.values), RANGES["percentiles"](seen)
    assert np.mean((values < least) | (values > most)) == pytest.approx(TAIL, rel=0.2)


def test_every_form_gets_the_zero_points_that_it_wants() -> None:
    def seen(low: float, high: float) -> Seen:
        values = np.linspace(low, high, 100).astype(np.float32)
        return Seen(np.asarray(values.min()), np.asarray(values.max()), [low], [high], [values])

    shapes = {"positive": seen(0, 6), "level": seen(-5, 6), "lopsided": seen(-1, 6), "negative": seen(-6, -1)}

    def found(form: str) -> dict[str, tuple[bool, bool]]:
        """Whether it is signed, and whether its zero point is 0."""
        return {name: (one.signed, one.zero == 0) for name, one in grids(shapes, FORMS[form], extremes).items()}

    assert found("tensorrt") == dict.fromkeys(shapes, (True, True))
    assert found("openvino") == {
        "positive": (False, True), "level": (True, True), "lopsided": (False, False), "negative": (False, False),
    }  # fmt: skip
    assert found("onnxruntime") == {
        "positive": (False, True), "level": (False, False), "lopsided": (False, False), "negative": (False, False),
    }  # fmt: skip


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_a_tensor_that_is_always_the_same_has_a_grid_that_holds_it(value: float) -> None:
    one = Seen(np.asarray(value), np.asarray(value), [value] * 3, [value] * 3, [np.full(50, value, np.float32)])
    for form in FORMS.values():
        for method in RANGES.values():
            grid = grids({"x": one}, form, method)["x"]
            steps = np.clip(np.round(value / float(grid.scale)) + grid.zero, *grid.bounds)
            assert (steps - grid.zero) * float(grid.scale) == pytest.approx(value, rel=1e-5)


def test_hooks_are_gone_afterwards(network: Network, samples: Samples) -> None:
    model = onnx.ModelProto.FromString(network.model.SerializeToString())
    seen = seen_of(network, samples.take(slice(0, 8)))
    before = list(seen["a"].lows)
    network.run(samples)
    assert seen["a"].lows == before
    assert network.model == model
