"""Calibration and evaluation samples: arrays keyed by the graph's input names, checked before any work starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from onnx_spdy.models.graph import one_line
from onnx_spdy.pipeline.artifact import arrays_sha256
from onnx_spdy.pipeline.user_data import TARGET, DataError, named_arrays
from onnx_spdy.runtimes import Workload

__all__ = ["TARGET", "DataError", "Samples", "as_samples", "read_npz", "workload_of"]


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
        DataError: the file is missing, not an .npz, damaged, or holds Python objects.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as pack:
            return {name: pack[name] for name in pack.files}
    except OSError as exc:
        raise DataError(f"data file {path} can't be read: {exc.strerror or exc}") from exc
    except (Exception, MemoryError) as exc:  # zipfile, zlib and the header's parser raise a dozen types
        raise DataError(
            f"data file {path} is not an .npz of plain arrays, or damaged "
            f"({one_line(str(exc)) or type(exc).__name__}); save it with numpy.savez"
        ) from exc


def as_samples(
    data: Any,
    shapes: Mapping[str, tuple[int | None, ...]],
    dtypes: Mapping[str, np.dtype],
) -> Samples:
    """Check data against a network's inputs.

    Args:
        data: a dict of arrays or tensors keyed by input name (first axis = samples) and optionally `target`; the same
            as a tuple in the order of the inputs; or an iterable of batches of such (see `named_arrays`).
        shapes: the network's inputs; None for a dynamic dimension.
        dtypes: the network's input types; floats are converted, integers must be integers.
    Raises:
        DataError: an input is missing or unknown, a shape or type doesn't fit, NaN or infinite values,
            no samples, or unequal numbers of them.
    """
    open_axes = {name: [a for a, size in enumerate(shape) if a and size is None] for name, shape in shapes.items()}
    arrays = named_arrays(data, list(shapes), open_axes)
    if missing := [name for name in shapes if name not in arrays]:
        raise DataError(
            f"data has no array for input {missing[0]!r}; it has {sorted(map(str, arrays))}; key arrays by input name"
        )
    if unknown := [name for name in arrays if name not in shapes and name != TARGET]:
        advice = "rename it to 'target'" if str(unknown[0]).startswith("label") else "remove or rename it"
        raise DataError(f"data has array {unknown[0]!r}, but the network's inputs are {list(shapes)}; {advice}")
    inputs = {name: _checked(name, arrays[name], shapes[name], dtypes[name]) for name in shapes}
    target = arrays.get(TARGET)
    if target is not None and target.ndim == 0:
        raise DataError(f"target is the single number {target}; its first axis counts samples")
    _check_axes(inputs, shapes)
    counts = {name: len(array) for name, array in inputs.items()} | ({} if target is None else {TARGET: len(target)})
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise DataError(f"data has different or zero numbers of samples: {counts}; the first axis counts samples")
    return Samples(inputs, None if target is None else _own(target))


def _check_axes(inputs: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Refuse inputs that have no samples on their first axis: a scale, a state of (layers, samples, ...)."""
    is_open = any(shape and shape[0] is None for shape in shapes.values())
    for name, shape in shapes.items():
        samples_elsewhere = bool(shape) and is_open and shape[0] is not None
        if not shape or samples_elsewhere:
            where = "no axis" if not shape else f"a first axis of size {shape[0]} that isn't the samples'"
            raise DataError(
                f"input {name!r} has {where}, and a batch takes every input by its first axis; export the network with "
                "this input as a constant, or with samples first"
            )


def _checked(name: str, array: np.ndarray, shape: tuple[int | None, ...], dtype: np.dtype) -> np.ndarray:
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        wanted = ("samples", *("any" if size is None else size for size in shape[1:]))
        advice = "; give each sample a first axis of samples" if array.ndim == len(shape) - 1 else ""
        raise DataError(
            f"input {name!r} has shape {array.shape}, the network wants ({', '.join(map(str, wanted))}){advice}"
        )
    if array.dtype.kind not in "fiub" or (np.dtype(dtype).kind in "iub" and array.dtype.kind == "f"):
        raise DataError(f"input {name!r} has type {array.dtype}, the network wants {np.dtype(dtype)}; convert it")
    if array.dtype.kind == "f" and not np.isfinite(array).all() and not _is_additive_mask(name, array):
        raise DataError(f"input {name!r} holds NaN or infinite values; clean the data first")
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    overflows = cast != array if cast.dtype.kind in "iub" else np.isinf(cast) & np.isfinite(array)
    if overflows.any():
        value = array[overflows].flat[0]
        raise DataError(f"input {name!r} holds {value}, which {np.dtype(dtype)} can't hold; clean the data first")
    return _own(cast)


def _is_additive_mask(name: str, array: np.ndarray) -> bool:
    """Whether an input is added to attention scores: -inf forbids, the rest is one value, or the name tells."""
    finite = np.isfinite(array)
    if np.isnan(array).any() or not finite.any() or (array[~finite] > 0).any():
        return False
    return "mask" in name.lower() or "bias" in name.lower() or len(np.unique(array[finite])) == 1


def _own(array: np.ndarray) -> np.ndarray:
    """In memory that may be written to, in C order: what PyTorch takes without a copy or a warning."""
    return np.require(array, requirements=["C", "W"])
