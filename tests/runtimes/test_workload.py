from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest

from onnx_spdy.runtimes import Workload, physical_cores, resolved


@pytest.mark.parametrize(("arguments", "message"), [((0,), "batch 0"), ((-2,), "batch -2"), ((1, 0), "0 threads")])
def test_impossible_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Workload(*arguments)


def test_threads_are_the_physical_cores_by_default():
    assert Workload(1).threads_or_cores == physical_cores()
    assert Workload(1, 3).threads_or_cores == 3


def test_the_digest_is_of_names_types_and_shapes_not_of_values():
    images = np.zeros((2, 3, 4), np.float32)
    one = Workload(2, inputs={"x": images})
    assert one.digest == hashlib.sha256(b"x float32[2, 3, 4]").hexdigest()
    assert Workload(2, 1, {"x": images + 1}).digest == one.digest
    others = [{"x": images[:, :2]}, {"y": images}, {"x": images.astype(np.float64)}, {"x": images, "y": images}, None]
    assert len({one.digest, *(Workload(2, inputs=other).digest for other in others)}) == 6
    assert Workload(2).digest == "random"


def test_random_inputs_and_samples_of_these_shapes_are_one_workload(conv_net):
    graph = onnx.load(conv_net()).graph
    before = graph.SerializeToString()
    random = resolved(graph, Workload(4))
    few = resolved(graph, Workload(4, inputs={"x": np.ones((1, 8, 12, 12), np.float32)}))
    assert random.digest == few.digest == Workload(4, inputs={"x": np.ones((4, 8, 12, 12), np.float32)}).digest
    assert random.digest != resolved(graph, Workload(3)).digest
    np.testing.assert_array_equal(few.inputs["x"], np.ones((4, 8, 12, 12)))
    assert graph.SerializeToString() == before
