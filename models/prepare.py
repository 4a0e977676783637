"""Bring a graph into the form that engines run fast, and prove that it still computes the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto

from onnx_spdy.models.agreement import Reference
from onnx_spdy.models.attention_rewrites import drop_guards_against_nan, transpose_keys_at_once
from onnx_spdy.models.batch import fix_batch
from onnx_spdy.models.graph import (
    LARGEST_PROTOBUF_BYTES,
    ModelError,
    captured_names,
    check_interface,
    check_model,
    data_bytes,
    graph_inputs,
    inner_graphs,
    without_large_data,
)
from onnx_spdy.models.load import LARGE_MODEL_BYTES
from onnx_spdy.models.prepared import Prepared
from onnx_spdy.models.rewrites import name_nodes, note_shapes, own_shapes, pool_instead_of_mean, restore_names
from onnx_spdy.models.simplify import simplified, slim
from onnx_spdy.models.stored import is_mapped, read_into_message, stored_bytes
from onnx_spdy.models.surgery import edit, read
from onnx_spdy.runtimes.batch_axes import mark_batch_axes

logger = logging.getLogger(__name__)

# A pass may open the way for another one; real networks settle after two.
LARGEST_ROUNDS = 6
# In a large model, tensors of this size and more that only such nodes read stay what they are: nothing is folded into
# them. In a model that is too large for one protobuf message, all of this size do.
UNTOUCHED_BYTES = 1 << 20
UNTOUCHED_BY = frozenset({"Gather", "Gemm", "MatMul"})


def prepare(
    model: onnx.ModelProto,
    examples: Mapping[str, np.ndarray] | None = None,
    axes: Mapping[str, int | None] | None = None,
) -> Prepared:
    """Fold constants, clean up, and rewrite what engines don't like; the model given stays as it is.

    A batch that the file declares open and that is written into the graph all the same is fixed; a warning is logged
    that says why.

    What comes back is what `run` and `finetune` take; its `proto` is the graph to save.

    Weights and nodes keep their names; where a BatchNormalization is folded into a convolution the result has the
    names of the convolution. Inputs and outputs stay, with their open dimensions. A prepared model stays the same
    when it is prepared again.

    A step of onnxslim that breaks the network (it is left invalid, or computes something else) is left out, at last
    onnxslim as a whole; a warning is logged that says which.

    Source: constant folding and clean-up by onnxslim (https://github.com/inisis/OnnxSlim).

    In a model over 256 MiB the large weights of matrix products and embeddings are set aside meanwhile, and over 2 GiB
    all that are large: they come through as they are, and nothing is folded into them.

    Args:
        model: any network whose inputs and outputs are tensors.
        examples: a batch of data by input name, on which the prepared graph is compared with the original; random
            inputs without. Where the network doesn't run with them, random ones are tried.
        axes: input -> axis on which its samples lie, or None, where the graph itself doesn't tell; see `batch_axes`.
    Raises:
        ModelError: ONNX Runtime can't run the model, or not with these inputs; or the result is invalid or computes
            something else whatever is left out (see `Reference` for how that is judged).
    """
    check_interface(model, "the model")
    named = _without_weights(model) if data_bytes(model) > LARGE_MODEL_BYTES else _copy(model)
    name_nodes(named)  # first: ONNX Runtime, which compares below, refuses two nodes of one name
    aside = {value.name for value in graph_inputs(named)} - {value.name for value in graph_inputs(model)}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in aside]
    if axes is not None:
        mark_batch_axes(graph_inputs(named), {value.name: axes.get(value.name) for value in graph_inputs(named)})
    # Before anything else works with the graph: it may be one that makes a process abort.
    with Reference(named, weights, examples) as reference:
        if reference.baked:
            logger.warning("%s", reference.baked)
            fix_batch(named, reference.baked.size, reference.shapes)
        original = _inlined(named)
        original.ir_version = max(original.ir_version, 4)  # before 4 every initializer had to be an input too
        prepared = simplified(lambda steps: _proven(original, steps, reference))
    if weights:
        _put_back(weights, prepared, model)
    check_model(prepared, "the prepared model")
    return Prepared(prepared)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which weights that stay what they are, are inputs. All other data is in memory."""
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in (*node.input, *(name for graph in inner_graphs(node) for name in captured_names(graph))):
            readers.setdefault(name, set()).add(node.op_type)
    sizes = {tensor.name: stored_bytes(tensor) for tensor in model.graph.initializer}
    names = {name for name in sizes if readers.get(name, set()) <= UNTOUCHED_BY}
    others = data_bytes(model) - sum(sizes[name] for name in names if sizes[name] >= UNTOUCHED_BYTES)
    named = without_large_data(model, UNTOUCHED_BYTES, names if others <= LARGEST_PROTOBUF_BYTES else None)
    for tensor in named.graph.initializer:
        if is_mapped(tensor):
            read_into_message(tensor)
    return named


def _proven(original: onnx.ModelProto, steps: Sequence[str], reference: Reference) -> onnx.ModelProto:
    """The graph prepared with these steps of onnxslim. Raises ModelError where that breaks it."""
    prepared = original
    for _ in range(LARGEST_ROUNDS):
        before = prepared.SerializeToString(deterministic=True)
        prepared = _one_round(prepared, original, steps)
        if prepared.SerializeToString(deterministic=True) == before:
            break
    reference.check(prepared)
    return prepared


def _put_back(weights: Sequence[TensorProto], prepared: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Inputs that stand for weights become initializers; those that no node reads any more go.

    All initializers are in the order in which nodes read them first, which is that of onnxslim.
    """
    inputs = [value for value in prepared.graph.input if value.name in {one.name for one in graph_inputs(model)}]
    del prepared.graph.input[:]
    prepared.graph.input.extend(inputs)
    used = {value.name for value in prepared.graph.output}
    for node in prepared.graph.node:
        used.update(node.input, *map(captured_names, inner_graphs(node)))
    order: dict[str, int] = {}
    for node in prepared.graph.node:
        for name in node.input:
            order.setdefault(name, len(order))
    stored: list[TensorProto] = [*prepared.graph.initializer, *(tensor for tensor in weights if tensor.name in used)]
    stored.sort(key=lambda one: order.get(one.name, len(order)))
    ordered = onnx.GraphProto(initializer=stored)
    prepared.graph.ClearField("initializer")
    prepared.graph.MergeFrom(ordered)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without functions of its own: their nodes take the place of the calls, and get unique names."""
    if not model.functions:
        return _copy(model)
    from onnx import inliner

    inlined = inliner.inline_local_functions(model)
    name_nodes(inlined)
    return inlined


def _one_round(model: onnx.ModelProto, original: onnx.ModelProto, steps: Sequence[str]) -> onnx.ModelProto:
    slimmed = slim(_without_claims(model), steps) if steps else _copy(model)
    with edit(slimmed) as graph:
        note_shapes(graph, slimmed)
        restore_names(graph, read(model))
        pool_instead_of_mean(graph)
        transpose_keys_at_once(graph)
        drop_guards_against_nan(graph)
        own_shapes(graph)
        graph.cleanup(recurse_subgraphs=False)
    name_nodes(slimmed)
    _restore_frame(slimmed, original)
    return slimmed


def _without_claims(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that says nothing about sizes but those of its inputs.

    PyTorch's older exporter writes the sizes of the traced example into outputs whose batch is open; onnxslim would
    fold them into the graph.
    """
    copied = _copy(model)
    copied.graph.ClearField("value_info")
    for value in copied.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return copied


def _restore_frame(slimmed: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """What surrounds the nodes stays the user's: inputs (an unused one too), outputs, versions, documentation."""
    inputs, outputs = graph_inputs(original), list(original.graph.output)
    if [value.name for value in slimmed.graph.output] != [value.name for value in outputs]:
        raise ModelError("onnxslim changed the graph's outputs; please report this network")
    # Inferred shapes of intermediate values are hints that depend on what was inferred last: left out.
    for field, values in (("input", inputs), ("output", outputs), ("value_info", [])):
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString(deterministic=True)) for value in values]
        slimmed.graph.ClearField(field)
        getattr(slimmed.graph, field).extend(kept)
    for field in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(slimmed, field, getattr(original, field))
    for field in ("opset_import", "metadata_props"):
        kept_entries = list(getattr(original, field))
        slimmed.ClearField(field)
        getattr(slimmed, field).extend(kept_entries)
    slimmed.graph.name = original.graph.name
    slimmed.graph.doc_string = original.graph.doc_string


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied
