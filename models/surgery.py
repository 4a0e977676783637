"""Graphs in the hands of onnx-graphsurgeon, and back into their messages with nothing lost.

Source: https://github.com/NVIDIA/TensorRT/tree/main/tools/onnx-graphsurgeon
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.logger import G_LOGGER

from onnx_spdy.models.graph import ModelError, one_line


def read(model: onnx.ModelProto) -> gs.Graph:
    """The model as a graph to look at. Its constants are read when they are asked for.

    Raises:
        ModelError: graphsurgeon can't read it.
    """
    with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):  # it prints
        try:
            return gs.import_onnx(model)
        except Exception as exc:  # it expects graphs without a fault, and checks little
            raise ModelError(f"this graph can't be read: {one_line(f'{type(exc).__name__}: {exc}')}") from exc


@contextlib.contextmanager
def edit(model: onnx.ModelProto) -> Iterator[gs.Graph]:
    """The model as a graph to change; at the end the changes are in the model, and everything else is as it was.

    `gs.export_onnx` builds a new model of what graphsurgeon knows: without metadata, annotations, sizes of inner
    values, the documentation, overload and metadata of nodes, attributes of rarer kinds, types such as maps; with
    initializers in another order, converted where NumPy lacks their type, and copied into each inner graph that reads
    them. So the messages stay, and only what was changed is written, weights not even copied.

    Nodes may be put in, taken out (`graph.cleanup(recurse_subgraphs=False)`, say), renamed, and given other inputs and
    outputs; one with another operator or other attributes has to be a new `gs.Node`. Tensors may be renamed, also those
    that graphs inside nodes read, and constants added; initializers that nobody reads any more go. What is inside
    those graphs can't be changed.

    Raises:
        ModelError: graphsurgeon can't read the graph, or stumbles over it.
    """
    graph = read(model)
    messages = dict(zip(map(id, graph.nodes), zip(graph.nodes, model.graph.node, strict=True), strict=True))
    before = _tensors(graph)
    with G_LOGGER.suppress(G_LOGGER.CRITICAL + 1):
        try:
            yield graph
        except gs.OnnxGraphSurgeonException as exc:
            raise ModelError(f"this graph can't be rewritten: {one_line(str(exc))}") from exc
        _write_nodes(graph, messages, model.graph)
        _write_tensors(graph, before, model.graph)


def _tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """The graph's tensors by name: those at its ends and nodes, and those that graphs inside its nodes read."""
    inner = (node for one in graph.subgraphs(recursive=True) for node in one.nodes)
    return {tensor.name: tensor for node in inner for tensor in node.inputs} | graph.tensors()


def _write_nodes(
    graph: gs.Graph, messages: Mapping[int, tuple[gs.Node, onnx.NodeProto]], written: onnx.GraphProto
) -> None:
    for node, message in (messages[id(node)] for node in graph.nodes if id(node) in messages):
        _write_names(node, message)
    if [id(node) for node in graph.nodes] == list(messages):
        return
    nodes = (messages[id(node)][1] if id(node) in messages else OnnxExporter.export_node(node) for node in graph.nodes)
    kept = onnx.GraphProto(node=nodes)  # copies, because the messages go with the list that they are in
    written.ClearField("node")
    written.MergeFrom(kept)


def _write_names(node: gs.Node, message: onnx.NodeProto) -> None:
    if message.name != node.name:
        message.name = node.name
    for names, tensors in ((message.input, node.inputs), (message.output, node.outputs)):
        if list(names) != [tensor.name for tensor in tensors]:
            names[:] = [tensor.name for tensor in tensors]
    for attribute in message.attribute:
        if attribute.type == AttributeProto.GRAPH:
            for inner, its_message in zip(node.attrs[attribute.name].nodes, attribute.g.node, strict=True):
                _write_names(inner, its_message)


def _write_tensors(graph: gs.Graph, before: Mapping[str, gs.Tensor], written: onnx.GraphProto) -> None:
    now = _tensors(graph)
    for position in reversed(range(len(written.initializer))):
        name = written.initializer[position].name
        if name in before and before[name].name not in now:
            del written.initializer[position]
    for value in (*written.input, *written.output, *written.value_info, *written.initializer):
        if value.name in before and before[value.name].name != value.name:
            value.name = before[value.name].name
    for annotation in written.quantization_annotation:
        if annotation.tensor_name in before:
            annotation.tensor_name = before[annotation.tensor_name].name
    known = set(map(id, before.values()))
    new = [tensor for tensor in now.values() if isinstance(tensor, gs.Constant) and id(tensor) not in known]
    written.initializer.extend(map(OnnxExporter.export_tensor_proto, new))
