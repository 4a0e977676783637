"""Does a graph compute the same for samples in a batch as for each alone?

Exporters that trace write the example's batch into the graph, most often 1, and still declare it open: `x.view(1, -1)`
runs for two samples as well, and makes one of them. Not every difference is that: a statistic of the batch, a softmax
over it or the boxes that a detector keeps depend on all samples as they should. What tells such a graph: a Reshape
between the inputs and the output that is wrong puts the samples of one axis into another one's place, or only the first
sample counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnx_spdy.models.graph import ModelError, graph_inputs, inner_graphs
from onnx_spdy.models.ort_process import RunFailed
from onnx_spdy.runtimes.batch_axes import batch_axes, dimensions

logger = logging.getLogger(__name__)

Inputs = Mapping[str, np.ndarray]
Draw = Callable[[int], Inputs]  # so many samples
Run = Callable[[onnx.ModelProto, Inputs], list[np.ndarray]]  # raises RunFailed where the graph doesn't run

ROUNDING = 1e-4  # of an output's largest value: another batch may be computed in another order
COARSE_ROUNDING = 2e-2  # of half precision, and the part of integers that may differ
CLEARLY = 100  # times the rounding
RESHAPES = ("Flatten", "Reshape")
SELECTS = ("Compress", "NonMaxSuppression", "NonZero", "Unique")  # how many they keep depends on the values


@dataclass(frozen=True)
class BakedBatch:
    """The batch that is written into a graph which declares it open.

    Attributes:
        size: the number of samples with which the graph computes what it should.
        reason: what showed it, in words.
    """

    size: int
    reason: str

    def __str__(self) -> str:
        return (
            f"the file leaves its batch open, but {self.reason}: it is right for a batch of {self.size} only, which is "
            "fixed now; for others export it without the example's batch in a view, an expand or a constant"
        )


def baked_batch(model: onnx.ModelProto, draw: Draw, run: Run) -> BakedBatch | None:
    """What batch is written into a graph that runs for two samples; None where each of them comes out as if alone.

    Args:
        model: its batch is open.
        draw: makes inputs.
        run: runs a graph.
    """
    try:
        run(model, draw(3))
    except RunFailed as exc:
        return BakedBatch(2, f"three samples don't run ({exc})")
    pair = draw(2)
    together = run(model, pair)
    try:
        alone = [run(model, sample(model, pair, number)) for number in range(2)]
    except RunFailed as exc:
        logger.debug("one sample alone: %s", exc)  # a Squeeze may need more than one
        return None
    symbols = _symbols(model)
    odd = [
        (value.name, both, *ones)
        for value, both, *ones in zip(model.graph.output, together, *alone, strict=True)
        if both.ndim
        and not _is_selected(model, value.name)
        and not (_each_as_alone(both, *ones) and _grows_as_declared(value, both, ones[0], symbols))
    ]
    if not odd:
        return None
    axes = batch_axes(graph_inputs(model))
    turned = {name: array if axes.get(name) is None else np.flip(array, axes[name]) for name, array in pair.items()}
    again = dict(zip((value.name for value in model.graph.output), run(model, turned), strict=True))
    for name, both, one, other in odd:
        if _only_one_counts(both, one, other) and _only_one_counts(again[name], other, one):
            return BakedBatch(1, f"output '{name}' depends on one sample of a batch only")
    return _reshaped(model, [name for name, *_ in odd], pair, run)


def batch_that_outputs_have(model: onnx.ModelProto, outputs: Sequence[np.ndarray]) -> int | None:
    """The first axis of outputs that are declared to have the batch there; None where there is none, or several."""
    symbols = _symbols(model)
    found = {
        array.shape[0]
        for value, array in zip(model.graph.output, outputs, strict=True)
        if array.ndim and _is_batch_first(value, symbols)
    }
    return found.pop() if len(found) == 1 else None


def _symbols(model: onnx.ModelProto) -> set[str]:
    """Names of the inputs' batch."""
    axes = batch_axes(graph_inputs(model))
    found = {
        dimensions(value)[axis].dim_param for value in graph_inputs(model) if (axis := axes[value.name]) is not None
    }
    return found - {""}


def _is_batch_first(output: onnx.ValueInfoProto, symbols: set[str]) -> bool:
    axes = dimensions(output)
    return bool(axes) and axes[0].dim_param in symbols


def _grows_as_declared(output: onnx.ValueInfoProto, both: np.ndarray, one: np.ndarray, symbols: set[str]) -> bool:
    return not _is_batch_first(output, symbols) or both.shape[:1] != one.shape[:1]


def sample(model: onnx.ModelProto, inputs: Inputs, number: int) -> dict[str, np.ndarray]:
    """One sample of a batch, as a batch of one."""
    axes = batch_axes(graph_inputs(model))
    return {
        name: array if (axis := axes.get(name)) is None else array.take([number], axis)
        for name, array in inputs.items()
    }


def fix_batch(model: onnx.ModelProto, size: int, shapes: Sequence[Sequence[int]]) -> None:
    """Write a batch into the inputs and outputs of a graph.

    Args:
        model: is changed.
        size: the batch.
        shapes: of the outputs for it.
    """
    axes = batch_axes(graph_inputs(model))
    symbols = set()
    for value in graph_inputs(model):
        if (axis := axes[value.name]) is not None:
            dimension = dimensions(value)[axis]
            symbols.add(dimension.dim_param)
            dimension.dim_value = size  # also clears the name
    for value, shape in zip(model.graph.output, shapes, strict=True):
        for dimension, found in zip(dimensions(value), shape, strict=False):
            if dimension.dim_param in symbols - {""}:
                dimension.dim_value = found


def _each_as_alone(both: np.ndarray, one: np.ndarray, other: np.ndarray) -> bool:
    """Whether an output holds the samples' own ones, on whichever axis, or doesn't depend on them."""
    if one.shape != other.shape or both.ndim != one.ndim:
        return True  # the number of its entries depends on values: nothing can be told
    grown = [axis for axis in range(both.ndim) if both.shape[axis] != one.shape[axis]]
    if not both.size or len(grown) > 1:  # every sample with every other one
        return True
    if not grown:
        return _alike(both, one) and _alike(both, other)
    (axis,) = grown
    if both.shape[axis] != 2 * one.shape[axis]:
        return True
    by_turns = np.stack([one, other], axis + 1).reshape(both.shape)
    return _alike(both, np.concatenate([one, other], axis)) or _alike(both, by_turns)


def _only_one_counts(both: np.ndarray, one: np.ndarray, other: np.ndarray) -> bool:
    """Whether an output has the first sample's values, and not the second one's."""
    if _alike(one, other, CLEARLY) or one.shape != other.shape:
        return False
    if both.shape == one.shape:
        return _alike(both, one)
    axis = next(axis for axis in range(both.ndim) if both.shape[axis] != one.shape[axis])
    if both.shape[axis] != 2 * one.shape[axis]:
        return False
    first, second = np.split(both, 2, axis)
    return _alike(first, one) and not _alike(second, other, CLEARLY)


def _reshaped(model: onnx.ModelProto, odd: Sequence[str], pair: Inputs, run: Run) -> BakedBatch | None:
    """The first node that puts samples elsewhere, of those that the odd outputs are computed from."""
    nodes = [node for node in _ancestors(model, odd) if node.op_type in RESHAPES]
    watched = list(dict.fromkeys(name for node in nodes for name in (node.input[0], node.output[0])))
    if not watched:
        return None
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    shown = {value.name for value in probe.graph.output}
    stored = {tensor.name for tensor in probe.graph.initializer}
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched if name not in shown | stored)
    names = [value.name for value in probe.graph.output]
    try:
        found = [
            dict(zip(names, (array.shape for array in run(probe, inputs)), strict=True))
            for inputs in (pair, sample(model, pair, 0))
        ]
    except ModelError as exc:  # a value of a kind that can't be an output
        logger.debug("the graph with inner values as outputs: %s", exc)
        return None
    for node in nodes:
        (two, one), (two_out, one_out) = [
            [shapes.get(name, ()) for shapes in found] for name in (node.input[0], node.output[0])
        ]
        if two and two_out and two[0] == 2 * one[0] and two_out[0] == one_out[0]:
            return BakedBatch(two_out[0], f"{node.op_type} '{node.name}' makes {two_out[0]} of every batch")
    return None


def _ancestors(model: onnx.ModelProto, names: Sequence[str]) -> Iterator[onnx.NodeProto]:
    """The nodes from which values are computed, in graph order."""
    needed = set(names)
    found = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed.update(node.input, *(inner.input for graph in inner_graphs(node) for inner in graph.node))
            found.append(node)
    yield from reversed(found)


def _is_selected(model: onnx.ModelProto, name: str) -> bool:
    """Whether the number of an output's entries depends on values, as that of a detector's boxes does."""
    return any(node.op_type in SELECTS for node in _ancestors(model, [name]))


def _alike(a: np.ndarray, b: np.ndarray, times: float = 1) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind not in "fV":
        return not a.size or bool(np.mean(a != b) <= COARSE_ROUNDING)
    rounding = ROUNDING if a.dtype.itemsize >= 4 else COARSE_ROUNDING
    a, b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    scale = np.abs(a[finite]).max(initial=0.0)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    same[finite] |= np.abs(a - b)[finite] <= times * rounding * scale
    return bool(same.all())
