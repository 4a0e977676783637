"""Calibration and evaluation samples: arrays keyed by the graph's input names, checked before any work starts."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from onnx_spdy.pipeline.artifact import arrays_sha256
from onnx_spdy.runtimes import Workload
from onnx_spdy.runtimes.errors import OnnxSpdyError

TARGET = "target"


class DataError(OnnxSpdyError, ValueError):
    """The samples are missing, damaged, or don't fit the network."""


@dataclass(frozen=True)
class Samples:
    """Samples of a network.

    Attributes:
        inputs: input name -> (samples, *shape).
        target: (samples, ...) or None.
    """

    inputs: dict[str, np.ndarray]
    target: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @cached_property
    def sha256(self) -> str:
        target = {} if self.target is None else {TARGET: self.target}
        return arrays_sha256({**self.inputs, **target})

    def take(self, index: slice | np.ndarray) -> Samples:
        """The samples at `index`."""
        target = None if self.target is None else self.target[index]
        return Samples({name: array[index] for name, array in self.inputs.items()}, target)

    def batches(self, size: int) -> Iterator[Samples]:
        """Consecutive batches of at most `size` samples."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def workload_of(samples: Samples | None, batch: int, threads: int | None = None) -> Workload:
    """The workload that times a network with the first samples, repeated where they are fewer than the batch.

    Args:
        samples: None for random values.
        batch: samples a run.
        threads: None for all physical cores.
    """
    inputs = None if samples is None else samples.take(np.arange(batch) % len(samples)).inputs
    return Workload(batch, threads, inputs)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing in it is unpickled.

    Raises:
        DataError: the file is missing, not an .npz, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as pack:
            return {name: pack[name] for name in pack.files}
    except OSError as exc:
        raise DataError(f"data file {path} can't be read: {exc.strerror or exc}") from exc
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as exc:
        raise DataError(f"data file {path} is not an .npz of plain arrays ({exc}); save it with numpy.savez") from exc


def as_samples(
    data: Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]],
    shapes: Mapping[str, tuple[int | None, ...]],
    dtypes: Mapping[str, np.dtype],
) -> Samples:
    """Check data against a network's inputs.

    Args:
        data: a dict of arrays keyed by input name (first axis = samples) and optionally `target`, or an
            iterable of batches of such dicts.
        shapes: the network's inputs; None for a dynamic dimension.
        dtypes: the network's input types; floats are converted, integers must be integers.
    Raises:
        DataError: an input is missing or unknown, a shape or type doesn't fit, NaN or infinite values,
            no samples, or unequal numbers of them.
    """
    arrays = dict(data) if isinstance(data, Mapping) else _join(data)
    if missing := [name for name in shapes if name not in arrays]:
        raise DataError(
            f"data has no array for input {missing[0]!r}; it has {sorted(arrays)}; key arrays by input name"
        )
    if unknown := [name for name in arrays if name not in shapes and name != TARGET]:
        raise DataError(
            f"data has array {unknown[0]!r}, but the network's inputs are {list(shapes)}; remove or rename it"
        )
    inputs = {name: _checked(name, np.asarray(arrays[name]), shapes[name], dtypes[name]) for name in shapes}
    target = None if TARGET not in arrays else np.asarray(arrays[TARGET])
    counts = {name: len(array) for name, array in inputs.items()} | ({} if target is None else {TARGET: len(target)})
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise DataError(f"data has different or zero numbers of samples: {counts}; the first axis counts samples")
    return Samples(inputs, target)


def _join(batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    parts = [dict(batch) for batch in batches]
    if not parts:
        raise DataError("data has no batches; give at least one")
    if odd := [part for part in parts if part.keys() != parts[0].keys()]:
        raise DataError(f"batches have different arrays: {sorted(parts[0])} and {sorted(odd[0])}")
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def _checked(name: str, array: np.ndarray, shape: tuple[int | None, ...], dtype: np.dtype) -> np.ndarray:
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        wanted = ("samples", *("any" if size is None else size for size in shape[1:]))
        raise DataError(f"input {name!r} has shape {array.shape}, the network wants ({', '.join(map(str, wanted))})")
    if array.dtype.kind not in "fiub" or (np.dtype(dtype).kind in "iub" and array.dtype.kind == "f"):
        raise DataError(f"input {name!r} has type {array.dtype}, the network wants {np.dtype(dtype)}; convert it")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"input {name!r} holds NaN or infinite values; clean the data first")
    return np.ascontiguousarray(array.astype(dtype, copy=False))
