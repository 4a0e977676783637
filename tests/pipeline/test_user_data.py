"""Calibration data in the forms in which people have it, and one line for what can't be used."""

from __future__ import annotations

import io
import itertools
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from onnx_spdy.pipeline import user_data
from onnx_spdy.pipeline.data import DataError, Samples, as_samples, read_npz

X = np.random.default_rng(0).standard_normal((12, 1, 4, 4)).astype("f4")
Y = np.arange(12)
SHAPES, DTYPES = {"input": (None, 1, 4, 4)}, {"input": np.dtype(np.float32)}


def read(data: object) -> Samples:
    return as_samples(data, SHAPES, DTYPES)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=5)


FORMS: dict[str, Callable[[], object]] = {
    "dict": lambda: {"input": X, "target": Y},
    "pair": lambda: (X, Y),
    "pair of tensors": lambda: (torch.from_numpy(X), torch.from_numpy(Y)),
    "loader": loader,
    "list of pairs": lambda: [(X[:5], Y[:5]), [X[5:], Y[5:]]],
    "gradients": lambda: {"input": torch.from_numpy(X).requires_grad_() * 1, "target": Y},
    "lists": lambda: {"input": X.tolist(), "target": Y.tolist()},
    "double": lambda: {"input": X.astype("f8"), "target": Y.astype(">i8")},
    "objects": lambda: {"input": X.astype(object), "target": Y.astype(object)},
    "backwards": lambda: {"input": X[::-1].copy()[::-1], "target": Y[::-1].copy()[::-1]},
    "batches of dicts": lambda: ({"input": X[i : i + 1], "target": Y[i : i + 1]} for i in range(12)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_usual_form_gives_the_same_samples(form: str) -> None:
    found = read(FORMS[form]())
    assert found.target is not None
    np.testing.assert_allclose(found.inputs["input"], X, rtol=1e-6)
    np.testing.assert_array_equal(found.target, Y)
    torch.from_numpy(found.inputs["input"])  # neither negative strides nor a warning
    torch.from_numpy(found.target)


@pytest.mark.parametrize("data", [X, torch.from_numpy(X), [X[:5], X[5:]], {"input": X, "target": None}, (X,)])
def test_the_target_may_be_missing(data: object) -> None:
    found = read(data)
    assert found.target is None
    np.testing.assert_array_equal(found.inputs["input"], X)


def test_bfloat16_and_sparse_tensors_are_taken() -> None:
    np.testing.assert_allclose(read({"input": torch.from_numpy(X).bfloat16()}).inputs["input"], X, rtol=1e-2)
    np.testing.assert_array_equal(read({"input": torch.from_numpy(X).to_sparse()}).inputs["input"], X)


def test_what_cannot_be_written_to_is_copied() -> None:
    fixed = X.copy()
    fixed.flags.writeable = False
    assert torch.from_numpy(read({"input": fixed}).inputs["input"]).shape == X.shape


def raising(error: BaseException) -> Iterator:
    yield {"input": X}
    raise error


class Failing:
    def __iter__(self) -> Iterator:
        raise RuntimeError("no files")


def several_sizes() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are new in PyTorch
        return {"input": torch.nested.nested_tensor([torch.zeros(1, 4, 4), torch.zeros(1, 4, 2)])}


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a generator that fails": (lambda: raising(KeyError("pixel_values")), "raised KeyError: 'pixel_values' after 1"),
    "a generator that leaves": (lambda: raising(SystemExit("gone")), "raised SystemExit: gone after 1"),
    "batches that fail at once": (Failing, "raised RuntimeError: no files before its first batch"),
    "batches of None": (lambda: [None], "a batch is NoneType"),
    "batches of numbers": (lambda: iter([5]), "a batch is int"),
    "batches of text": (lambda: ["abc"], "a batch is str"),
    "a number": (lambda: 5, "data is int"),
    "too many arrays": (lambda: (X, Y, Y), "a tuple of 3 arrays"),
    "too large once cast": (lambda: {"input": X.astype("f8") * 1e300}, "float32 can't hold"),
    "masked": (lambda: {"input": np.ma.masked_less(X, 0)}, "hides"),
    "ragged": (lambda: {"input": [[1.0, 2.0], [3.0]]}, "can't be made an array"),
    "objects": (lambda: {"input": np.array([object()] * 3)}, "holds Python objects"),
    "a target of one number": (lambda: {"input": X, "target": 3}, "target is the single number 3"),
    "a target of one number for each batch": (lambda: [{"input": X[:1], "target": 3}], "single number 3"),
    "names that aren't text": (lambda: {"input": X, 0: X}, "array 0"),
    "only names that aren't text": (lambda: {0: X}, r"it has \['0'\]"),
    "labels": (lambda: {"input": X, "labels": Y}, "rename it to 'target'"),
    "batches of different shapes": (lambda: [X[:2], X[:2, :, :2]], "different shapes"),
    "batches of different ranks": (lambda: [X[:2], X[2]], "different shapes"),
    "single samples": (lambda: [{"input": X[0]}, {"input": X[1]}], "has shape"),
    "complex": (lambda: {"input": X.astype("c8")}, "has type complex64"),
    "a tensor without values": (lambda: {"input": torch.zeros(12, 1, 4, 4, device="meta")}, "can't be made an array"),
    "tensors of several sizes": (several_sizes, "can't be made an array"),
    "NaN": (lambda: {"input": X * np.nan}, "NaN"),
    "infinity beside other values": (lambda: {"input": np.where(X > 2, -np.inf, X)}, "infinite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_one_line(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(DataError, match=message) as caught:
        read(make())
    assert "\n" not in str(caught.value)


def test_a_generator_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MOST_BYTES", 20 * X.nbytes), ("MOST_BATCHES", 10)):
        with monkeypatch.context() as patch:
            patch.setattr(user_data, name, value)
            with pytest.raises(DataError, match="doesn't end"):
                read({"input": X} for _ in itertools.count())


@pytest.mark.parametrize("left", [False, True])
def test_batches_of_sentences_are_padded_where_their_mask_has_padding(left: bool) -> None:
    shapes = {"ids": (None, None), "attention_mask": (None, None)}
    dtypes = dict.fromkeys(shapes, np.dtype("i8"))
    batches = []
    for length in (3, 5):
        mask = np.ones((2, length), int)
        mask[0, 0 if left else -1] = 0
        batches.append({"ids": 7 * mask, "attention_mask": mask})
    found = as_samples(batches, shapes, dtypes)
    expected = [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]] if left else [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(found.inputs["attention_mask"][:2], expected)
    np.testing.assert_array_equal(found.inputs["ids"], 7 * found.inputs["attention_mask"])
    with pytest.raises(DataError, match="different shapes"):
        as_samples([{"ids": batch["ids"]} for batch in batches], {"ids": (None, None)}, {"ids": np.dtype("i8")})


def test_a_mask_that_is_added_may_hold_minus_infinity() -> None:
    added = np.where(np.tril(np.ones((3, 3))), 0, -np.inf).astype("f4")[None]
    for name in ("scores_mask", "anything"):
        found = as_samples({name: added}, {name: (None, 3, 3)}, {name: np.dtype("f4")})
        np.testing.assert_array_equal(found.inputs[name], added)
    for bad in (np.inf, np.nan):
        with pytest.raises(DataError, match="infinite"):
            as_samples({"mask": np.full_like(added, bad)}, {"mask": (None, 3, 3)}, {"mask": np.dtype("f4")})


numbers = np.arange(12, dtype="f4")
same = np.full(12, 3, "f4")


@pytest.mark.parametrize(
    ("shape", "extra", "axis", "kept"),
    [
        ((), np.float32(3), None, ()),
        ((), same, None, ()),
        ((2,), np.ones(2, "f4"), None, (2,)),
        ((2,), np.ones((12, 2), "f4"), None, (2,)),
        ((1,), np.ones(1, "f4"), None, (1,)),
        ((1,), same, None, (1,)),
        ((1,), numbers, 0, (12,)),
        ((1, 2), np.ones((12, 2), "f4"), None, (1, 2)),
        ((1, 2), np.stack([numbers, numbers], 1), 0, (12, 2)),
        ((5, 5), np.ones((5, 5), "f4"), None, (5, 5)),
        ((2, None, 3), np.ones((2, 12, 3), "f4"), 1, (2, 12, 3)),
        ((2, None, 3), np.ones((2, 7, 3), "f4"), None, (2, 7, 3)),
        ((None, 3), np.ones((12, 3), "f4"), 0, (12, 3)),
    ],
)
def test_samples_lie_on_the_axis_that_shapes_and_data_tell(shape, extra, axis, kept) -> None:
    samples = as_samples({"input": X, "extra": extra}, SHAPES | {"extra": shape}, DTYPES | {"extra": np.dtype("f4")})
    assert (len(samples), samples.axes) == (12, {"input": 0, "extra": axis})
    assert samples.inputs["extra"].shape == kept
    part = samples.take(slice(3, 5)).inputs["extra"]
    expected = samples.inputs["extra"] if axis is None else samples.inputs["extra"].take([3, 4], axis)
    np.testing.assert_array_equal(part, expected)
    assert [len(batch) for batch in samples.batches(5)] == [5, 5, 2]


@pytest.mark.parametrize(
    ("shape", "extra", "axis"),
    [((1,), np.ones(1, "f4"), None), ((1, 2), np.ones((12, 2), "f4"), 0), ((2, 1, 3), np.ones((2, 12, 3), "f4"), 1)],
)
def test_a_fixed_batch_of_one_is_told_by_the_data(shape, extra, axis) -> None:
    shapes, dtypes = {"input": (1, 1, 4, 4), "extra": shape}, DTYPES | {"extra": np.dtype("f4")}
    assert as_samples({"input": X, "extra": extra}, shapes, dtypes).axes == {"input": 0, "extra": axis}


@pytest.mark.parametrize(
    ("shape", "extra", "message"),
    [
        ((), numbers, "it has no axis of samples, so one value serves all"),
        ((2,), np.stack([numbers, numbers], 1), "it has no axis of samples, so one value serves all"),
        ((2,), np.ones(3, "f4"), "it has no axis of samples"),
        ((None, 3), np.ones((11, 3), "f4"), "different or zero numbers of samples"),
        ((None,), np.ones(1, "f4"), "different or zero numbers of samples"),
    ],
)
def test_an_input_whose_samples_are_nowhere_is_one_line(shape, extra, message) -> None:
    with pytest.raises(DataError, match=message) as caught:
        as_samples({"input": X, "extra": extra}, SHAPES | {"extra": shape}, DTYPES | {"extra": np.dtype("f4")})
    assert "\n" not in str(caught.value)


def test_samples_of_batches_are_joined_on_their_axis_and_what_all_share_is_kept_once() -> None:
    shapes = SHAPES | {"scale": (), "state": (2, None, 3)}
    parts = [{"input": X[:4], "scale": np.float32(2), "state": np.full((2, 4, 3), i, "f4")} for i in range(3)]
    dtypes = {name: np.dtype("f4") for name in shapes}
    found = as_samples(parts, shapes, dtypes, {"input": 0, "scale": None, "state": 1})
    assert {name: array.shape for name, array in found.inputs.items()} == {
        "input": (12, 1, 4, 4), "scale": (), "state": (2, 12, 3),
    }  # fmt: skip
    np.testing.assert_array_equal(found.inputs["state"][0, :, 0], np.repeat([0, 1, 2], 4))


def test_the_checksum_tells_on_which_axis_samples_lie() -> None:
    arrays = {"x": np.ones((4, 4), "f4")}
    assert Samples(arrays, axes={"x": 0}).sha256 == Samples(arrays).sha256 != Samples(arrays, axes={"x": 1}).sha256


def test_integers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"holds 4294967296, which int32 can't hold"):
        as_samples({"ids": np.array([1, 2**32])}, {"ids": (None,)}, {"ids": np.dtype("i4")})


def test_a_damaged_npz_is_one_line_wherever_it_is_damaged(tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez_compressed(whole, input=X, target=Y)
    content = whole.getvalue()
    broken = 0
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        (tmp_path / "data.npz").write_bytes(damaged)
        try:
            read_npz(tmp_path / "data.npz")
        except DataError as exc:
            assert "\n" not in str(exc)
            broken += 1
    assert broken > 10
    (tmp_path / "data.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError):
        read_npz(tmp_path / "data.npz")
    np.save(tmp_path / "plain.npy", X)
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as pack:
        pack.writestr("readme.txt", "no array")
    for name in ("plain.npz", "text.npz"):
        with pytest.raises(DataError):
            as_samples(read_npz(tmp_path / name), SHAPES, DTYPES)
