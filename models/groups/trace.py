"""Follow the atoms of stored tensors through a graph, from node to node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from onnx_spdy.models.graph import captured_names, inner_graphs, node_names
from onnx_spdy.models.groups.atoms import Atoms
from onnx_spdy.models.groups.labels import Factor, Labelled
from onnx_spdy.models.groups.shapes import all_shapes
from onnx_spdy.models.stored import values_of

SizeOf = tuple[str, int]  # a value and one of its axes
OWN_DOMAINS = ("", "ai.onnx")
# Zeros in what they read are zeros in what they make.
MOVING = ("Cast", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class Step:
    """A node as the rules see it.

    Attributes:
        inputs: names; "" for one that is left out.
        shapes: of the outputs, None where it isn't known.
        opset: of ONNX's own operators.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    attributes: Mapping[str, Any]
    opset: int

    @property
    def where(self) -> str:
        return f"{self.op} '{self.name}'"

    def has(self, position: int) -> bool:
        """Whether it has an input there."""
        return len(self.inputs) > position and self.inputs[position] != ""


@dataclass(frozen=True, eq=False)
class Layer:
    """A node that multiplies by stored weights, and the atoms of the axis that it makes or takes in."""

    name: str
    op: str
    atoms: np.ndarray


@dataclass(frozen=True, eq=False)
class Site:
    """A number that is the size of a part of an axis: of the indices from `start` to `stop`; with `sign` -1 from its
    end. See `Size` for where it is."""

    node: str
    place: int | str
    element: int
    factor: Factor
    axis: int
    start: int
    stop: int
    sign: int = 1


class Trace:
    """What is known of the values of a graph so far, and what the rules find out.

    Attributes:
        atoms: of all stored tensors.
        stored: tensors by name: initializers, and values of Constant nodes.
        own: for each stored tensor, for each of its axes the atoms; None for an axis of size 1.
        factors: of all values, with their names.
        producers, consumers: layers with the atoms of their outputs, and of their inputs on the weights.
        attended, added: atoms of axes along which products of two activations are batched, and that additions couple.
        sites: numbers that hold sizes.
        shared: (computed shape, element) -> the nodes that take a size from there, which a stored tensor holds.
        computed: value -> for each of its elements the axis whose size it is; None for another number.
        inclusions: (factor, another one on some of its axes): where the first shrinks along one of these, the second
            goes with it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.atoms = Atoms()
        self.stored: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.stored |= {
            node.output[0]: attribute.t
            for node in graph.node
            if node.op_type == "Constant" and node.domain in OWN_DOMAINS
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.own: dict[str, list[np.ndarray | None]] = {}
        self.factors: list[tuple[str, Factor]] = []
        self.producers: list[Layer] = []
        self.consumers: list[Layer] = []
        self.attended: list[np.ndarray] = []
        self.added: list[np.ndarray] = []
        self.sites: list[Site] = []
        self.shared: dict[tuple[str, int], list[tuple[str, Site]]] = {}
        self.computed: dict[str, list[SizeOf | None]] = {}
        self.inclusions: list[tuple[Factor, Factor]] = []
        self.shapes = all_shapes(model)
        self.steps = read_steps(model, self.shapes)
        self.makers = {output: step for step in self.steps for output in step.outputs}
        self.readers: dict[str, list[Step]] = {}
        for step in self.steps:
            for name in dict.fromkeys(step.inputs):
                self.readers.setdefault(name, []).append(step)
        self.outputs = {value.name for value in graph.output}
        self._values: dict[str, Labelled] = {}
        for name, tensor in self.stored.items():
            self._store(name, tuple(tensor.dims))

    def _store(self, name: str, shape: tuple[int, ...]) -> None:
        self.own[name] = [self.atoms.new(size) if size > 1 else None for size in shape]
        factors = [Factor((axis,), atoms) for axis, atoms in enumerate(self.own[name]) if atoms is not None]
        self.note(name, Labelled(shape, tuple(factors), stored=True))

    def value(self, name: str) -> Labelled:
        """What is known of a value."""
        return self._values.get(name, Labelled(self.shapes.get(name)))

    def note(self, name: str, value: Labelled) -> None:
        """Remember a value. Axes of size 1 can't shrink: what is on one alone is frozen."""
        factors = []
        for factor in value.factors:
            if factor.atoms.size == 0:
                continue
            for axis in reversed(factor.axes):
                if factor.atoms.shape[factor.axes.index(axis)] == 1 and len(factor.axes) > 1:
                    factor = factor.first_along(axis)
            if factor.atoms.size == 1:
                self.atoms.freeze(factor.atoms, f"'{name}' is one value of it")
            else:
                factors.append(factor)
        self._values[name] = Labelled(value.shape, tuple(factors), value.stored)
        self.factors += [(name, factor) for factor in factors]

    def constant(self, name: str) -> np.ndarray | None:
        """The values of a stored tensor; None if it isn't one."""
        return values_of(self.stored[name]) if name in self.stored else None

    def is_moved(self, name: str) -> bool:
        """Whether a value has the numbers of stored tensors, at most in another order or form."""
        maker = self.makers.get(name)
        return name in self.stored or (maker is not None and maker.op in MOVING and self.is_moved(maker.inputs[0]))

    def freeze(self, value: Labelled, reason: str) -> None:
        """Nothing of a value can be removed."""
        for factor in value.factors:
            self.atoms.freeze(factor.atoms, reason)

    def whole(self, factor: Factor, axis: int, reason: str) -> None:
        """A factor doesn't shrink along an axis: it does along another one, or not at all."""
        if len(factor.axes) == 1:
            self.atoms.freeze(factor.atoms, reason)
        else:
            self.atoms.tie(factor.atoms.take([0], axis=factor.axes.index(axis)), factor.atoms)

    def vector(self, value: Labelled, axis: int, reason: str) -> np.ndarray | None:
        """(size of the axis,) the atoms along an axis, which has to be the one that shrinks; None if it can't."""
        factor = value.factor(axis)
        if factor is None:
            return None
        for other in factor.axes:
            if other != axis:
                self.whole(factor, other, reason)
        first = np.moveaxis(factor.atoms, factor.axes.index(axis), 0)
        return first.reshape(len(first), -1)[:, 0]

    def match(self, some: np.ndarray | None, others: np.ndarray | None, reason: str) -> None:
        """Tie two vectors; where one of them can't shrink, freeze the other."""
        if some is not None and others is not None:
            self.atoms.tie(some, others)
        for one, other in ((some, others), (others, some)):
            if one is not None and other is None:
                self.atoms.freeze(one, reason)

    def merge(
        self, values: Iterable[Labelled], shape: Sequence[int] | None, reason: str, free: Sequence[int] = ()
    ) -> tuple[Factor, ...]:
        """The factors of values that are broadcast to one shape and combined element by element.

        Args:
            free: axes that the caller takes care of: factors on them are left out.
        """
        values = list(values)
        if shape is None or any(value.shape is None for value in values):
            for value in values:
                self.freeze(value, f"{reason}, with a shape that isn't known")
            return ()
        moved: list[Factor] = []
        fixed: set[int] = set()
        for value in values:
            own = value.shape or ()
            shift = len(shape) - len(own)
            factors = [factor.moved({axis: axis + shift for axis in factor.axes}) for factor in value.factors]
            moved += [factor for factor in factors if not set(factor.axes) & set(free)]
            covered = {axis for factor in factors for axis in factor.axes}
            fixed |= {axis + shift for axis, size in enumerate(own) if size > 1} - covered - set(free)
        left = (self._fixed(factor, fixed, f"{reason}, with a value of fixed width") for factor in moved)
        return tuple(self._combined(sorted(filter(None, left), key=lambda one: -len(one.axes)), reason))

    def _fixed(self, factor: Factor, axes: set[int], reason: str) -> Factor | None:
        """What is left of a factor that doesn't shrink along some axes."""
        for axis in axes & set(factor.axes):
            self.whole(factor, axis, reason)
            factor = factor.first_along(axis)
        return factor if factor.axes else None

    def _combined(self, factors: Sequence[Factor], reason: str) -> list[Factor]:
        """Factors of one shape, those with most axes first."""
        found: list[Factor] = []
        for factor in factors:
            overlapping = [one for one in found if set(one.axes) & set(factor.axes)]
            if not overlapping:
                found.append(factor)
            elif len(overlapping) == 1 and overlapping[0].axes == factor.axes:
                self.atoms.tie(overlapping[0].atoms, factor.atoms)
            elif len(overlapping) == 1 and set(factor.axes) < set(overlapping[0].axes):
                self.inclusions.append((overlapping[0], factor))
            else:
                for one in (factor, *overlapping):
                    self.atoms.freeze(one.atoms, f"{reason}, of axes that were reshaped in different ways")
        return found

    def size(self, step: Step, position: int, element: int, factor: Factor, axis: int) -> None:
        """An input of a node holds, at `element`, the size of an axis of its output."""
        told = self.computed.get(step.inputs[position])
        if told is not None and told[element] is not None:  # see `match_shape`
            return
        holder = self._holder(step, position, element)
        if holder is None:
            self.whole(factor, axis, f"{step.where} computes its size")
            return
        node, place, index, held = holder
        length = factor.atoms.shape[factor.axes.index(axis)]
        if held == -1 or (held == 1 and step.op == "Expand"):  # whatever there is
            return
        if held != length:
            self.whole(factor, axis, f"{step.where} says another size")
            return
        site = Site(node, place, index, factor, axis, 0, length)
        if node == step.name:
            self.sites.append(site)
        else:
            self.shared.setdefault((step.inputs[position], element), []).append((step.name, site))

    def finish(self) -> None:
        """Where nodes share a computed shape, what they make keeps one size: it shrinks for all, or for none."""
        for (name, _), users in self.shared.items():
            sites = [site for _, site in users]
            first = sites[0].factor
            readers = {step.name for step in self.readers[name]}
            alike = all(one.factor.axes == first.axes and one.factor.atoms.shape == first.atoms.shape for one in sites)
            if alike and name not in self.outputs and readers == {user for user, _ in users}:
                self.sites.append(sites[0])
                for site in sites[1:]:
                    self.atoms.tie(first.atoms, site.factor.atoms)
            else:
                for site in sites:
                    self.whole(site.factor, site.axis, f"other nodes read its size from '{name}' too")

    def _holder(self, step: Step, position: int, element: int) -> tuple[str, int, int, int] | None:
        """(node, input, element, number) where a stored tensor holds a number; a Concat may make a shape of it."""
        name = step.inputs[position]
        values = self.constant(name)
        if values is not None:
            return step.name, position, element, int(values.ravel()[element])
        maker = self.makers.get(name)
        if maker is None or maker.op != "Concat":
            return None
        for place, piece in enumerate(maker.inputs):
            shape = self.value(piece).shape
            if shape is None or len(shape) != 1:
                return None
            if element < shape[0]:
                values = self.constant(piece)
                return None if values is None else (maker.name, place, element, int(values[element]))
            element -= shape[0]
        return None


def read_steps(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> list[Step]:
    """The nodes of a graph; those of other domains have it in their operator, and what inner graphs read as inputs."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in OWN_DOMAINS), default=1)
    steps = []
    for node, name in zip(model.graph.node, node_names(model.graph), strict=True):
        inner = [captured for graph in inner_graphs(node) for captured in captured_names(graph)]
        op = node.op_type if node.domain in OWN_DOMAINS else f"{node.domain}.{node.op_type}"
        attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute if not one.ref_attr_name}
        found = tuple(shapes.get(output) for output in node.output)
        steps.append(Step(name, op, (*node.input, *inner), tuple(node.output), found, attributes, opset))
    return steps
