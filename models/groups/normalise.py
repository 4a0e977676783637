"""Normalisations, reductions, pooling and what else works along some axes only: these stay, the others go through."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_spdy.models.groups.elementwise import Outputs
from onnx_spdy.models.groups.labels import Factor, Labelled
from onnx_spdy.models.groups.moves import frozen
from onnx_spdy.models.groups.sizes import keep, match_shape
from onnx_spdy.models.groups.trace import Site, Step, Trace


def along_axis(trace: Trace, step: Step) -> Outputs:
    """Softmax and others along one axis; before opset 13 Softmax is along this one and all behind it."""
    x = trace.value(step.inputs[0])
    if x.shape is None:
        return frozen(trace, step, "with a shape that isn't known")
    flat = step.op in ("Hardmax", "LogSoftmax", "Softmax") and step.opset < 13
    axis = step.attributes.get("axis", 1 if flat else 0 if step.op == "CumSum" else -1) % len(x.shape)
    if step.op == "CumSum":
        return [_kept(trace, step, x, range(len(x.shape)), "sums along it")]
    return [_kept(trace, step, x, range(axis, len(x.shape) if flat else axis + 1), "normalises along it")]


def _kept(trace: Trace, step: Step, x: Labelled, axes: Iterable[int], what: str) -> tuple[Factor, ...]:
    """The factors, none of which shrinks along these axes."""
    for factor in x.factors:
        for axis in set(axes) & set(factor.axes):
            trace.whole(factor, axis, f"{step.where} {what}")
    return x.factors


def reduce(trace: Trace, step: Step) -> Outputs:
    """Sums, means, ... along some axes, which are left out, or have size 1 then."""
    x = trace.value(step.inputs[0])
    told = trace.constant(step.inputs[1]) if step.has(1) else None
    if x.shape is None or (step.has(1) and told is None):
        return frozen(trace, step, "along axes or of a shape that isn't known")
    axes = step.attributes.get("axes", [] if told is None else told.tolist())
    along = {axis % len(x.shape) for axis in axes} if axes else set(range(len(x.shape)))
    return [_reduced(trace, step, x, along, bool(step.attributes.get("keepdims", 1)))]


def arg_reduce(trace: Trace, step: Step) -> Outputs:
    """The place of the largest or smallest along one axis."""
    x = trace.value(step.inputs[0])
    if x.shape is None:
        return frozen(trace, step, "with a shape that isn't known")
    axis = step.attributes.get("axis", 0) % len(x.shape)
    return [_reduced(trace, step, x, {axis}, bool(step.attributes.get("keepdims", 1)))]


def _reduced(trace: Trace, step: Step, x: Labelled, along: set[int], keepdims: bool) -> tuple[Factor, ...]:
    found = []
    for factor in _kept(trace, step, x, along, "reduces it"):
        for axis in along & set(factor.axes):
            factor = factor.first_along(axis)
        if factor.axes:
            shift = {axis: axis - sum(one < axis for one in along) * (not keepdims) for axis in factor.axes}
            found.append(factor.moved(shift))
    return tuple(found)


def pool(trace: Trace, step: Step) -> Outputs:
    """Pooling of (batch, channels, *space)."""
    x = trace.value(step.inputs[0])
    if x.shape is None or (len(step.outputs) > 1 and step.outputs[1]):
        return frozen(trace, step, "with places of the largest values or a shape that isn't known")
    return [_reduced(trace, step, x, set(range(2, len(x.shape))), keepdims=True)]


def batch_norm(trace: Trace, step: Step) -> Outputs:
    """Statistics, scale and bias of each channel."""
    values = [trace.value(name) for name in step.inputs]
    if step.attributes.get("training_mode", 0) or not step.attributes.get("spatial", 1) or values[0].shape is None:
        return frozen(trace, step, "in training mode, of each position by itself, or with a shape that isn't known")
    return [_per_channel(trace, step, values[0], values[1:])]


def _per_channel(trace: Trace, step: Step, x: Labelled, parameters: Iterable[Labelled]) -> tuple[Factor, ...]:
    """`x` with vectors that are applied along axis 1."""
    rank = len(x.shape or ())
    vectors = [
        Labelled(
            (1, *one.shape, *[1] * (rank - 2)) if one.shape is not None and rank > 1 else None,
            tuple(factor.moved({0: 1}) for factor in one.factors), one.stored,
        )
        for one in parameters
    ]  # fmt: skip
    return trace.merge([x, *vectors], x.shape, step.where)


def instance_norm(trace: Trace, step: Step) -> Outputs:
    """Along all axes of space; scale and bias of each channel."""
    values = [trace.value(name) for name in step.inputs]
    if values[0].shape is None:
        return frozen(trace, step, "with a shape that isn't known")
    _kept(trace, step, values[0], range(2, len(values[0].shape)), "normalises along it")
    return [_per_channel(trace, step, values[0], values[1:])]


def layer_norm(trace: Trace, step: Step) -> Outputs:
    """Along an axis and all behind it, with scale and bias."""
    values = [trace.value(name) for name in step.inputs if name]
    x = values[0]
    if x.shape is None or any(step.outputs[1:]):
        return frozen(trace, step, "with statistics as outputs or a shape that isn't known")
    axis = step.attributes.get("axis", -1) % len(x.shape)
    _kept(trace, step, x, range(axis, len(x.shape)), "normalises over it: results would change")
    return [trace.merge(values, x.shape, step.where)]


def group_norm(trace: Trace, step: Step) -> Outputs:
    """Groups of channels are normalised by themselves: they are the units."""
    x, *parameters = (trace.value(name) for name in step.inputs)
    channels = trace.vector(x, 1, f"{step.where} normalises along it")
    if channels is None or x.shape is None:
        return frozen(trace, step, "of channels that keep their number")
    groups = step.attributes["num_groups"]
    _kept(trace, step, x, range(2, len(x.shape)), "normalises along it")
    by_group = channels.reshape(groups, -1)
    trace.atoms.tie(by_group[:, :1], by_group)
    for one in parameters:
        own = trace.vector(one, 0, f"{step.where} scales with it")
        width = (one.shape or (0,))[0]
        trace.match(by_group[:, 0] if width == groups else channels, own, f"{step.where} scales with a computed value")
    trace.sites.append(Site(step.name, "num_groups", 0, Factor((0,), by_group[:, 0]), 0, 0, groups))
    return [(Factor((1,), channels),)]


def pad(trace: Trace, step: Step) -> Outputs:
    """Axes that get wider stay as they are."""
    x = trace.value(step.inputs[0])
    pads = step.attributes.get("pads", trace.constant(step.inputs[1]) if step.has(1) else None)
    axes = trace.constant(step.inputs[3]) if step.has(3) else None
    if x.shape is None or pads is None or (step.has(3) and axes is None):
        return frozen(trace, step, "of a width or shape that isn't known")
    places = range(len(x.shape)) if axes is None else [int(axis) % len(x.shape) for axis in axes]
    padded = {axis for k, axis in enumerate(places) if pads[k] or pads[k + len(places)]}
    factors = _kept(trace, step, x, padded, "pads it")
    return [tuple(factor for factor in factors if not padded & set(factor.axes))]


def resize(trace: Trace, step: Step) -> Outputs:
    """Axes that get another size stay as they are."""
    x, shape = trace.value(step.inputs[0]), step.shapes[0]
    if x.shape is None or shape is None:
        return frozen(trace, step, "with a shape that isn't known")
    if step.has(3) and "axes" in step.attributes and step.inputs[3] in trace.computed:
        keep(trace, trace.computed[step.inputs[3]], f"{step.where} takes it as the size of another axis")
        return frozen(trace, step, "of some axes, to sizes that are computed")
    if step.attributes.get("coordinate_transformation_mode") == b"tf_crop_and_resize":
        return frozen(trace, step, "which crops")
    changed = {axis for axis, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b}
    factors = [one for one in _kept(trace, step, x, changed, "resizes it") if not changed & set(one.axes)]
    if step.has(3):  # sizes, not scales
        axes = list(step.attributes.get("axes", range(len(shape))))
        for factor in factors:
            for axis in set(factor.axes) & set(axes):
                trace.size(step, 3, axes.index(axis), factor, axis)
        match_shape(trace, step, factors)
    return [tuple(factors)]
