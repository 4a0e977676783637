from __future__ import annotations

import pytest
from onnx import TensorProto, helper

from onnx_spdy.runtimes.batch_axes import batch_axes, fixed_batch, mark_batch_axes


def inputs(**shapes):
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("shapes", "axes", "batch"),
    [
        ({"image": ["batch", 3, 8, 8]}, {"image": 0}, None),
        ({"image": [None, 3, None, None]}, {"image": 0}, None),
        ({"image": [4, 3, 8, 8]}, {"image": 0}, 4),
        ({"image": [1, 3, "height", "width"]}, {"image": 0}, 1),
        ({"image": ["N", 3, 8, 8], "scale": []}, {"image": 0, "scale": None}, None),
        ({"rate": [1], "audio": [8, 512]}, {"rate": None, "audio": 0}, 8),
        ({"image": [8, 3, 8, 8], "size": [8, 2]}, {"image": 0, "size": 0}, 8),
        ({"image": ["batch", 3, 8, 8], "size": [1, 2]}, {"image": 0, "size": None}, None),
        ({"x": ["unk_1", 64], "mask": ["unk_2", 64]}, {"x": 0, "mask": 0}, None),
        ({"ids": ["batch", "length"], "positions": ["length"]}, {"ids": 0, "positions": None}, None),
        ({"positions": ["length"], "ids": [2, "length"]}, {"positions": None, "ids": 0}, 2),
        ({"audio": ["batch", 512], "state": [2, "batch", 64]}, {"audio": 0, "state": 1}, None),
        ({"state": [2, "batch", 64]}, {"state": 1}, None),
        ({"audio": [1, 512], "state": [2, 1, 64]}, {"audio": 0, "state": None}, 1),
        ({"speech": ["time", "batch", 80]}, {"speech": 1}, None),
        ({"speech": ["time", "N", 80], "lengths": ["N"]}, {"speech": 1, "lengths": 0}, None),
        ({"points": ["batch", "n", 3]}, {"points": 0}, None),
        ({"scale": []}, {"scale": None}, None),
    ],
)
def test_names_and_sizes_tell_on_which_axis_samples_lie(shapes, axes, batch):
    assert batch_axes(inputs(**shapes)) == axes
    assert fixed_batch(inputs(**shapes)) == batch


def test_a_mark_tells_where_names_and_sizes_cannot():
    values = inputs(speech=[5, None, 80], scale=[1])
    mark_batch_axes(values, {"speech": 1, "scale": None})
    assert batch_axes(values) == {"speech": 1, "scale": None}
    assert fixed_batch(values) is None
    plain = inputs(image=["batch", 3, 8, 8])
    mark_batch_axes(plain, {"image": 0})
    assert plain == inputs(image=["batch", 3, 8, 8])
