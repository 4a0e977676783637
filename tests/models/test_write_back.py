"""Only the weights that were given change, bit for bit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_spdy.models import ModelError, changed_initializers, differences, load_model, write_weights


def array(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def test_only_the_given_weights_change(small_cnn):
    before = small_cnn.SerializeToString()
    pruned = array(small_cnn, "conv1.weight").copy()
    pruned[np.abs(pruned) < 0.5] = 0
    written = write_weights(small_cnn, {"conv1.weight": pruned})
    assert small_cnn.SerializeToString() == before
    assert array(written, "conv1.weight").tobytes() == pruned.tobytes()
    assert np.count_nonzero(array(written, "conv1.weight")) == np.count_nonzero(pruned)
    assert changed_initializers(small_cnn, written) == ["conv1.weight"]
    assert differences(small_cnn, written) == []
    # The file differs in the bytes of this one tensor only.
    assert before.replace(array(small_cnn, "conv1.weight").tobytes(), pruned.tobytes()) == written.SerializeToString()


def test_writing_the_same_values_changes_no_byte(small_cnn):
    same = {tensor.name: numpy_helper.to_array(tensor) for tensor in small_cnn.graph.initializer}
    assert write_weights(small_cnn, same).SerializeToString() == small_cnn.SerializeToString()


def test_values_kept_in_typed_fields_are_replaced_too(small_cnn):
    tensor = next(tensor for tensor in small_cnn.graph.initializer if tensor.name == "fc.bias")
    tensor.CopyFrom(helper.make_tensor("fc.bias", tensor.data_type, [20], [1.0] * 20))
    written = write_weights(small_cnn, {"fc.bias": np.zeros(20)})
    assert array(written, "fc.bias").tolist() == [0.0] * 20
    assert differences(small_cnn, written) == []
    assert changed_initializers(small_cnn, written) == ["fc.bias"]


def test_values_are_stored_in_the_type_of_the_initializer(small_cnn):
    tensor = next(tensor for tensor in small_cnn.graph.initializer if tensor.name == "fc.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.ones(20, np.float16), "fc.bias"))
    written = write_weights(small_cnn, {"fc.bias": np.full(20, 0.1)})
    assert array(written, "fc.bias").dtype == np.float16
    with pytest.raises(ModelError, match=r"fc\.bias.*infinite as float16"):
        write_weights(small_cnn, {"fc.bias": np.full(20, 1e6)})


def test_a_transposed_view_is_written_in_the_right_order(small_cnn):
    values = np.arange(320, dtype=np.float32).reshape(16, 20).T
    assert array(write_weights(small_cnn, {"fc.weight": values}), "fc.weight").tolist() == values.tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nothing": np.zeros(1)}, "no initializer 'nothing'"),
        ({"fc.bias": np.zeros(19)}, r"'fc.bias' has shape \(20,\), the new values \(19,\)"),
        ({"fc.bias": np.full(20, np.nan)}, "'fc.bias' are NaN"),
    ],
)
def test_wrong_weights_are_refused(small_cnn, weights, message):
    with pytest.raises(ModelError, match=message):
        write_weights(small_cnn, weights)


def test_a_lost_negative_zero_is_a_change(small_cnn):
    zeros = write_weights(small_cnn, {"fc.bias": np.zeros(20, np.float32)})
    assert changed_initializers(zeros, write_weights(zeros, {"fc.bias": -np.zeros(20, np.float32)})) == ["fc.bias"]


def rename_node(model):
    model.graph.node[1].name = "other"


def change_attribute(model):
    model.graph.node[0].attribute[0].ints[0] = 2


def swap_nodes(model):
    first, second = (onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node[:2])
    model.graph.node[0].CopyFrom(second)
    model.graph.node[1].CopyFrom(first)


def reshape_initializer(model):
    model.graph.initializer[3].dims[:] = [16, 20]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (rename_node, "node 'relu1' is missing"),
        (change_attribute, "node 'conv1' differs"),
        (swap_nodes, "nodes are in another order"),
        (reshape_initializer, "initializer 'fc.weight' differs"),
        (lambda model: model.metadata_props.add(key="a", value="b"), "metadata: [] became [('a', 'b')]"),
        (lambda model: setattr(model.opset_import[0], "version", 19), "opset: [('', 18)] became [('', 19)]"),
        (lambda model: setattr(model.graph.output[0], "name", "o"), "output 'o' is new"),
        (lambda model: model.graph.initializer.pop(), "initializer 'fc.bias' is missing"),
        (lambda model: setattr(model, "producer_name", "me"), "producer_name: '' became 'me'"),
    ],
)
def test_every_other_difference_is_named(small_cnn, change, sentence):
    other = onnx.ModelProto()
    other.CopyFrom(small_cnn)
    change(other)
    assert sentence in differences(small_cnn, other)


def test_a_real_network_differs_in_one_tensor_only(real_file):
    model = load_model(real_file("resnet20_cifar10.onnx"))
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(tensor).copy()
    values[::2] = 0
    written = write_weights(model, {tensor.name: values})
    expected = model.SerializeToString().replace(tensor.raw_data, values.tobytes())
    assert written.SerializeToString() == expected
