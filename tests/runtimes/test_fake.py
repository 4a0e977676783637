from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnx_spdy.runtimes import Workload, open_runtime

CONSTANTS = {"layer_overhead_seconds": 1e-3, "seconds_per_mac": 1e-8, "node_seconds": 1e-4, "break_even": 0.4}
# By hand, a sample: outputs 12 * 12 * 16 of columns 8 * 9; 10 * 10 * 24 of 16 * 9; 10 of 24.
MACS = {"a": 165_888, "c": 345_600, "y": 240}


def rows(path, batch=1, **options):
    with open_runtime("fake", **{**CONSTANTS, **options}) as runtime:
        return runtime.layer_seconds(path, Workload(batch), iterations=1, warmup=0)


@pytest.mark.parametrize("batch", [1, 5])
def test_dense_times_are_the_formula(conv_net, batch):
    times = {row.outputs[0]: row.seconds for row in rows(conv_net(), batch)}
    layers = {name: 1e-3 + 1e-8 * batch * macs for name, macs in MACS.items()}
    assert times == pytest.approx(layers | {"b": 1e-4, "d": 1e-4, "e": 1e-4})


def test_sparsity_below_the_break_even_gains_nothing(conv_net):
    dense, half = rows(conv_net()), rows(conv_net(sparsity=0.39))
    assert [row.seconds for row in half] == [row.seconds for row in dense]
    assert not any(row.sparse for row in half)


def test_sparsity_above_the_break_even_skips_the_zeros(conv_net):
    row = next(row for row in rows(conv_net(sparsity=0.9)) if row.outputs == ("a",))
    assert row.sparse
    assert row.kernel_sparsity == pytest.approx(0.9, abs=1e-3)
    assert row.seconds == pytest.approx(1e-3 + 1e-8 * MACS["a"] * (1 - row.kernel_sparsity) / 0.6)


def test_a_session_takes_the_sum_of_the_rows(conv_net):
    path = conv_net(sparsity=0.8)
    with open_runtime("fake", **CONSTANTS) as runtime, runtime.open(path, Workload(2)) as session:
        assert session.seconds(2) == pytest.approx([sum(row.seconds for row in rows(path, 2))] * 2)
        assert session.environment.precision == "formula"


def test_noise_is_seeded(conv_net):
    path = conv_net()

    def times(seed):
        with open_runtime("fake", noise=0.1, seed=seed) as runtime, runtime.open(path, Workload(1)) as session:
            return session.seconds(3, warmup=1) + [row.seconds for row in rows(path, noise=0.1, seed=seed)]

    assert times(1) == times(1)
    assert times(1) != times(2)
    assert len(set(times(1)[:3])) == 3


def test_an_impossible_break_even_is_refused():
    with pytest.raises(ValueError, match=r"break_even 1.0"):
        open_runtime("fake", break_even=1.0)


def test_a_layer_whose_weight_is_stored_in_int8_takes_a_third_for_its_multiplications(conv_net, tmp_path):
    model = onnx.load(conv_net())
    node = next(node for node in model.graph.node if node.output[0] == "c")
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    integers = np.clip(np.round(numpy_helper.to_array(stored) * 100), -127, 127).astype(np.int8)
    stored.CopyFrom(numpy_helper.from_array(integers, stored.name))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.01), "step"))
    position = list(model.graph.node).index(node)
    back = onnx.helper.make_node("DequantizeLinear", [stored.name, "step"], ["back"])
    node.input[1] = "back"
    model.graph.node.insert(position, back)
    onnx.save(model, tmp_path / "int8.onnx")
    expected = rows(conv_net())
    (third,) = (row for row in expected if row.outputs == ("c",))
    expected[expected.index(third)] = replace(third, seconds=1e-3 + 1e-8 * MACS["c"] / 3)
    found = rows(tmp_path / "int8.onnx")
    assert [(row.outputs, row.kernel) for row in found] == [(row.outputs, row.kernel) for row in expected]
    assert [row.seconds for row in found] == pytest.approx([row.seconds for row in expected])
