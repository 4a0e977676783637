"""Control flow: If, Loop and Scan. The graphs inside them may read values of the graphs around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import onnx
import torch
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node, trimmed


class Body(Protocol):
    """A graph inside a node: (values of its inputs, values of its surroundings) -> outputs."""

    outputs: Sequence[onnx.ValueInfoProto]

    def __call__(self, inputs: Sequence[Tensor], outside: Mapping[str, Tensor]) -> list[Tensor]: ...


def _nothing(body: Body, output: int) -> Tensor:
    """What a value that is collected over no steps at all is: (0, *shape), as far as the shape is declared."""
    kind = body.outputs[output].type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return torch.zeros(0, *(dim.dim_value for dim in kind.shape.dim), dtype=getattr(torch, dtype.name))


def if_(node: Node) -> Compute:
    yes: Body = node.attributes["then_branch"]
    no: Body = node.attributes["else_branch"]

    def compute(condition: Tensor, *outside: Tensor):
        branch = yes if bool(condition) else no
        return trimmed(node, tuple(branch((), dict(zip(node.captured, outside, strict=True)))))

    return compute


def loop(node: Node) -> Compute:
    body: Body = node.attributes["body"]
    own = len(node.inputs) - len(node.captured)
    states = own - 2

    def compute(limit: Tensor | None, condition: Tensor | None, *rest: Tensor):
        values, outside = list(rest[:states]), dict(zip(node.captured, rest[states:], strict=True))
        collected: list[list[Tensor]] = [[] for _ in body.outputs[1 + states :]]
        going, count = condition is None or bool(condition), 0
        while going and (limit is None or count < int(limit)):
            more, *results = body([torch.tensor(count), torch.tensor(True), *values], outside)
            values = results[:states]
            for parts, value in zip(collected, results[states:], strict=True):
                parts.append(value)
            going, count = bool(more), count + 1
        stacked = [torch.stack(parts) if parts else _nothing(body, 1 + states + k) for k, parts in enumerate(collected)]
        return trimmed(node, (*values, *stacked))

    return compute


def scan(node: Node) -> Compute:
    if node.opset < 9:
        raise node.unsupported("Scan as before opset 9, over batches")
    body: Body = node.attributes["body"]
    own = len(node.inputs) - len(node.captured)
    sequences = node.get("num_scan_inputs")
    states = own - sequences
    outputs = len(body.outputs) - states
    input_axes = node.get("scan_input_axes", [0] * sequences)
    input_backwards = node.get("scan_input_directions", [0] * sequences)
    output_axes = node.get("scan_output_axes", [0] * outputs)
    output_backwards = node.get("scan_output_directions", [0] * outputs)

    def compute(*inputs: Tensor):
        values, outside = list(inputs[:states]), dict(zip(node.captured, inputs[own:], strict=True))
        slices = [
            x.unbind(axis)[:: -1 if backwards else 1]
            for x, axis, backwards in zip(inputs[states:own], input_axes, input_backwards, strict=True)
        ]
        collected: list[list[Tensor]] = [[] for _ in range(outputs)]
        for step in zip(*slices, strict=True):
            results = body([*values, *step], outside)
            values = results[:states]
            for parts, value in zip(collected, results[states:], strict=True):
                parts.append(value)
        stacked = [
            torch.stack(parts[:: -1 if backwards else 1], axis) if parts else _nothing(body, states + k)
            for k, (parts, axis, backwards) in enumerate(zip(collected, output_axes, output_backwards, strict=True))
        ]
        return trimmed(node, (*values, *stacked))

    return compute
