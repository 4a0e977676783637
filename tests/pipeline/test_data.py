import pickle
from pathlib import Path

import numpy as np
import pytest

from onnx_spdy.pipeline.data import DataError, as_samples, read_npz, workload_of

SHAPES = {"input": (None, 3, 8, 8), "mask": (None, None)}
DTYPES = {"input": np.dtype(np.float32), "mask": np.dtype(np.int64)}


def good(count: int = 4) -> dict[str, np.ndarray]:
    return {"input": np.ones((count, 3, 8, 8)), "mask": np.ones((count, 5), np.int32), "target": np.arange(count)}


def test_arrays_become_samples_of_the_networks_types() -> None:
    samples = as_samples(good(), SHAPES, DTYPES)
    assert len(samples) == 4
    assert samples.inputs["input"].dtype == np.float32
    assert samples.inputs["mask"].dtype == np.int64
    assert [len(batch) for batch in samples.batches(3)] == [3, 1]


def test_batches_are_joined() -> None:
    joined = as_samples(iter([good(3), good(2)]), SHAPES, DTYPES)
    assert len(joined) == 5
    assert joined.target is not None
    assert joined.target.tolist() == [0, 1, 2, 0, 1]


def broken(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    return {name: value for name, value in {**good(), **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken(mask=None), "no array for input 'mask'"),
        (broken(extra=np.ones(4)), "array 'extra'"),
        (broken(input=np.ones((4, 3, 8, 9))), r"shape \(4, 3, 8, 9\), the network wants \(samples, 3, 8, 8\)"),
        (broken(input=np.ones((4, 192))), "has shape"),
        (broken(input=np.full((4, 3, 8, 8), np.nan)), "NaN"),
        (broken(input=np.full((4, 3, 8, 8), np.inf)), "infinite"),
        (broken(mask=np.ones((4, 5))), "has type float64"),
        (broken(input=np.full((4, 3, 8, 8), "x")), "has type"),
        (broken(target=np.arange(3)), "different or zero numbers"),
        ({"input": np.ones((0, 3, 8, 8)), "mask": np.ones((0, 5), int)}, "different or zero numbers"),
        ([], "no batches"),
        ([good(), {"input": np.ones((1, 3, 8, 8))}], "batches have different arrays"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(data: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        as_samples(data, SHAPES, DTYPES)
    assert "\n" not in str(caught.value)


def test_an_npz_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "sprung").touch, ())

    np.savez(tmp_path / "trap.npz", input=np.array([Trap()], object))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("trap.npz", "plain.npz", "text.npz", "missing.npz"):
        with pytest.raises(DataError):
            read_npz(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_workload_takes_the_first_samples_and_repeats_where_there_are_too_few() -> None:
    samples = as_samples({**good(3), "mask": np.arange(15).reshape(3, 5)}, SHAPES, DTYPES)
    assert workload_of(samples, 2, 1).threads == 1
    inputs = workload_of(samples, 7).inputs
    assert inputs is not None
    np.testing.assert_array_equal(inputs["mask"][:, 0], [0, 5, 10, 0, 5, 10, 0])
    assert inputs["input"].shape == (7, 3, 8, 8)
    assert workload_of(None, 7).inputs is None
