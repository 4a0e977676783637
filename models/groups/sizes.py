"""Sizes that a graph reads from its values when it runs (Shape, Gather, Concat, Reshape): they follow by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_spdy.models.groups.labels import Factor
from onnx_spdy.models.groups.trace import SizeOf, Step, Trace

# They pick, join and pass on numbers, and don't compute with them.
CARRYING = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze")


# Which input tells them the shape of their output.
SHAPE_INPUT = {"Expand": 1, "Reshape": 1, "Resize": 3}


def follow_sizes(trace: Trace, step: Step) -> None:
    """Note which elements of a node's output are sizes; where it computes with sizes, they stay as they are."""
    read = [name for name in step.inputs if name in trace.computed]
    if not read:
        return
    carried = _carried(trace, step) if step.op in CARRYING else None
    if carried is not None:
        trace.computed[step.outputs[0]] = carried
    elif step.op not in SHAPE_INPUT or read != [step.inputs[SHAPE_INPUT[step.op]]]:  # their rules look at that one
        for name in read:
            keep(trace, trace.computed[name], f"{step.where} computes with its size")


def _carried(trace: Trace, step: Step) -> list[SizeOf | None] | None:
    if step.op == "Concat":
        pieces = [(trace.computed.get(name), trace.value(name).shape) for name in step.inputs]
        if any(shape is None or len(shape) != 1 for _, shape in pieces):
            return None
        return [one for sizes, shape in pieces for one in (sizes or [None] * (shape or (0,))[0])]
    sizes = trace.computed.get(step.inputs[0])
    if sizes is None or any(name in trace.computed for name in step.inputs[1:]):
        return None
    told = [one.ravel() for one in map(trace.constant, filter(None, step.inputs[1:])) if one is not None]
    if len(told) < sum(map(bool, step.inputs[1:])):
        return None
    if step.op == "Gather":
        return [sizes[int(one)] for one in told[0]]
    if step.op == "Slice":
        if len(told) < 2:  # before opset 10
            return None
        start, stop, *more = (int(one[0]) for one in told)
        return sizes[start : stop : more[1] if len(more) > 1 else 1]
    return sizes


def keep(trace: Trace, sizes: Sequence[SizeOf | None], reason: str) -> None:
    """Axes whose sizes these are don't shrink."""
    for name, axis in (one for one in sizes if one is not None):
        factor = trace.value(name).factor(axis)
        if factor is not None:
            trace.whole(factor, axis, reason)


def match_shape(trace: Trace, step: Step, factors: Sequence[Factor], first: int = 0) -> None:
    """Where a node is told a shape of sizes that are read, its output shrinks as what they are read from, or neither.

    Args:
        factors: of the output.
        first: axis of the output that the shape's first element is for.
    """
    for element, size in enumerate(trace.computed.get(step.inputs[SHAPE_INPUT[step.op]], [])):
        if size is None:
            continue
        source, axis = trace.value(size[0]).factor(size[1]), element + first
        made = next((factor for factor in factors if axis in factor.axes), None)
        alone = source is not None and made is not None and len(source.axes) == len(made.axes) == 1
        if alone and source is not None and made is not None and source.atoms.shape == made.atoms.shape:
            trace.atoms.tie(source.atoms, made.atoms)
            continue
        if made is not None:
            trace.whole(made, axis, f"{step.where} is told the size of another axis")
        keep(trace, [size], f"{step.where} makes an axis of its size")
