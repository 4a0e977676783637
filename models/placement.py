"""Which values of a graph are numbers about shapes, and stay on the CPU whatever device the network is on.

`Shape` gives integers that Gather, Add, Concat, ... turn into the argument of a Reshape. On a GPU each of these
steps would cost a kernel, and reading the result would wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from onnx_spdy.models.operators import OPERATORS, Node

# Their result is made on the CPU from numbers, whatever they are given.
SOURCES = frozenset({"Shape", "Size", "ConstantOfShape", "Range"})
# Scale factors in shape arithmetic are this small at most; anything larger is a weight.
LARGEST_HOST_FLOATS = 16


@dataclass(frozen=True)
class Placement:
    """Where the inputs of the nodes have to be.

    Attributes:
        host_inputs: (node position, input position) of those that have to be on the CPU.
        moves: (node position, input position) of those computed on the CPU and needed on the network's device.
    """

    host_inputs: frozenset[tuple[int, int]]
    moves: frozenset[tuple[int, int]]


def place(nodes: Sequence[Node], stored: Mapping[str, Tensor]) -> Placement:
    """Follow shape arithmetic through the nodes (in execution order); `stored` are the graph's constant tensors."""
    on_host: set[str] = set()  # computed values that are on the CPU
    host_inputs, moves = set(), set()
    for i, node in enumerate(nodes):
        numbers = OPERATORS[node.op].host
        operands = [name for k, name in enumerate(node.inputs) if name and k not in numbers]
        arithmetic = all(name in on_host if name not in stored else _may_be_on_host(stored[name]) for name in operands)
        arithmetic = arithmetic and node.op not in SOURCES
        if arithmetic or node.op in SOURCES:
            on_host.update(node.outputs)
        for k, name in enumerate(node.inputs):
            if k in numbers or arithmetic:
                host_inputs.add((i, k))
            elif name in on_host and node.op not in SOURCES:
                moves.add((i, k))
    return Placement(frozenset(host_inputs), frozenset(moves))


def _may_be_on_host(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return tensor.dim() <= 1 and tensor.numel() <= LARGEST_HOST_FLOATS
