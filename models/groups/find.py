"""Find which axes of which stored tensors must shrink together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import onnx

from onnx_spdy.models.groups.branches import branch_of
from onnx_spdy.models.groups.classes import Classes, active_axis
from onnx_spdy.models.groups.group import FFN, HEADS, INNER, RESIDUAL, Axis, Group, Size
from onnx_spdy.models.groups.labels import Labelled
from onnx_spdy.models.groups.rules import RULES, not_understood
from onnx_spdy.models.groups.sizes import follow_sizes, keep
from onnx_spdy.models.groups.trace import Layer, Step, Trace
from onnx_spdy.models.layers import find_layers

if TYPE_CHECKING:
    from onnx_spdy.models.prepared import Prepared

PRODUCTS = ("Gemm", "MatMul")
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
# Before it operators broadcast in another way.
OLDEST_OPSET = 7
ONE_UNIT = "it has one unit only"
UNKNOWN_SHAPE = "the shape of its input isn't known"


def find_groups(model: Prepared | onnx.ModelProto) -> list[Group]:
    """What can be removed from a network, channel by channel or head by head, and what can't and why.

    From the output axis of each layer the units are followed through the graph, operator by operator, up to the input
    axes of the layers that take them in. Where an operator isn't understood, or mixes units, they can't be removed: a
    group that can shrink gives the same results as the network in which the consumers' weights for the removed units
    are zero (see `masked`).

    Every layer with stored weights is the producer in a group, also those that can't be pruned otherwise; but those
    inside control flow.

    Returns:
        in graph order of the first producer; `skip` says why one can't shrink.
    """
    proto = model if isinstance(model, onnx.ModelProto) else model.proto
    trace = traced(proto)
    classes = Classes(trace.atoms, [factor for _, factor in trace.factors], trace.inclusions)
    found = [_group(trace, classes, cell) for cell in _cells(trace, classes)]
    found = [replace(group, branch=branch_of(trace, group)) if group.prunable else group for group in found]
    return _named(found + _not_followed(trace, proto))


def traced(model: onnx.ModelProto) -> Trace:
    """The graph's atoms, followed from its first node to its last."""
    trace = Trace(model)
    for value in (*model.graph.input, *model.graph.output):
        if value.name in trace.stored:
            trace.freeze(trace.value(value.name), f"'{value.name}' is also an input or output of the graph")
    for step in trace.steps:
        if step.op != "Constant":
            _follow(trace, step)
        elif step.outputs[0] not in trace.stored:
            trace.note(step.outputs[0], Labelled(step.shapes[0], stored=True))
    for value in model.graph.output:
        keep(trace, trace.computed.get(value.name, []), f"output '{value.name}' of the graph is its size")
        trace.freeze(trace.value(value.name), f"output '{value.name}' of the graph keeps its shape")
    trace.finish()
    return trace


def _follow(trace: Trace, step: Step) -> None:
    follow_sizes(trace, step)
    rule = RULES.get(step.op, not_understood) if step.opset >= OLDEST_OPSET else not_understood
    found = rule(trace, step)
    names = [name for name in step.inputs if name]
    stored = bool(names) and step.op not in RANDOM and all(trace.value(name).stored for name in names)
    for number, (name, shape) in enumerate(zip(step.outputs, step.shapes, strict=True)):
        if name:
            trace.note(name, Labelled(shape, found[number] if number < len(found) else (), stored))


def _cells(trace: Trace, classes: Classes) -> list[np.ndarray]:
    """The classes that belong to one group, each time: all that are in the same values, and all frozen or none.

    Returns:
        classes in the order of their first producer's outputs.
    """
    made = np.concatenate([classes.of(layer.atoms) for layer in trace.producers] or [np.zeros(0, int)])
    first = np.sort(np.unique(made, return_index=True)[1])
    ordered = made[first]  # in the order in which they are made
    position = np.full(trace.atoms.count, -1)
    position[ordered] = np.arange(len(ordered))
    cell = (classes.reason[ordered] >= 0).astype(int)
    seen: set[int] = set()
    for _, factor in trace.factors:
        if id(factor.atoms) in seen:
            continue
        seen.add(id(factor.atoms))
        inside = position[classes.of(factor.atoms)]
        member = np.zeros(len(ordered), int)
        member[inside[inside >= 0]] = 1
        if member.any():
            cell = np.unique(2 * cell + member, return_inverse=True)[1]
    numbers = list(dict.fromkeys(cell.tolist()))
    return [ordered[cell == number] for number in numbers]


def _group(trace: Trace, classes: Classes, cell: np.ndarray) -> Group:
    unit = np.full(trace.atoms.count, -1)
    unit[cell] = np.arange(len(cell))
    unit = unit[classes.of(np.arange(trace.atoms.count))]  # of each atom; -1 for those of other groups
    producers, consumers = _touching(trace.producers, unit), _touching(trace.consumers, unit)
    skip = classes.why(cell)
    if skip is None and len(cell) == 1:
        skip = ONE_UNIT
    return Group(
        name=producers[0].name,
        kind=_kind(trace, unit, producers, consumers),
        units=len(cell),
        axes=_axes(trace, unit, len(cell)),
        sizes=_sizes(trace, classes, unit, len(cell)),
        producers=tuple(dict.fromkeys(layer.name for layer in producers)),
        consumers=tuple(dict.fromkeys(layer.name for layer in consumers)),
        values=_values(trace, unit),
        skip=skip,
    )


def _touching(layers: Iterable[Layer], unit: np.ndarray) -> list[Layer]:
    return [layer for layer in layers if (unit[layer.atoms] >= 0).any()]


def _kind(trace: Trace, unit: np.ndarray, producers: Sequence[Layer], consumers: Sequence[Layer]) -> str:
    for kind, marks in ((HEADS, trace.attended), (RESIDUAL, trace.added)):
        if any((unit[atoms] >= 0).any() for atoms in marks):
            return kind
    products = all(layer.op in PRODUCTS for layer in (*producers, *consumers))
    return FFN if products and consumers else INNER


def _axes(trace: Trace, unit: np.ndarray, units: int) -> tuple[Axis, ...]:
    taken, made = (np.zeros(len(unit), bool) for _ in range(2))
    for marked, layers in ((taken, trace.consumers), (made, trace.producers)):
        for layer in layers:
            marked[layer.atoms] = True
    found = []
    for name, axes in trace.own.items():
        for axis, atoms in enumerate(axes):
            if atoms is not None and (unit[atoms] >= 0).any():
                mine = atoms[unit[atoms] >= 0]
                role = "in" if taken[mine].any() else "out" if made[mine].any() else "between"
                found.append(Axis(name, axis, role, _indices(unit[atoms], units)))
    return tuple(found)


def _indices(unit: np.ndarray, units: int) -> tuple[tuple[int, ...], ...]:
    """For each unit where it is in a vector of units."""
    order = np.argsort(unit, kind="stable")
    bounds = np.searchsorted(unit[order], np.arange(units + 1))
    return tuple(tuple(order[start:stop].tolist()) for start, stop in pairwise(bounds))


def _sizes(trace: Trace, classes: Classes, unit: np.ndarray, units: int) -> tuple[Size, ...]:
    found = []
    for site in trace.sites:
        if not (unit[site.factor.atoms] >= 0).any():
            continue
        position = site.factor.axes.index(site.axis)
        if active_axis(classes.of(site.factor.atoms)) != position:
            continue
        profile = np.moveaxis(unit[site.factor.atoms], position, 0)
        part = profile.reshape(len(profile), -1)[site.start : site.stop, 0]
        less = site.sign * np.bincount(part[part >= 0], minlength=units)
        if less.any():
            found.append(Size(site.node, site.place, site.element, tuple(less.tolist())))
    return tuple(found)


def _values(trace: Trace, unit: np.ndarray) -> tuple[str, ...]:
    touched = (name for name, factor in trace.factors if (unit[factor.atoms] >= 0).any() and name not in trace.own)
    return tuple(dict.fromkeys(touched))


def _not_followed(trace: Trace, model: onnx.ModelProto) -> list[Group]:
    """Layers without an axis to follow."""
    made = {layer.name for layer in trace.producers}
    found = []
    for layer in find_layers(model):
        if layer.prunable and layer.name not in made:
            why = ONE_UNIT if layer.shape[0] == 1 else UNKNOWN_SHAPE
            found.append(Group(layer.name, INNER, layer.shape[0], (), (), (layer.name,), (), (), why))
    return found


def _named(groups: list[Group]) -> list[Group]:
    """With different names: the first of a layer has its name, the others a number too."""
    count: dict[str, int] = {}
    found = []
    for group in groups:
        number = count[group.name] = count.get(group.name, 0) + 1
        found.append(group if number == 1 else replace(group, name=f"{group.name}#{number}"))
    return found
