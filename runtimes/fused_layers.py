"""Which layers a row of an engine's profile stands for, when the engine names other tensors."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from .model_file import LAYER_OPS


def covered_outputs(graph: onnx.GraphProto, anchors: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Add to each row the layer outputs that were fused into it.

    An engine that merges Conv + BatchNorm + Relu may name the row after the Relu. Everything
    between the tensors of other rows and those of this one ran inside this one, so the row also stands
    for each Conv, Gemm and MatMul met on the way back.

    Args:
        graph: the model's graph.
        anchors: for each row the tensors of `graph` that the engine names, maybe none.
    Returns:
        For each row its tensors: the added layer outputs, then the given ones.
    """
    producer = {output: node for node in graph.node for output in node.output}
    taken = {name for row in anchors for name in row}
    rows: list[tuple[str, ...]] = []
    for row in anchors:
        added: list[str] = []
        pending = [name for name in row if name in producer and producer[name].op_type not in LAYER_OPS]
        while pending:
            for name in producer[pending.pop()].input:
                if name in taken or name not in producer:
                    continue
                taken.add(name)
                if producer[name].op_type in LAYER_OPS:
                    added.append(name)
                else:
                    pending.append(name)
        rows.append((*sorted(added), *row))
    return rows
