"""Find the residual branches: what goes with a group when none of its units is kept.

Where all that a group's units go through ends in additions, as in the block of a residual network or a transformer,
nothing but the consumers' biases is added when the units are gone, and the block's other layers have nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx_spdy.models.groups.group import Branch, Group
from onnx_spdy.models.groups.rules import ELEMENTWISE
from onnx_spdy.models.groups.trace import Step, Trace

MULTIPLIERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Of stored tensors and constant ones they make constant ones, with the same channels.
BETWEEN = (*ELEMENTWISE, "Add", "Clip", "Dropout", "Sub")
NORMS = ("LayerNormalization", "RMSNormalization")  # which engines join with the addition before them


def branch_of(trace: Trace, group: Group) -> Branch | None:
    """What goes when a group has no units; None where that isn't a branch which is added to something.

    Args:
        trace: of the whole graph.
        group: one that can shrink.
    """
    steps = {step.name: step for step in trace.steps}
    consumers = [steps[name] for name in group.consumers]
    if not consumers or not all(_has_only(trace, group, step) for step in consumers):
        return None
    constant = {step.outputs[0] for step in consumers}
    between, sums = [*consumers], list[Step]()
    for step in trace.steps:
        if step in consumers or constant.isdisjoint(step.inputs):
            continue
        others = [name for name in step.inputs if name and name not in constant]
        if step.op in BETWEEN and all(trace.value(name).stored for name in others):
            constant.add(step.outputs[0])
            between.append(step)
        elif step.op == "Add" and len(others) == 1 and _is_whole(trace, others[0], step):
            sums.append(step)
        else:
            return None
    if not sums or constant & trace.outputs:
        return None
    gone = _only_for(trace, between)
    if any(step in gone for step in sums):
        return None
    return Branch(
        ends=tuple(step.name for step in consumers),
        sums=tuple(step.name for step in sums),
        gone=tuple(name for step in gone for name in step.outputs if name),
        left=tuple(dict.fromkeys(name for step in sums for name in _fused(trace, step))),
        dropped=() if all(_adds(trace, step, constant) for step in sums) else _biases(trace, consumers),
    )


def _has_only(trace: Trace, group: Group, step: Step) -> bool:
    """Whether a consumer multiplies by a stored weight, once, and takes in nothing but the group's units."""
    if step.op not in MULTIPLIERS or len(step.inputs) < 2 or step.inputs[1] not in trace.stored:
        return False
    weight, axes = step.inputs[1], [axis for axis in group.axes if axis.initializer == step.inputs[1]]
    taken = [axis for axis in axes if axis.role == "in"]
    bias = step.inputs[2] if step.has(2) else None
    return (
        len(taken) == 1
        and len(trace.readers[weight]) == 1
        and step.attributes.get("group", 1) == 1
        and sum(map(len, taken[0].indices)) == trace.stored[weight].dims[taken[0].axis]
        and (bias is None or (bias in trace.stored and step.attributes.get("beta", 1.0) == 1.0))
    )


def _is_whole(trace: Trace, name: str, step: Step) -> bool:
    """Whether one operand of an addition is computed and has the shape of the sum already."""
    value = trace.value(name)
    return not value.stored and value.shape is not None and value.shape == step.shapes[0]


def _adds(trace: Trace, step: Step, constant: set[str]) -> bool:
    """Whether what makes the other operand of an addition adds something stored, so that it can add more."""
    (other,) = (name for name in step.inputs if name not in constant)
    maker = trace.makers.get(other)
    return maker is not None and maker.op in ("Add", "Conv", "ConvTranspose", "LayerNormalization")


def _biases(trace: Trace, consumers: Iterable[Step]) -> tuple[str, ...]:
    """The consumers' biases, as far as nothing else reads them."""
    names = [step.inputs[2] for step in consumers if step.has(2)]
    return tuple(name for name in names if name in trace.stored and len(trace.readers[name]) == 1)


def _only_for(trace: Trace, steps: Iterable[Step]) -> list[Step]:
    """These steps and those whose results nothing else needs, in graph order."""
    found = {step.name for step in steps}
    for step in reversed(trace.steps):
        readers = [reader.name for name in step.outputs if name for reader in trace.readers.get(name, [])]
        if readers and found.issuperset(readers) and trace.outputs.isdisjoint(step.outputs):
            found.add(step.name)
    return [step for step in trace.steps if step.name in found]


def _fused(trace: Trace, step: Step) -> Iterable[str]:
    """The result of an addition, and those of what engines compute in the same kernel: activations and norms."""
    yield step.outputs[0]
    for reader in trace.readers.get(step.outputs[0], []):
        if reader.op in (*ELEMENTWISE, "Clip", *NORMS) and reader.inputs[0] == step.outputs[0]:
            yield from (name for name in reader.outputs if name)
