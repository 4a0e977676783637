"""Which part of an output belongs to which sample, so that batches can be joined and padding cut off.

Most outputs have samples on their first axis, but not all: time may come first, samples and positions may be one axis,
and some outputs (a mean over the batch, the boxes that a detector keeps) have none. The network itself tells: it is run
on a batch and on the same batch in reverse order, and what is reversed with it is the axis of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnx_spdy.runtimes.errors import OnnxSpdyError

TOLERANCE = 1e-3  # of an output's largest value: another order of samples may round differently

Arrays = Mapping[str, np.ndarray]
Axes = dict[str, int]


class RowsError(OnnxSpdyError, ValueError):
    """An output of several batches can't be told apart into samples."""


@dataclass(frozen=True)
class Layout:
    """Where the samples of an output are.

    Attributes:
        axis: which holds them.
        each: how many entries of it every sample has.
        together: whether a sample's entries follow each other; otherwise all first ones come first, then all second.
    """

    axis: int
    each: int
    together: bool

    def samples_first(self, value: np.ndarray) -> np.ndarray:
        """(samples, each, other axes)"""
        moved = np.moveaxis(value, self.axis, 0)
        if self.together:
            return moved.reshape(-1, self.each, *moved.shape[1:])
        return moved.reshape(self.each, -1, *moved.shape[1:]).swapaxes(0, 1)

    def back(self, rows: np.ndarray) -> np.ndarray:
        """The output as the network would give it for all these samples."""
        ordered = rows if self.together else rows.swapaxes(0, 1)
        return np.moveaxis(ordered.reshape(-1, *rows.shape[2:]), 0, self.axis)


def find_layouts(outputs: Arrays, reversed_outputs: Arrays, batch: int) -> dict[str, Layout | None]:
    """Where the samples of each output are; None of one that has none.

    Args:
        outputs, reversed_outputs: of a batch, and of the same batch in reverse order.
        batch: number of its samples.
    """
    return {name: _layout(value, reversed_outputs[name], batch) for name, value in outputs.items()}


def sample_axes(outputs: Mapping[str, torch.Tensor], reversed_outputs: Mapping[str, torch.Tensor], batch: int) -> Axes:
    """The axis of each output on which its samples lie; the first where that can't be told.

    Args:
        outputs, reversed_outputs, batch: see `find_layouts`.
    """
    if batch < 2:
        return dict.fromkeys(outputs, 0)
    layouts = find_layouts(_arrays(outputs), _arrays(reversed_outputs), batch)
    return {name: layout.axis if layout else 0 for name, layout in layouts.items()}


def _arrays(values: Mapping[str, torch.Tensor]) -> Arrays:
    return {k: (v.float() if v.is_floating_point() else v).numpy(force=True) for k, v in values.items()}


def join(parts: Sequence[Arrays], counts: Sequence[int], layouts: Mapping[str, Layout | None]) -> dict[str, np.ndarray]:
    """The outputs for all samples.

    Args:
        parts: outputs of each batch, some with more samples than count.
        counts: samples of each batch that are wanted, from its first on.
        layouts: of the outputs.
    Raises:
        RowsError: an output has no axis of samples and isn't the same for all batches, or its shapes differ.
    """
    return {name: _joined(name, [part[name] for part in parts], counts, layouts[name]) for name in parts[0]}


def _joined(name: str, values: Sequence[np.ndarray], counts: Sequence[int], layout: Layout | None) -> np.ndarray:
    if layout is None:
        if all(np.array_equal(value, values[0]) for value in values):
            return values[0]
        raise RowsError(
            f"output {name!r} {values[0].shape} has no axis of samples, and other values in each batch; evaluate on as "
            "many samples as one batch has, or remove this output from the network"
        )
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise RowsError(
            f"output {name!r} has shapes {sorted(shapes)[:2]} in batches of the same size; evaluate on as many samples "
            "as one batch has, or pad its boxes to a fixed number"
        )
    rows = [layout.samples_first(value)[:count] for value, count in zip(values, counts, strict=True)]
    return layout.back(np.concatenate(rows))


def _layout(value: np.ndarray, turned: np.ndarray, batch: int) -> Layout | None:
    axes = sorted(range(value.ndim), key=lambda axis: value.shape[axis] != batch)  # one entry a sample: first choice
    for axis in axes:
        each, rest = divmod(value.shape[axis], batch)
        if rest or not each:
            continue
        for together in (True, False) if each > 1 else (True,):
            layout = Layout(axis, each, together)
            if value.shape == turned.shape and _alike(layout.back(layout.samples_first(value)[::-1]), turned):
                return layout
    return None


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype.kind != "f":
        return bool(np.mean(a == b) > 0.99)
    finite = np.isfinite(a) & np.isfinite(b)
    scale = np.abs(a[finite]).max(initial=0.0)
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (finite & (np.abs(np.where(finite, a - b, 0)) <= TOLERANCE * scale))
    return bool(same.all())
