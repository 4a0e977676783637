"""Zeros that are drawn where the engine is: the same ones on every machine."""

from __future__ import annotations

import hashlib
import subprocess

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_spdy.runtimes import random_zeros, zero_randomly
from onnx_spdy.runtimes.random_zeros import model_with_zeros, random_words
from onnx_spdy.runtimes.worker.uv_command import find_uv

DIGEST = """
import hashlib, importlib.util, sys
import numpy, onnx
spec = importlib.util.spec_from_file_location("random_zeros", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = module.model_with_zeros(open(sys.argv[2], "rb").read(), {"w0": 0.9, "w1": 0.5, "w2": 0.01}, 5)
weights = [tensor.raw_data for tensor in onnx.load_from_string(model).graph.initializer]
print(numpy.__version__, hashlib.sha256(b"".join(weights)).hexdigest())
"""


def values(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def zeroed(path, zeros, seed=0) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    zero_randomly(model.graph, zeros, seed)
    return values(model.graph)


def test_the_words_of_a_seed_are_these_for_ever():
    assert random_words(0, "w", 5).tolist() == [3665636948, 3356039256, 2986910302, 2515142000, 1043391247]
    assert random_words(2**32, "w", 3).tolist() == random_words(2**32, "w", 8).tolist()[:3]


def test_a_fraction_of_the_named_ones_is_zero_and_the_rest_is_untouched(conv_net):
    before, after = values(onnx.load(conv_net()).graph), zeroed(conv_net(), {"w0": 0.9, "w1": 0.25})
    np.testing.assert_array_equal(after["w2"], before["w2"])
    for name, fraction in (("w0", 0.9), ("w1", 0.25)):
        kept = after[name] != 0
        assert 1 - kept.mean() == pytest.approx(fraction, abs=0.03)
        np.testing.assert_array_equal(after[name][kept], before[name][kept])


def test_a_seed_gives_the_same_zeros_whatever_else_is_zeroed(conv_net):
    one = zeroed(conv_net(), {"w0": 0.5, "w1": 0.5}, seed=3)
    again = zeroed(conv_net(), {"w2": 0.1, "w1": 0.5, "w0": 0.5}, seed=3)
    np.testing.assert_array_equal(one["w0"], again["w0"])
    np.testing.assert_array_equal(one["w1"], again["w1"])
    assert (one["w0"] != zeroed(conv_net(), {"w0": 0.5}, seed=4)["w0"]).any()


def test_none_and_all(conv_net):
    after = zeroed(conv_net(), {"w0": 0, "w1": 1})
    assert (after["w0"] != 0).all()
    assert not after["w1"].any()


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.FLOAT])
def test_every_float_type_and_old_way_of_storing_it(kind):
    tensor = helper.make_tensor("w", kind, [3, 35], np.linspace(1, 2, 105))
    assert not tensor.raw_data
    graph = helper.make_graph([], "g", [], [], [tensor])
    before = values(graph)["w"].astype(np.float64)
    zero_randomly(graph, {"w": 0.5}, 0)
    after = values(graph)["w"].astype(np.float64)
    expected = random_words(0, "w", 105).reshape(3, 35) / 2**32 >= 0.5
    np.testing.assert_array_equal(after, np.where(expected, before, 0))
    assert graph.initializer[0].data_type == kind


def test_what_holds_no_floats_is_refused():
    graph = helper.make_graph([], "g", [], [], [helper.make_tensor("shape", TensorProto.INT64, [2], [1, 2])])
    with pytest.raises(ValueError, match="zeros in 'shape', which is no initializer of the graph that holds floats"):
        zero_randomly(graph, {"shape": 0.5}, 0)


@pytest.mark.engine
def test_the_versions_below_deepsparse_draw_the_same(conv_net, tmp_path):
    script, path = tmp_path / "digest.py", conv_net(opset=17)
    script.write_text(DIGEST)
    uv = find_uv()
    assert uv
    command = [uv, "run", "--quiet", "--no-project", "--python", "3.11", "--with", "numpy==1.26.4", "--with"]
    command += ["onnx==1.14.1", "python", str(script), random_zeros.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"uv can't get numpy 1.26.4 and onnx 1.14.1 here: {done.stderr.strip().splitlines()[-1]}")
    weights = onnx.load_from_string(
        model_with_zeros(path.read_bytes(), {"w0": 0.9, "w1": 0.5, "w2": 0.01}, 5)
    ).graph.initializer
    digest = hashlib.sha256(b"".join(tensor.raw_data for tensor in weights)).hexdigest()
    assert done.stdout.split() == ["1.26.4", digest]
