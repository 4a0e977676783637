"""On which axis of each input of a graph samples lie.

Most inputs have samples first. A scale or a sampling rate has none, it is the same for all samples; a recurrent state
(layers, samples, hidden) and a sequence (positions, samples, channels) have them second. Names and sizes of axes tell
most of these apart; where they can't, ONNX's own mark of such an axis does, its denotation DATA_BATCH.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import onnx

Dimension = onnx.TensorShapeProto.Dimension

DENOTATION = "DATA_BATCH"
NAMES = re.compile(r"n|b|bs|batch([_ ]?size)?", re.IGNORECASE)


def batch_axes(inputs: Sequence[onnx.ValueInfoProto]) -> dict[str, int | None]:
    """Input -> the axis on which its samples lie; None where it has none.

    Args:
        inputs: of a graph, without its initializers.
    """
    shapes = {value.name: dimensions(value) for value in inputs}
    marked = {name: _marked(axes) for name, axes in shapes.items()}
    if any(axis is not None for axis in marked.values()):
        return marked
    symbol = _symbol(shapes.values())
    later = _later(shapes.values())
    firsts = [axes[0] for axes in shapes.values() if axes and is_open(axes[0])]
    if symbol is None and all(axis.dim_param in later for axis in firsts):
        batch = _fixed_size(shapes.values())
        return {name: 0 if axes and axes[0].dim_value == batch else None for name, axes in shapes.items()}
    return {name: _axis(axes, symbol, later) for name, axes in shapes.items()}


def fixed_batch(inputs: Sequence[onnx.ValueInfoProto]) -> int | None:
    """The number of samples that a graph takes, no more and no less; None where it is open."""
    axes = batch_axes(inputs)
    found = [dimensions(value)[axis] for value in inputs if (axis := axes[value.name]) is not None]
    return None if any(map(is_open, found)) else min((axis.dim_value for axis in found), default=None)


def mark_batch_axes(inputs: Sequence[onnx.ValueInfoProto], axes: Mapping[str, int | None]) -> None:
    """Write into a graph's inputs on which axes samples lie, unless that can be told without."""
    if batch_axes(inputs) == dict(axes):
        return
    for value in inputs:
        for number, axis in enumerate(dimensions(value)):
            axis.ClearField("denotation")
            if number == axes[value.name]:
                axis.denotation = DENOTATION


def dimensions(value: onnx.ValueInfoProto) -> list[Dimension]:
    """The axes of an input or output; none where its rank isn't known."""
    return list(value.type.tensor_type.shape.dim)


def is_open(axis: Dimension) -> bool:
    """Whether an axis may have any size; some exporters write 0 or -1 for that."""
    return axis.dim_value <= 0


def _marked(axes: Sequence[Dimension]) -> int | None:
    return next((number for number, axis in enumerate(axes) if axis.denotation == DENOTATION), None)


def _later(shapes: Iterable[Sequence[Dimension]]) -> set[str]:
    """Names of other axes than first ones: of positions, say, which another input may have first."""
    return {axis.dim_param for axes in shapes for axis in axes[1:]} - {""}


def _names(axes: Iterable[Dimension]) -> list[str]:
    return [axis.dim_param for axis in axes]


def _symbol(shapes: Iterable[Sequence[Dimension]]) -> str | None:
    """The name of the batch: of a first axis, or one that is usual for a batch on another."""
    shapes = [*shapes]
    first = [axes[0].dim_param for axes in shapes if axes and axes[0].dim_param]
    later = _later(shapes)
    usual = [name for name in (*first, *(name for axes in shapes for name in _names(axes))) if NAMES.fullmatch(name)]
    return next(iter([*usual, *(name for name in first if name not in later)]), None)


def _fixed_size(shapes: Iterable[Sequence[Dimension]]) -> int | None:
    """The batch of a graph without an open one: the first axis of its first input that isn't a number or a list."""
    found = sorted((axes for axes in shapes if axes), key=lambda axes: len(axes) < 2)
    return found[0][0].dim_value if found else None


def _axis(axes: Sequence[Dimension], symbol: str | None, later: set[str]) -> int | None:
    if symbol and symbol in _names(axes):
        return _names(axes).index(symbol)
    return 0 if axes and is_open(axes[0]) and axes[0].dim_param not in later else None
