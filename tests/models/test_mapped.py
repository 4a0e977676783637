"""Large weights that stay in their files: the same bits as in memory, read when they are used, never changed there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from onnx_spdy.models import ModelError, TorchGraph, load_model, model_sha256, prepare, save_model, write_weights
from onnx_spdy.models import graph as graph_module
from onnx_spdy.models import load as load_module
from onnx_spdy.models.stored import StoredError, flat_parts_of, is_mapped, parts_of, same_values, values_of
from onnx_spdy.models.write_back import changed_initializers, differences, moved_to, writing
from onnx_spdy.tools.bench.decoder import SIZES, random_tokens, write_decoder

SIZE = SIZES["tiny"]
LARGE = 4096  # bytes from which tensors are mapped here
prepare_module = sys.modules[prepare.__module__]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A decoder whose weights are in two files, in one of them at odd offsets."""
    path = tmp_path / "model.onnx"
    write_decoder(SIZE, path)
    model = onnx.load(str(path), load_external_data=False)
    whole = path.with_name("model.onnx.data").read_bytes()
    with path.with_name("odd.bin").open("wb") as stream:
        for number, tensor in enumerate(model.graph.initializer):
            if tensor.data_location == TensorProto.EXTERNAL and number % 3 == 0:
                entry = {item.key: item for item in tensor.external_data}
                begin, length = int(entry["offset"].value), int(entry["length"].value)
                stream.write(b"odd")
                entry["location"].value, entry["offset"].value = "odd.bin", str(stream.tell())
                stream.write(whole[begin : begin + length])
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def few_bytes_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "LARGE_MODEL_BYTES", LARGE)
    monkeypatch.setattr(load_module, "MAPPED_BYTES", LARGE)
    monkeypatch.setattr(prepare_module, "LARGE_MODEL_BYTES", LARGE)
    monkeypatch.setattr(prepare_module, "UNTOUCHED_BYTES", LARGE)


@pytest.fixture
def mapped(path: Path, few_bytes_are_large: None) -> onnx.ModelProto:
    return load_model(path, mapped=True)


def test_small_models_and_small_tensors_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_model(path, mapped=True) == load_model(path)
    monkeypatch.setattr(load_module, "LARGE_MODEL_BYTES", LARGE)
    monkeypatch.setattr(load_module, "MAPPED_BYTES", LARGE)
    found = {tensor.name: is_mapped(tensor) for tensor in load_model(path, mapped=True).graph.initializer}
    assert found["layers.0.q.weight"] and not found["layers.0.q.bias"] and not found["mask"]
    assert not any(map(is_mapped, load_model(path).graph.initializer))


def test_what_is_mapped_is_what_is_read(path: Path, mapped: onnx.ModelProto) -> None:
    whole = load_model(path)
    assert mapped.ByteSize() < whole.ByteSize() / 10
    assert model_sha256(mapped) == model_sha256(whole)
    assert changed_initializers(mapped, whole) == differences(mapped, whole) == []
    for one, other in zip(mapped.graph.initializer, whole.graph.initializer, strict=True):
        np.testing.assert_array_equal(values_of(one), values_of(other))
        np.testing.assert_array_equal(np.concatenate([*flat_parts_of(one)]), values_of(other).reshape(-1))
        assert b"".join(parts_of(one)) == other.raw_data


def test_pieces_are_compared_whatever_holds_them(
    path: Path, mapped: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_spdy.models.stored.PART_BYTES", 1000)
    whole = load_model(path)
    changed = write_weights(whole, {"head.weight": values_of(whole.graph.initializer[-1]) * 2})
    for one, other, third in zip(*(m.graph.initializer for m in (mapped, whole, changed)), strict=True):
        assert same_values(one, other) and same_values(other, one) and same_values(one, one)
        assert same_values(one, third) is (one.name != "head.weight") is same_values(third, one)


def test_what_is_changed_stays_out_of_the_file(path: Path, mapped: onnx.ModelProto) -> None:
    before = path.with_name("model.onnx.data").read_bytes()
    tensor = next(one for one in mapped.graph.initializer if one.name == "head.weight")
    values_of(tensor)[:] = 0
    with torch.no_grad():
        dict(TorchGraph(mapped).named_parameters())["head.weight"].zero_()
    assert values_of(tensor).any() and path.with_name("model.onnx.data").read_bytes() == before


def test_prepared_and_run_it_is_the_same_as_in_memory(path: Path, mapped: onnx.ModelProto) -> None:
    examples = {"input_ids": random_tokens(SIZE, 2)}
    whole = load_model(path)
    prepared, expected = prepare(mapped, examples), prepare(whole, examples)
    assert sum(map(is_mapped, prepared.proto.graph.initializer)) > 10
    assert prepared.sha256 == expected.sha256
    inputs = {"input_ids": torch.from_numpy(examples["input_ids"])}
    found, wanted = (TorchGraph(one.proto)(inputs)["logits"] for one in (prepared, expected))
    assert torch.equal(found, wanted)


def test_setting_weights_aside_changes_nothing_in_a_decoder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(path)
    expected = prepare(whole)
    monkeypatch.setattr(prepare_module, "LARGE_MODEL_BYTES", LARGE)
    monkeypatch.setattr(prepare_module, "UNTOUCHED_BYTES", LARGE)
    assert {t.name for t in prepare_module._without_weights(whole).graph.initializer} < {
        t.name for t in whole.graph.initializer
    }
    found, wanted = ({t.name: t.raw_data for t in one.proto.graph.initializer} for one in (prepare(whole), expected))
    assert found == wanted and prepare(whole).proto.graph.node == expected.proto.graph.node


@pytest.mark.usefixtures("few_bytes_are_large")
def test_what_others_read_is_not_set_aside_below_2_gib(
    build, monkeypatch: pytest.MonkeyPatch, small_cnn: onnx.ModelProto
) -> None:
    """Else no BatchNormalization would be folded into large convolutions."""
    monkeypatch.setattr(prepare_module, "UNTOUCHED_BYTES", 256)
    monkeypatch.setattr(prepare_module, "LARGE_MODEL_BYTES", 0)
    named = prepare_module._without_weights(small_cnn)
    kept = {tensor.name for tensor in named.graph.initializer}
    assert {"conv1.weight", "dw.weight"} <= kept and "fc.weight" not in kept
    monkeypatch.setattr(prepare_module, "LARGEST_PROTOBUF_BYTES", 0)
    assert "conv1.weight" not in {
        tensor.name for tensor in prepare_module._without_weights(small_cnn).graph.initializer
    }


def test_it_is_written_with_its_weights_beside_it(path: Path, mapped: onnx.ModelProto, tmp_path: Path) -> None:
    written = tmp_path / "again" / "model.onnx"
    written.parent.mkdir()
    save_model(mapped, written)
    assert {file.name for file in written.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert load_model(written) == load_model(path)
    assert str(tmp_path).encode() not in written.read_bytes()
    onnx.checker.check_model(str(written))


def test_new_weights_are_written_one_by_one(path: Path, mapped: onnx.ModelProto, tmp_path: Path) -> None:
    whole = load_model(path)
    new = {"head.weight": np.zeros((64, 512), np.float32), "layers.0.q.bias": np.ones(64, np.float32)}
    file = tmp_path / "new.onnx"
    with writing(mapped, new, file) as written:
        assert not file.exists()
        assert changed_initializers(mapped, written) == ["layers.0.q.bias", "head.weight"]
    assert load_model(file) == write_weights(whole, new)
    assert model_sha256(moved_to(written, graph_module.data_file(file))) == model_sha256(load_model(file))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"nothing": np.zeros(3)}, "no initializer 'nothing'"),
        ({"head.weight": np.zeros(3)}, r"has shape \(64, 512\)"),
        ({"head.weight": np.full((64, 512), np.nan)}, "NaN"),
    ],
)
def test_what_can_not_be_written_leaves_what_was_there(
    mapped: onnx.ModelProto, tmp_path: Path, weights: dict[str, np.ndarray], message: str
) -> None:
    file = tmp_path / "out" / "new.onnx"
    file.parent.mkdir()
    file.write_bytes(b"before")
    with pytest.raises(ModelError, match=message), writing(mapped, weights, file):
        pass
    with pytest.raises(RuntimeError), writing(mapped, {}, file):
        raise RuntimeError
    assert [one.read_bytes() for one in file.parent.iterdir()] == [b"before"]


def test_external_data_that_nobody_has_looked_at_is_not_read(path: Path) -> None:
    tensor = onnx.load(str(path), load_external_data=False).graph.initializer[-1]
    for read in (values_of, lambda one: [*parts_of(one)]):
        with pytest.raises(StoredError, match="read the model with load_model"):
            read(tensor)


@pytest.mark.usefixtures("few_bytes_are_large")
class TestDamaged:
    def refused(self, path: Path, *words: str) -> None:
        with pytest.raises(ModelError) as caught:
            load_model(path, mapped=True)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)

    def test_a_short_file(self, path: Path) -> None:
        data = path.with_name("model.onnx.data")
        data.write_bytes(data.read_bytes()[:-1])
        self.refused(path, "model.onnx.data", "is cut off")

    def test_a_missing_file(self, path: Path) -> None:
        path.with_name("odd.bin").unlink()
        self.refused(path, "odd.bin", "is missing")

    def test_a_file_elsewhere(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "inner").mkdir()
        path.rename(tmp_path / "inner" / "model.onnx")
        model = onnx.load(str(tmp_path / "inner" / "model.onnx"), load_external_data=False)
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                item.value = f"../{item.value}" if item.key == "location" else item.value
        (tmp_path / "inner" / "model.onnx").write_bytes(model.SerializeToString())
        self.refused(tmp_path / "inner" / "model.onnx", "outside the model's folder")

    def test_a_shape_that_needs_more_than_there_is(self, path: Path) -> None:
        model = onnx.load(str(path), load_external_data=False)
        next(one for one in model.graph.initializer if one.name == "head.weight").dims[0] += 1
        path.write_bytes(model.SerializeToString())
        self.refused(path, "'head.weight'", "131072 bytes, not 133120")

    def test_values_that_are_no_numbers(self, path: Path) -> None:
        data = path.with_name("model.onnx.data")
        content = bytearray(data.read_bytes())
        content[-4:] = np.float32(np.nan).tobytes()
        data.write_bytes(content)
        self.refused(path, "1 of 32768 values of 'head.weight' are NaN")

    def test_a_file_that_is_cut_while_it_is_used(self, path: Path) -> None:
        model = load_model(path, mapped=True)
        tensor = next(one for one in model.graph.initializer if one.name == "head.weight")
        path.with_name("model.onnx.data").write_bytes(b"short")
        for read in (values_of, lambda one: [*parts_of(one)]):
            with pytest.raises(StoredError, match=r"'head\.weight' was changed or removed meanwhile"):
                read(tensor)
        path.with_name("model.onnx.data").unlink()
        for read in (values_of, lambda one: [*parts_of(one)]):
            with pytest.raises(StoredError, match="meanwhile"):
                read(tensor)
