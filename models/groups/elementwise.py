"""Operators that work on each element by itself: values of one shape go through together, or are added and the like."""

from __future__ import annotations

from onnx_spdy.models.groups.labels import Factor
from onnx_spdy.models.groups.trace import Step, Trace

Outputs = list[tuple[Factor, ...]]


def elementwise(trace: Trace, step: Step) -> Outputs:
    """All inputs broadcast to the output, and what is at one place of each makes what is there."""
    values = [trace.value(name) for name in step.inputs if name]
    return [trace.merge(values, step.shapes[0], step.where)]


def addition(trace: Trace, step: Step) -> Outputs:
    """As `elementwise`; where different computed units meet, it couples them."""
    values = [trace.value(name) for name in step.inputs]
    (factors,) = outputs = elementwise(trace, step)
    computed = [one for value in values if not value.stored for one in value.factors]
    for factor in factors:
        atoms = [one.atoms for one in computed if one.atoms.shape == factor.atoms.shape]
        if any((one != atoms[0]).any() for one in atoms):
            trace.added.append(factor.atoms)
    return outputs


def first_alone(trace: Trace, step: Step) -> Outputs:
    """Only the first input has a width; the others are single numbers."""
    return [trace.merge([trace.value(step.inputs[0])], step.shapes[0], step.where)]
