"""Offer a model to an engine that knows only older ONNX: lower its versions where that changes nothing."""

from __future__ import annotations

import onnx
from onnx import defs

from .base import ModelRefused
from .model_file import walk_graphs

DEFAULT_DOMAINS = ("", "ai.onnx")


def lower_versions(model: onnx.ModelProto, *, opset: int, ir_version: int, engine: str) -> None:
    """Lower the model's opset and IR version in place, to at most those of the engine.

    It is lossless or it does not happen: an operator whose definition is the same at both opsets means
    the same, so renumbering is all there is to do.

    Raises:
        ModelRefused: a node's operator changed in between; the message names the node.
    """
    model.ir_version = min(model.ir_version, ir_version)
    _lower(model.opset_import, [node for graph in walk_graphs(model.graph) for node in graph.node], opset, engine)
    for function in model.functions:
        _lower(function.opset_import, list(function.node), opset, engine)


def _lower(imports, nodes: list[onnx.NodeProto], opset: int, engine: str) -> None:
    for entry in imports:
        if entry.domain not in DEFAULT_DOMAINS or entry.version <= opset:
            continue
        for node in nodes:
            if node.domain in DEFAULT_DOMAINS and _since(node.op_type, entry.version) != _since(node.op_type, opset):
                label = node.name or ", ".join(node.output)
                raise ModelRefused(
                    f"{engine} knows opset {opset}, the model has {entry.version}, and {node.op_type} {label!r} "
                    f"changed in between; export the model with opset {opset} or lower"
                )
        entry.version = opset


def _since(op_type: str, version: int) -> int | None:
    """The opset that defined the operator as it is at `version`; None where there is no such operator."""
    try:
        return defs.get_schema(op_type, max_inclusive_version=version).since_version
    except defs.SchemaError:
        return None
