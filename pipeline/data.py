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
from onnx_spdy.pipeline.sample_axes import fits, settle_axes
from onnx_spdy.pipeline.user_data import TARGET, DataError, named_arrays
from onnx_spdy.runtimes import Workload

__all__ = ["TARGET", "DataError", "Samples", "as_samples", "read_npz", "workload_of"]


@dataclass(frozen=True)
class Samples:
    """Samples of a network.

    Attributes:
        inputs: input name -> values of all samples.
        target: (samples, ...) or None.
        axes: input name -> the axis on which its samples lie, the first where it isn't named; None of an input that is
            the same for all samples.
    """

    inputs: dict[str, np.ndarray]
    target: np.ndarray | None = field(default=None)
    axes: Mapping[str, int | None] = field(default_factory=dict)

    def __len__(self) -> int:
        return next(
            array.shape[axis] for name, array in self.inputs.items() if (axis := self.axes.get(name, 0)) is not None
        )

    @cached_property
    def sha256(self) -> str:
        target = {} if self.target is None else {TARGET: self.target}
        elsewhere = {name: axis for name, axis in self.axes.items() if axis != 0}
        axes = {f"axis of {name}": np.array(-1 if axis is None else axis) for name, axis in elsewhere.items()}
        return arrays_sha256({**self.inputs, **target, **axes})

    @property
    def samples_first(self) -> dict[str, np.ndarray]:
        """Input name -> (samples, ...), of the inputs that have samples."""
        found = {name: (array, self.axes.get(name, 0)) for name, array in self.inputs.items()}
        return {name: np.moveaxis(array, axis, 0) for name, (array, axis) in found.items() if axis is not None}

    def take(self, index: slice | np.ndarray) -> Samples:
        """The samples at `index`."""
        target = None if self.target is None else self.target[index]
        inputs = {name: _taken(array, index, self.axes.get(name, 0)) for name, array in self.inputs.items()}
        return Samples(inputs, target, self.axes)

    def batches(self, size: int) -> Iterator[Samples]:
        """Consecutive batches of at most `size` samples."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


def _taken(array: np.ndarray, index: slice | np.ndarray, axis: int | None) -> np.ndarray:
    if axis is None:
        return array
    taken = np.moveaxis(np.moveaxis(array, axis, 0)[index], 0, axis)
    return np.ascontiguousarray(taken) if axis else taken


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
    axes: Mapping[str, int | None] | None = None,
) -> Samples:
    """Check data against a network's inputs.

    Args:
        data: a dict of arrays or tensors keyed by input name (first axis = samples) and optionally `target`; the same
            as a tuple in the order of the inputs; or an iterable of batches of such (see `named_arrays`).
        shapes: the network's inputs; None for a dynamic dimension.
        dtypes: the network's input types; floats are converted, integers must be integers.
        axes: on which axis of each input the graph has its samples; None where it has none. The data may tell better:
            an array of an input's own shape is the same for all samples, and one that fits only with its samples on
            another axis has them there. By default the first, unless it is open elsewhere and fixed here.
    Raises:
        DataError: an input is missing or unknown, a shape or type doesn't fit, NaN or infinite values,
            no samples, or unequal numbers of them.
    """
    open_axes = {name: [a for a, size in enumerate(shape) if a and size is None] for name, shape in shapes.items()}
    if axes is None:
        is_open = any(shape and shape[0] is None for shape in shapes.values())
        axes = {name: 0 if shape and (shape[0] is None or not is_open) else None for name, shape in shapes.items()}
    arrays = named_arrays(data, list(shapes), open_axes, axes)
    if missing := [name for name in shapes if name not in arrays]:
        raise DataError(
            f"data has no array for input {missing[0]!r}; it has {sorted(map(str, arrays))}; key arrays by input name"
        )
    if unknown := [name for name in arrays if name not in shapes and name != TARGET]:
        advice = "rename it to 'target'" if str(unknown[0]).startswith("label") else "remove or rename it"
        raise DataError(f"data has array {unknown[0]!r}, but the network's inputs are {list(shapes)}; {advice}")
    target = arrays.get(TARGET)
    if target is not None and target.ndim == 0:
        raise DataError(f"target is the single number {target}; its first axis counts samples")
    arrays, axes = settle_axes({name: arrays[name] for name in shapes}, shapes, axes, target)
    inputs = {name: _checked(name, arrays[name], shapes[name], dtypes[name], axes[name]) for name in shapes}
    counts = {name: array.shape[axis] for name, array in inputs.items() if (axis := axes[name]) is not None}
    if not counts:
        raise DataError(f"no input has an axis of samples: they are {dict(shapes)}; export the network with a batch")
    counts |= {} if target is None else {TARGET: len(target)}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise DataError(f"data has different or zero numbers of samples: {counts}; the first axis counts samples")
    return Samples(inputs, None if target is None else _own(target), axes)


def _checked(
    name: str, array: np.ndarray, shape: tuple[int | None, ...], dtype: np.dtype, axis: int | None
) -> np.ndarray:
    if not fits(array.shape, shape, axis):
        wanted = ["samples" if i == axis else "any" if size is None else size for i, size in enumerate(shape)]
        advice = "; give each sample a first axis of samples" if array.ndim == len(shape) - 1 else ""
        if axis is None:
            advice = ": it has no axis of samples, so one value serves all; give that, or export it with samples first"
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
