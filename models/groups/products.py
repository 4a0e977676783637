"""Convolutions and matrix products: units end on the input axis of a weight, and begin on its output axis."""

from __future__ import annotations

import numpy as np

from onnx_spdy.models.groups.elementwise import Outputs
from onnx_spdy.models.groups.labels import Factor, Labelled
from onnx_spdy.models.groups.trace import Layer, Site, Step, Trace


def matmul(trace: Trace, step: Step) -> Outputs:
    """(..., M, K) x (..., K, N)."""
    a, b = (trace.value(name) for name in step.inputs)
    return [_product(trace, step, a, b)]


def gemm(trace: Trace, step: Step) -> Outputs:
    """(M, K) x (K, N) + (M, N)."""
    a, b = (
        _transposed(trace.value(name)) if step.attributes.get(key, 0) else trace.value(name)
        for name, key in zip(step.inputs[:2], ("transA", "transB"), strict=True)
    )
    product = Labelled(step.shapes[0], _product(trace, step, a, b), a.stored and b.stored)
    more = [trace.value(step.inputs[2])] if step.has(2) else []
    return [trace.merge([product, *more], step.shapes[0], step.where)]


def _transposed(value: Labelled) -> Labelled:
    if value.shape is None or len(value.shape) != 2:
        return Labelled(None, value.factors, value.stored)
    return Labelled(value.shape[::-1], tuple(one.moved([1, 0]) for one in value.factors), value.stored)


def _product(trace: Trace, step: Step, a: Labelled, b: Labelled) -> tuple[Factor, ...]:
    shape = step.shapes[0]
    if a.shape is None or b.shape is None or shape is None or min(len(a.shape), len(b.shape)) < 2:
        for value in (a, b):
            trace.freeze(value, f"{step.where}, of vectors or with a shape that isn't known")
        return ()
    if a.stored != b.stored:
        if not trace.is_moved(step.inputs[0 if a.stored else 1]):
            return _not_understood(trace, step, a, b)[0]
        return _layer(trace, step, a, b)
    return _of_activations(trace, step, a, b)


def _layer(trace: Trace, step: Step, a: Labelled, b: Labelled) -> tuple[Factor, ...]:
    """A product with a stored weight."""
    summed = (len(a.shape or ()) - 1, len(b.shape or ()) - 2)
    rows, columns = (trace.vector(x, k, f"{step.where} sums over it") for x, k in zip((a, b), summed, strict=True))
    trace.match(rows, columns, f"the input of {step.where} keeps its width")
    weight, made, ins = (b, summed[1] + 1, columns) if b.stored else (a, summed[0] - 1, rows)
    outs = trace.vector(weight, made, f"{step.where} makes one width of it")
    if ins is not None:
        trace.consumers.append(Layer(step.name, step.op, ins))
    if outs is not None:
        trace.producers.append(Layer(step.name, step.op, outs))
    left = [[one for one in x.factors if axis not in one.axes] for x, axis in zip((a, b), summed, strict=True)]
    return _rows_and_columns(trace, step, (a, b), left)


def _of_activations(trace: Trace, step: Step, a: Labelled, b: Labelled) -> tuple[Factor, ...]:
    """A product of two computed values: what it sums over stays, what it is batched over (heads) goes through."""
    left: list[list[Factor]] = []
    for value, summed in ((a, len(a.shape or ()) - 1), (b, len(b.shape or ()) - 2)):
        left.append([])
        for factor in value.factors:
            if summed in factor.axes:
                trace.whole(factor, summed, f"{step.where}, a product of two activations, sums over it")
                factor = factor.first_along(summed)
            if factor.axes:
                left[-1].append(factor)
    factors = _rows_and_columns(trace, step, (a, b), left)
    trace.attended += [factor.atoms for factor in factors if max(factor.axes) < len(step.shapes[0] or ()) - 2]
    return factors


def _rows_and_columns(
    trace: Trace, step: Step, values: tuple[Labelled, Labelled], left: list[list[Factor]]
) -> tuple[Factor, ...]:
    """The factors of the product: rows of the first, columns of the second, and what both are batched over.

    Args:
        left: of each value, those without the axis that is summed over.
    """
    shape = step.shapes[0] or ()
    rank, batched, ends = len(shape), list[Labelled](), list[Factor]()
    for value, factors, kept in zip(values, left, (rank - 2, rank - 1), strict=True):
        shift = rank - len(value.shape or ())
        through = []
        for factor in (one.moved({axis: axis + shift for axis in one.axes}) for one in factors):
            if factor.axes == (kept,):
                ends.append(factor)
            elif kept in factor.axes:
                trace.whole(factor, kept, f"{step.where} doesn't batch over it")
                through.append(factor.first_along(kept))
            else:
                through.append(factor)
        sizes = (*[1] * shift, *(value.shape or ())[:-2], *shape[-2:])
        batched.append(Labelled(sizes, tuple(through)))
    return (*trace.merge(batched, shape, step.where, free=(rank - 2, rank - 1)), *ends)


def conv(trace: Trace, step: Step) -> Outputs:
    """Weights of (out, in / groups, *kernel); units of a grouped convolution are its groups."""
    x, weight = (trace.value(name) for name in step.inputs[:2])
    if x.shape is None or not trace.is_moved(step.inputs[1]):
        return _not_understood(trace, step, x, weight)
    ins, outs = _input_channels(trace, step, x), _weight_axis(trace, step, weight, 0)
    groups = step.attributes.get("group", 1)
    if groups == 1:
        _consume(trace, step, ins, _weight_axis(trace, step, weight, 1))
        if outs is not None:
            trace.producers.append(Layer(step.name, step.op, outs))
    else:
        _by_groups(trace, step, groups, ins, outs)
        _keep(trace, _weight_axis(trace, step, weight, 1), f"{step.where} takes in all channels of a group")
    return _with_bias(trace, step, outs)


def conv_transpose(trace: Trace, step: Step) -> Outputs:
    """Weights of (in, out / groups, *kernel)."""
    x, weight = (trace.value(name) for name in step.inputs[:2])
    if x.shape is None or not trace.is_moved(step.inputs[1]):
        return _not_understood(trace, step, x, weight)
    ins, rows = _input_channels(trace, step, x), _weight_axis(trace, step, weight, 0)
    outs = _weight_axis(trace, step, weight, 1)
    groups = step.attributes.get("group", 1)
    if groups == 1:
        _consume(trace, step, ins, rows)
        if outs is not None:
            trace.producers.append(Layer(step.name, step.op, outs))
        return _with_bias(trace, step, outs)
    _by_groups(trace, step, groups, ins, rows)
    _keep(trace, outs, f"{step.where} makes all channels of a group")
    made = (weight.shape or (0, 0))[1]  # of each group
    return _with_bias(trace, step, None if rows is None else np.repeat(rows[:: len(rows) // groups], made))


def _not_understood(trace: Trace, step: Step, *values: Labelled) -> Outputs:
    for value in values:
        trace.freeze(value, f"{step.where}: its weight is computed, or the shape of its input isn't known")
    return [()]


def _input_channels(trace: Trace, step: Step, x: Labelled) -> np.ndarray | None:
    for factor in x.factors:
        if 1 not in factor.axes:
            trace.atoms.freeze(factor.atoms, f"{step.where} mixes it, as an axis of an image")
    return trace.vector(x, 1, f"{step.where} sums over it")


def _weight_axis(trace: Trace, step: Step, weight: Labelled, axis: int) -> np.ndarray | None:
    return trace.vector(weight, axis, f"{step.where} takes its weight apart in another way")


def _consume(trace: Trace, step: Step, ins: np.ndarray | None, columns: np.ndarray | None) -> None:
    trace.match(ins, columns, f"the input of {step.where} keeps its width")
    if columns is not None:
        trace.consumers.append(Layer(step.name, step.op, columns))


def _keep(trace: Trace, atoms: np.ndarray | None, reason: str) -> None:
    if atoms is not None:
        trace.atoms.freeze(atoms, reason)


def _by_groups(trace: Trace, step: Step, groups: int, ins: np.ndarray | None, stored: np.ndarray | None) -> None:
    """All input channels of a group, and all along the weight's first axis, go together."""
    trace.match(
        None if ins is None else ins[:: len(ins) // groups],
        None if stored is None else stored[:: len(stored) // groups],
        f"the input of {step.where} keeps its width",
    )
    for atoms in (ins, stored):
        if atoms is not None:
            by_group = atoms.reshape(groups, -1)
            trace.atoms.tie(by_group[:, :1], by_group)
    if stored is not None:
        first = Factor((0,), stored[:: len(stored) // groups])
        trace.sites.append(Site(step.name, "group", 0, first, 0, 0, groups))


def _with_bias(trace: Trace, step: Step, outs: np.ndarray | None) -> Outputs:
    if step.has(2):
        bias = trace.vector(trace.value(step.inputs[2]), 0, f"{step.where} adds it")
        trace.match(outs, bias, f"{step.where} adds a computed value")
    return [() if outs is None else (Factor((1,), outs),)]
