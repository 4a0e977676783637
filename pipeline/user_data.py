"""What people hand over as calibration data, brought to arrays by name: dicts, tuples, tensors, and batches of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onnx_spdy.runtimes.errors import OnnxSpdyError, described

TARGET = "target"
MOST_BYTES = 4 << 30  # of all batches of an iterable: a generator for training never ends
MOST_BATCHES = 1_000_000
DESCRIBED = 200  # characters of what the user's code raised
MASK_NAME = re.compile(r"(attention|attn|input)_?mask\d*$", re.IGNORECASE)  # 1 for tokens, 0 for padding


class DataError(OnnxSpdyError, ValueError):
    """The samples are missing, damaged, or don't fit the network."""


def named_arrays(
    data: Any,
    inputs: Sequence[str],
    open_axes: Mapping[str, Sequence[int]],
    axes: Mapping[str, int | None],
) -> dict[str, np.ndarray]:
    """Arrays by name, all samples together.

    Args:
        data: a dict by name; a tuple of arrays in the order of the inputs, the target after them; one array where the
            network has one input; or an iterable of batches, each one of these (a list counts as a tuple there, as a
            DataLoader makes it).
        inputs: names of the network's inputs, in order.
        open_axes: input -> axes beside the first that may have any size: there batches are padded to the longest,
            where a mask says what is padding.
        axes: input -> the axis on which its samples lie; None where it is the same for all of them.
    Raises:
        DataError: it is none of these, or the iteration raised an error or didn't end.
    """
    if isinstance(data, Mapping) or _is_array(data) or (isinstance(data, tuple) and all(map(_is_array, data))):
        return _batch(data, inputs)
    parts = list(_batches(data, inputs))
    if not parts:
        raise DataError("data has no batches; give at least one")
    if odd := [part for part in parts if part.keys() != parts[0].keys()]:
        raise DataError(f"batches have different arrays: {sorted(parts[0])} and {sorted(odd[0])}")
    return {name: _joined(name, parts, open_axes.get(name, ()), axes.get(name, 0)) for name in parts[0]}


def as_array(name: str, value: Any) -> np.ndarray:
    """A plain array: of a tensor its values, in float32 where NumPy doesn't know its type.

    Raises:
        DataError: the value is ragged, holds Python objects, or hides entries.
    """
    if isinstance(value, torch.Tensor):
        try:
            return _of_tensor(value)
        except (RuntimeError, TypeError) as exc:  # without values, of several sizes, ...; NotImplementedError is one
            raise DataError(f"tensor {name!r} can't be made an array: {described(exc, DESCRIBED)}") from exc
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise DataError(f"array {name!r} hides {int(np.ma.getmaskarray(value).sum())} masked values; fill them first")
    try:
        array = np.asarray(value)
        if array.dtype == object:
            array = np.array(array.tolist())
    except Exception as exc:  # anything may be in there
        raise DataError(f"array {name!r} can't be made an array: {described(exc, DESCRIBED)}") from exc
    if array.dtype == object:
        raise DataError(f"array {name!r} holds Python objects; give numbers")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _of_tensor(value: torch.Tensor) -> np.ndarray:
    value = value.detach().cpu()
    value = value.dequantize() if value.is_quantized else value
    value = value.to_dense() if value.layout != torch.strided else value
    if value.dtype == torch.bfloat16 or "float8" in str(value.dtype):
        value = value.float()
    return value.resolve_conj().resolve_neg().numpy()


def _batches(data: Any, inputs: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    held = 0
    try:
        iterator = iter(data)
    except TypeError as exc:
        raise DataError(f"data is {type(data).__name__}; give a dict of arrays, or batches of them") from exc
    except (Exception, SystemExit) as exc:
        raise DataError(f"the data raised {described(exc, DESCRIBED)} before its first batch") from exc
    for number in itertools.count():
        try:
            value = next(iterator)
        except StopIteration:
            return
        except DataError:
            raise
        except (Exception, SystemExit) as exc:
            raise DataError(f"the data raised {described(exc, DESCRIBED)} after {number} batches") from exc
        batch = _batch(value, inputs)
        held += sum(array.nbytes for array in batch.values())
        if held > MOST_BYTES or number >= MOST_BATCHES:
            raise DataError(
                f"the data doesn't end: {number + 1} batches, {held / 2**30:.1f} GiB; calibration takes some hundred "
                "samples, so stop after them (itertools.islice), or give one dict of arrays"
            )
        yield batch


def _batch(value: Any, inputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> array of a dict, of arrays in the order of the inputs, or of one array."""
    if isinstance(value, Mapping):
        named = {name: one for name, one in value.items() if not (name == TARGET and one is None)}
    elif _is_array(value) and not isinstance(value, (list, tuple)):
        named = _by_order([value], inputs)
    elif isinstance(value, (list, tuple)):
        named = _by_order(value, inputs)
    else:
        raise DataError(f"a batch is {type(value).__name__}; give a dict of arrays by input name, or a tuple of arrays")
    return {name: as_array(name, one) for name, one in named.items()}


def _by_order(values: Sequence[Any], inputs: Sequence[str]) -> dict[str, Any]:
    if len(values) not in (len(inputs), len(inputs) + 1):
        raise DataError(
            f"a tuple of {len(values)} arrays doesn't tell the network's inputs {list(inputs)}; give a dict by name"
        )
    return dict(zip([*inputs, TARGET], values, strict=False))


def _joined(
    name: str, parts: Sequence[Mapping[str, np.ndarray]], open_axes: Sequence[int], axis: int | None
) -> np.ndarray:
    arrays = [part[name] for part in parts]
    if axis is None and all(np.array_equal(array, arrays[0]) for array in arrays):
        return arrays[0]
    if flat := [array for array in arrays if array.ndim == 0]:
        raise DataError(f"array {name!r} of a batch is the single number {flat[0]}; its first axis counts samples")
    if not axis and len({array.ndim for array in arrays}) == 1 and len({array.shape[1:] for array in arrays}) > 1:
        arrays = _padded(name, arrays, parts, open_axes)
    try:
        return np.concatenate(arrays, axis or 0)
    except ValueError as exc:
        shapes = sorted({array.shape for array in arrays}, key=str)[:3]
        raise DataError(f"batches of {name!r} have different shapes {shapes}; give all samples one shape") from exc


def _padded(
    name: str, arrays: Sequence[np.ndarray], parts: Sequence[Mapping[str, np.ndarray]], open_axes: Sequence[int]
) -> list[np.ndarray]:
    """Batches with zeros up to the longest, on the side where their mask has its padding."""
    masks = [other for other in parts[0] if MASK_NAME.search(str(other))]
    if not masks or not open_axes:
        return list(arrays)
    left = any(bool((part[mask][:, 0] == 0).any()) for part in parts for mask in masks if part[mask].ndim == 2)
    longest = np.max([array.shape for array in arrays], axis=0)
    result = []
    for array in arrays:
        missing = [int(longest[axis] - size) if axis in open_axes else 0 for axis, size in enumerate(array.shape)]
        result.append(np.pad(array, [(count, 0) if left else (0, count) for count in missing]))
    return result


def _is_array(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray)) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (int, float))
    )
