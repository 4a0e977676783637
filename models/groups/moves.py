"""Operators that move elements: into another shape or order, apart or together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from onnx_spdy.models.groups.elementwise import Outputs
from onnx_spdy.models.groups.labels import Factor, Labelled, reshaped
from onnx_spdy.models.groups.sizes import match_shape
from onnx_spdy.models.groups.trace import Site, Step, Trace


def reshape(trace: Trace, step: Step) -> Outputs:
    """To the shape that its second input says: sizes there that aren't worked out become smaller."""
    x = trace.value(step.inputs[0])
    factors = _reshaped(trace, step, x)
    told = trace.constant(step.inputs[1])
    copied = set() if told is None else set(np.flatnonzero(told == 0).tolist())
    for factor in factors:
        for axis in set(factor.axes) - copied:
            trace.size(step, 1, axis, factor, axis)
    for axis in copied:
        _copy_size(trace, step, x.factor(axis), next((one for one in factors if axis in one.axes), None), axis)
    match_shape(trace, step, factors)
    return [factors]


def _copy_size(trace: Trace, step: Step, before: Factor | None, after: Factor | None, axis: int) -> None:
    """An axis has the size of the input's axis of that number: it has to be the same one, or neither shrinks."""
    if before and after and before.axes == after.axes and np.array_equal(before.atoms, after.atoms):
        return
    for factor in filter(None, (before, after)):
        trace.whole(factor, axis, f"{step.where} copies a size from another axis")


def reshape_by_rule(trace: Trace, step: Step) -> Outputs:
    """Flatten, Squeeze, Unsqueeze: the output's sizes follow from the input's."""
    x = trace.value(step.inputs[0])
    if step.op == "Squeeze" and not step.has(1) and "axes" not in step.attributes:
        trace.freeze(x, f"{step.where} drops any axis of size 1")
        return [()]
    return [_reshaped(trace, step, x)]


def _reshaped(trace: Trace, step: Step, x: Labelled) -> tuple[Factor, ...]:
    shape = step.shapes[0]
    if not x.factors:
        return ()
    if x.shape is None or shape is None or np.prod(x.shape) != np.prod(shape) or 0 in shape:
        trace.freeze(x, f"{step.where}, of no values or with a shape that isn't known")
        return ()
    factors = reshaped(x.factors, x.shape, shape)
    if factors is None:
        trace.freeze(x, f"{step.where} merges two axes that could shrink")
        return ()
    return factors


def transpose(trace: Trace, step: Step) -> Outputs:
    """Axis k of the output is axis perm[k] of the input."""
    x = trace.value(step.inputs[0])
    if x.shape is None:
        return frozen(trace, step, "with a shape that isn't known")
    order = list(step.attributes.get("perm", range(len(x.shape))[::-1]))
    return [tuple(factor.moved({axis: order.index(axis) for axis in factor.axes}) for factor in x.factors)]


def concat(trace: Trace, step: Step) -> Outputs:
    """Pieces one after the other along an axis; along the others they go together."""
    values = [trace.value(name) for name in step.inputs]
    shape = step.shapes[0]
    if shape is None or any(value.shape is None for value in values):
        return frozen(trace, step, "with a shape that isn't known")
    axis = step.attributes["axis"] % len(shape)
    others = trace.merge(values, shape, step.where, free=(axis,))
    pieces = [value.factor(axis) for value in values]
    axes = {piece.axes for piece in pieces if piece is not None}
    if not axes:
        return [others]
    several = len(axes) > 1 or any(set(*axes) & set(factor.axes) for factor in others)
    if several or (axes != {(axis,)} and None in pieces):
        for factor in (*others, *(piece for piece in pieces if piece is not None)):
            trace.atoms.freeze(factor.atoms, f"{step.where} of values whose axes were reshaped in different ways")
        return [others]
    parts = [
        _of_fixed_width(trace, step, (value.shape or ())[axis]) if piece is None else piece.atoms
        for piece, value in zip(pieces, values, strict=True)
    ]
    (places,) = axes
    return [(*others, Factor(places, np.concatenate(parts, axis=places.index(axis))))]


def _of_fixed_width(trace: Trace, step: Step, size: int) -> np.ndarray:
    atoms = trace.atoms.new(size)
    trace.atoms.freeze(atoms, f"a piece of {step.where} keeps its width")
    return atoms


def split(trace: Trace, step: Step) -> Outputs:
    """Parts along an axis, of sizes that are told, or equal ones."""
    x = trace.value(step.inputs[0])
    if x.shape is None or any(shape is None for shape in step.shapes):
        return frozen(trace, step, "with a shape that isn't known")
    axis = step.attributes.get("axis", 0) % len(x.shape)
    bounds = np.cumsum([0, *(shape[axis] for shape in step.shapes if shape is not None)])
    factor = x.factor(axis)
    if factor is None:
        return [x.factors for _ in step.outputs]
    place: int | str = 1 if step.has(1) else "split"
    if place == 1 and step.inputs[1] not in trace.stored:
        trace.whole(factor, axis, f"{step.where} computes its sizes")
    elif place == 1 or "split" in step.attributes:
        trace.sites += [
            Site(step.name, place, k, factor, axis, int(start), int(stop))
            for k, (start, stop) in enumerate(pairwise(bounds))
        ]
    else:
        _tie_parts(trace, step, factor, axis, bounds)
    others = [one for one in x.factors if one is not factor]
    return [(*others, Factor(factor.axes, along(factor, axis, slice(start, stop)))) for start, stop in pairwise(bounds)]


def _tie_parts(trace: Trace, step: Step, factor: Factor, axis: int, bounds: np.ndarray) -> None:
    """Parts that are equal without being told stay equal."""
    parts = [along(factor, axis, slice(start, stop)) for start, stop in pairwise(bounds)]
    if len({part.shape for part in parts}) > 1:
        trace.whole(factor, axis, f"{step.where} has parts that aren't equal, and doesn't say their sizes")
        return
    for part in parts[1:]:
        trace.atoms.tie(parts[0], part)


def along(factor: Factor, axis: int, chosen: slice) -> np.ndarray:
    """The atoms of some indices of an axis."""
    return factor.atoms[tuple(chosen if one == axis else slice(None) for one in factor.axes)]


def slicing(trace: Trace, step: Step) -> Outputs:
    """A range of an axis, or of several."""
    x = trace.value(step.inputs[0])
    told = _ranges(trace, step, len(x.shape or ()))
    if x.shape is None or told is None:
        return frozen(trace, step, "whose range or shape isn't known")
    factors = list(x.factors)
    for element, (axis, start, stop, stride) in enumerate(told):
        number = next((k for k, factor in enumerate(factors) if axis in factor.axes), None)
        if number is None:
            continue
        factor = factors[number]
        if stride != 1:
            trace.whole(factor, axis, f"{step.where} takes every {stride}th of it")
        else:
            _note_range(trace, step, element, factor, axis, (start, stop))
        chosen = slice(start, None if stride < 0 and stop < -x.shape[axis] else stop, stride)
        factors[number] = Factor(factor.axes, along(factor, axis, chosen))
    return [tuple(factors)]


def _ranges(trace: Trace, step: Step, rank: int) -> list[tuple[int, int, int, int]] | None:
    """(axis, start, stop, step) of a Slice; None where they are computed."""
    if "starts" in step.attributes:
        starts, stops = step.attributes["starts"], step.attributes["ends"]
        axes, strides = step.attributes.get("axes", range(len(starts))), [1] * len(starts)
    else:
        told = [trace.constant(name) if name else None for name in step.inputs[1:]]
        if any(one is None for one, name in zip(told, step.inputs[1:], strict=True) if name) or len(told) < 2:
            return None
        given = [None if one is None else one.tolist() for one in told]
        starts, stops = given[0] or [], given[1] or []
        axes = given[2] if len(given) > 2 and given[2] is not None else range(len(starts))
        strides = given[3] if len(given) > 3 and given[3] is not None else [1] * len(starts)
    return [(a % rank, b, c, d) for a, b, c, d in zip(axes, starts, stops, strides, strict=True)] if rank else None


def _note_range(trace: Trace, step: Step, element: int, factor: Factor, axis: int, bounds: tuple[int, int]) -> None:
    """Where a range begins and ends moves with the indices before it; one counted from the end with those behind."""
    size = factor.atoms.shape[factor.axes.index(axis)]
    by_attribute = "starts" in step.attributes
    for place, name, bound in ((1, "starts", bounds[0]), (2, "ends", bounds[1])):
        where = name if by_attribute else place
        if 0 < bound < size:
            trace.sites.append(Site(step.name, where, element, factor, axis, 0, bound))
        elif -size < bound < 0:
            trace.sites.append(Site(step.name, where, element, factor, axis, size + bound, size, sign=-1))


def gather(trace: Trace, step: Step) -> Outputs:
    """Some indices of an axis, which therefore stays; along the others the data goes through."""
    data, indices = (trace.value(name) for name in step.inputs)
    trace.freeze(indices, f"{step.where} takes it as indices")
    if data.shape is None or indices.shape is None:
        return frozen(trace, step, "with a shape that isn't known")
    axis, more = step.attributes.get("axis", 0) % len(data.shape), len(indices.shape) - 1
    told = trace.constant(step.inputs[1])
    factors = []
    for factor in data.factors:
        if axis in factor.axes:
            trace.whole(factor, axis, f"{step.where} takes indices of it")
            if len(factor.axes) == 1:
                continue
            # One index of a whole axis stands for all of them; a known one keeps queries, keys and values apart.
            first = int(told.flat[0]) if told is not None and told.size else 0
            left = tuple(one for one in factor.axes if one != axis)
            factor = Factor(left, factor.atoms.take(first, axis=factor.axes.index(axis)))
        factors.append(factor.moved({one: one + more * (one > axis) for one in factor.axes}))
    return [tuple(factors)]


def depth_to_space(trace: Trace, step: Step) -> Outputs:
    """Each block of channels makes one, and goes with it."""
    x = trace.value(step.inputs[0])
    channels = trace.vector(x, 1, f"{step.where} mixes it")
    if channels is None or len(x.factors) > 1:
        return frozen(trace, step, "of axes that are mixed")
    block = step.attributes["blocksize"] ** 2
    last = step.attributes.get("mode", b"DCR") == b"CRD"
    blocks = channels.reshape(-1, block) if last else channels.reshape(block, -1).T
    trace.atoms.tie(blocks[:, :1], blocks)
    return [(Factor((1,), blocks[:, 0]),)]


def expand(trace: Trace, step: Step) -> Outputs:
    """To the shape that its second input says."""
    x, shape = trace.value(step.inputs[0]), step.shapes[0]
    factors = trace.merge([x], shape, step.where)
    told = trace.value(step.inputs[1]).shape
    added = len(shape or ()) - (told[0] if told else 0)  # where the shape told is shorter than the input's
    for factor in factors:
        for axis in factor.axes:
            if axis >= added:
                trace.size(step, 1, axis - added, factor, axis)
    match_shape(trace, step, factors, added)
    return [factors]


def tile(trace: Trace, step: Step) -> Outputs:
    """So many copies along each axis."""
    x, repeats = trace.value(step.inputs[0]), trace.constant(step.inputs[1])
    if repeats is None or x.shape is None:
        return frozen(trace, step, "of a number of copies or a shape that isn't known")
    return [tuple(Factor(one.axes, np.tile(one.atoms, [repeats[axis] for axis in one.axes])) for one in x.factors)]


def shape_of(trace: Trace, step: Step) -> Outputs:
    """The sizes; what becomes of them is looked at where they are read."""
    rank = len(trace.value(step.inputs[0]).shape or ())
    if rank == 0:
        return frozen(trace, step, "of a value whose shape isn't known")
    sizes = [(step.inputs[0], axis) for axis in range(rank)]
    trace.computed[step.outputs[0]] = [*sizes[step.attributes.get("start", 0) : step.attributes.get("end", rank)]]
    return [()]


def frozen(trace: Trace, step: Step, why: str = "") -> Outputs:
    """Nothing that the node reads can be removed."""
    for name in dict.fromkeys(step.inputs):
        trace.freeze(trace.value(name), f"{step.where}{f', {why}' if why else ''}")
    return [()]
