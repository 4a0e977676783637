"""Reading, writing, hashing models; inputs, batch, names."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_spdy.models import (
    ModelError,
    graph,
    input_dtypes,
    input_shapes,
    load_model,
    model_sha256,
    node_names,
    save_model,
)


def refused(path, *words: str) -> None:
    """load_model refuses the file with one line that names it and holds the words."""
    with pytest.raises(ModelError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message


def weight(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def test_a_saved_model_is_read_back_byte_for_byte(small_cnn, tmp_path):
    save_model(small_cnn, tmp_path / "model.onnx")
    assert load_model(tmp_path / "model.onnx").SerializeToString() == small_cnn.SerializeToString()
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_large_model_has_its_weights_in_a_second_file(small_cnn, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "LARGEST_PROTOBUF_BYTES", 2000)
    monkeypatch.setattr(graph, "LARGE_TENSOR_BYTES", 100)
    before = small_cnn.SerializeToString()
    save_model(small_cnn, tmp_path / "model.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "model.onnx").stat().st_size < 2000
    assert small_cnn.SerializeToString() == before
    assert load_model(tmp_path / "model.onnx").SerializeToString() == before
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_the_hash_depends_on_content_not_on_storage(small_cnn, tmp_path, monkeypatch):
    expected = model_sha256(small_cnn)
    monkeypatch.setattr(graph, "LARGEST_PROTOBUF_BYTES", 2000)
    save_model(small_cnn, tmp_path / "model.onnx")
    assert model_sha256(load_model(tmp_path / "model.onnx")) == expected
    tensor = weight(small_cnn, "conv1.weight")
    tensor.raw_data = tensor.raw_data[:-1] + bytes([tensor.raw_data[-1] ^ 1])
    assert model_sha256(small_cnn) != expected


def test_a_failed_write_leaves_the_old_file(small_cnn, tmp_path, monkeypatch):
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(ModelError, match="No space left"):
        save_model(small_cnn, target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_saving_into_a_missing_folder_is_an_error(small_cnn, tmp_path):
    with pytest.raises(ModelError, match="cannot write"):
        save_model(small_cnn, tmp_path / "missing" / "model.onnx")


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "no.onnx", "no such")
    refused(tmp_path, "no such")


@pytest.mark.parametrize("content", [b"", b"this is no model\n" * 20, bytes(range(256)) * 8, b"\x80\x02}q\x00."])
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(small_cnn, tmp_path, part):
    path = tmp_path / "cut.onnx"
    data = small_cnn.SerializeToString()
    path.write_bytes(data[: int(len(data) * part)])
    refused(path)


def test_an_invalid_graph_is_refused(small_cnn, tmp_path):
    small_cnn.graph.node[1].input[0] = "nowhere"
    path = tmp_path / "model.onnx"
    path.write_bytes(small_cnn.SerializeToString())
    refused(path, "nowhere")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_weights_that_are_no_numbers_are_refused(build, tmp_path, value, dtype):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    array = np.ones((4, 4), dtype)
    array[1, 2] = value
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = build(nodes, {"x": (kind, [1, 4])}, {"y": (kind, [1, 4])}, {"w": array})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    refused(path, "'w'", "1 of 16")


@pytest.mark.parametrize(("value", "sound"), [(3e38, False), (-2e19, False), (1e19, True), (1e-42, True)])
def test_weights_whose_squares_overflow_are_refused_by_the_name_of_their_layer(build, tmp_path, value, sound):
    weight = np.ones((4, 4), np.float32)
    weight[1, 2] = value
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "projection"), helper.make_node("Add", ["m", "b"], ["y"])]
    model = build(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"w": weight, "b": np.full(4, 3e38, np.float32)})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    if sound:
        assert load_model(path) == model
    else:
        refused(path, "layer 'projection'", f"{abs(value):.1e}", "'w'")


@pytest.mark.parametrize("role", ["input", "output"])
def test_sequences_at_the_ends_are_refused(small_cnn, tmp_path, role):
    parts = helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, [1])
    getattr(small_cnn.graph, role).append(parts)
    if role == "output":
        small_cnn.graph.node.append(helper.make_node("SequenceConstruct", ["logits"], ["parts"]))
    path = tmp_path / "model.onnx"
    path.write_bytes(small_cnn.SerializeToString())
    refused(path, f"{role} 'parts'", "a sequence")


def test_an_infinite_mask_is_accepted(build, tmp_path):
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    model = build([helper.make_node("Add", ["x", "mask"], ["y"])], {"x": [4, 4]}, {"y": [4, 4]}, {"mask": mask})
    save_model(model, tmp_path / "model.onnx")
    assert load_model(tmp_path / "model.onnx") == model


@pytest.fixture
def external(small_cnn, tmp_path):
    """A function that writes the CNN with `fc.weight` at a given place."""
    folder = tmp_path / "inside"
    folder.mkdir()

    def write(location: str, **entries: str):
        tensor = weight(small_cnn, "fc.weight")
        data = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=value)
        (folder / "model.onnx").write_bytes(small_cnn.SerializeToString())
        return folder / "model.onnx", data

    return write


def test_external_data_in_the_folder_is_read(external):
    path, data = external("weights.bin", offset="16")
    (path.parent / "weights.bin").write_bytes(b"0" * 16 + data)
    loaded = weight(load_model(path), "fc.weight")
    assert loaded.raw_data == data and not loaded.HasField("data_location") and not loaded.external_data


def test_external_data_outside_the_folder_is_refused(external):
    path, data = external("../weights.bin")
    (path.parent.parent / "weights.bin").write_bytes(data)
    refused(path, "../weights.bin", "outside")


def test_an_absolute_path_to_external_data_is_refused(external, tmp_path):
    path, data = external(str(tmp_path / "weights.bin"))
    (tmp_path / "weights.bin").write_bytes(data)
    refused(path, "outside")


def test_a_link_that_leads_outside_is_refused(external, tmp_path):
    path, data = external("weights.bin")
    (tmp_path / "weights.bin").write_bytes(data)
    (path.parent / "weights.bin").symlink_to(tmp_path / "weights.bin")
    refused(path, "outside")


def test_missing_external_data_is_refused(external):
    refused(external("weights.bin")[0], "weights.bin", "missing")


def test_external_data_that_is_cut_off_is_refused(external):
    path, data = external("weights.bin", length="1280")
    (path.parent / "weights.bin").write_bytes(data[:-4])
    refused(path, "weights.bin", "cut off")


def test_inputs_are_those_that_a_caller_gives(small_cnn):
    tensor = weight(small_cnn, "fc.bias")
    small_cnn.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert input_shapes(small_cnn) == {"input": (None, 3, 8, 8)}
    assert input_dtypes(small_cnn) == {"input": np.dtype(np.float32)}


def test_node_names_are_unique_and_do_not_depend_on_position(small_cnn):
    nodes = small_cnn.graph.node
    for node, name in zip(nodes, ["a", "", "a", "a_2", "", "Relu_r1"], strict=True):
        node.name = name
    names = node_names(small_cnn.graph)
    assert names == ["a", "Relu_r1_2", "a_3", "a_2", "Flatten_f", "Relu_r1"]
    del nodes[0]
    assert node_names(small_cnn.graph)[3] == "Flatten_f"


def test_bfloat16_weights_are_read(build, tmp_path):
    import ml_dtypes

    array = np.ones((4, 4), ml_dtypes.bfloat16)
    kind = TensorProto.BFLOAT16
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = build(nodes, {"x": (kind, [1, 4])}, {"y": (kind, [1, 4])}, {"w": array})
    save_model(model, tmp_path / "model.onnx")
    assert load_model(tmp_path / "model.onnx") == model


@pytest.mark.parametrize("dims", [(32, 16), (20, 15), (0, 16), (2**31, 2**31), (-20, 16)])
def test_a_tensor_without_the_data_that_its_shape_promises_is_refused(small_cnn, tmp_path, dims):
    weight(small_cnn, "fc.weight").dims[:] = dims
    path = tmp_path / "model.onnx"
    path.write_bytes(small_cnn.SerializeToString())
    refused(path, "'fc.weight'")


def test_text_that_is_no_utf8_is_refused(small_cnn, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(small_cnn.SerializeToString().replace(b"fc.bias", b"fc\xff\xfebi"))
    refused(path)


def test_a_cyclic_graph_is_refused(small_cnn, tmp_path):
    small_cnn.graph.node[0].input[0] = "logits"
    path = tmp_path / "model.onnx"
    path.write_bytes(small_cnn.SerializeToString())
    refused(path, "logits")
