"""On which axis of each array samples lie, told by the graph's shapes and the data's together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

Shape = tuple[int | None, ...]  # of an input; None for an axis of any size
Axes = dict[str, int | None]


def settle_axes(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    guessed: Mapping[str, int | None],
    target: np.ndarray | None,
) -> tuple[dict[str, np.ndarray], Axes]:
    """The arrays, and the axis of each on which samples lie; None of one that is the same for all samples.

    An array that repeats one value for every sample of an input without an axis for them becomes that value.

    Args:
        arrays: by input name.
        shapes: of the network's inputs.
        guessed: axes by the graph alone; they stay where nothing else fits.
        target: whose first axis counts samples, or None.
    """
    batches = {1} | {shapes[name][axis] for name, axis in guessed.items() if axis is not None} - {None}
    fitting = {name: _fitting(arrays[name], shapes[name], batches) for name in shapes}
    count = len(target) if target is not None else max(_counts(arrays, shapes, guessed, fitting), default=0)
    found = {name: _settled(arrays[name], shapes[name], guessed[name], fitting[name], count) for name in shapes}
    return {name: array for name, (array, _) in found.items()}, {name: axis for name, (_, axis) in found.items()}


def fits(array: tuple[int, ...], shape: Shape, axis: int | None) -> bool:
    """Whether an array's shape is an input's but for the size of one axis."""
    return len(array) == len(shape) and all(
        want is None or number == axis or want == got
        for number, (want, got) in enumerate(zip(shape, array, strict=True))
    )


def _counts(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    guessed: Mapping[str, int | None],
    fitting: Mapping[str, list[int]],
) -> Iterator[int]:
    for name, array in arrays.items():
        axis = guessed[name]
        if axis is not None and not fits(array.shape, shapes[name], axis):
            axis = fitting[name][0] if len(fitting[name]) == 1 else None
        if axis is not None and axis < array.ndim:
            yield array.shape[axis]


def _fitting(array: np.ndarray, shape: Shape, batches: set[int | None]) -> list[int]:
    """The axes on which samples may lie: open ones; where all sizes are fixed, those as long as a batch."""
    able = [size is None or (None not in shape and size in batches) for size in shape]
    return [axis for axis in range(min(array.ndim, len(shape))) if able[axis] and fits(array.shape, shape, axis)]


def _settled(
    array: np.ndarray, shape: Shape, guess: int | None, fitting: list[int], count: int
) -> tuple[np.ndarray, int | None]:
    possible = [axis for axis in fitting if array.shape[axis] == count]
    if guess in possible:
        return array, guess
    if fits(array.shape, shape, None) and (guess is None or shape[guess] == 1):
        # A state (layers, samples, channels): its axis of samples is open, and as long as there are samples.
        open_axes = [axis for axis in possible if axis and len(shape) > 2 and shape[axis] is None]
        return array, open_axes[0] if len(open_axes) == 1 and count > 1 else None
    if len(possible) == 1 and (guess is not None or possible[0]):
        return array, possible[0]
    if guess is None and array.ndim and len(array) == count:
        one_each = shape[:1] == (1,) and array.shape[1:] == shape[1:]
        if (one_each or fits(array.shape[1:], shape, None)) and (array == array[:1]).all():
            return (array[:1] if one_each else array[0]), None
        if one_each:  # a value of its own for each sample: then they run one by one
            return array, 0
    return array, guess
