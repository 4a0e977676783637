"""How much a network computes, in multiply-accumulates."""

from __future__ import annotations

from math import prod

import onnx

from onnx_spdy.models.graph import node_names
from onnx_spdy.models.groups.shapes import Shapes, all_shapes


def multiply_accumulates(model: onnx.ModelProto) -> dict[str, int]:
    """Multiply-accumulates of each convolution and matrix product of a graph, products of two activations too.

    Open dimensions have the numbers of `all_shapes`, so counts of one network are comparable with each other only. A
    node whose shapes aren't known isn't in it; nor are those of graphs inside nodes.
    """
    shapes = all_shapes(model)
    counts = {}
    for node, name in zip(model.graph.node, node_names(model.graph), strict=True):
        if node.domain in ("", "ai.onnx") and (each := _for_each_element(node, shapes)) is not None:
            counted = shapes.get(node.input[0] if node.op_type == "ConvTranspose" else node.output[0])
            if counted is not None:
                counts[name] = each * prod(counted)
    return counts


def _for_each_element(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Multiply-accumulates for each element of the output; of the input for a ConvTranspose."""
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        weight = shapes.get(node.input[1])
        return None if weight is None else prod(weight[1:])
    a = shapes.get(node.input[0])
    flipped = any(one.name == "transA" and one.i for one in node.attribute)
    return None if not a else a[0] if flipped else a[-1]
