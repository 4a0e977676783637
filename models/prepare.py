"""Bring a graph into the form that engines run fast, and prove that it still computes the same."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence

import onnx
from onnx import TensorProto, numpy_helper

from onnx_spdy.models.agreement import check_same_results
from onnx_spdy.models.attention_rewrites import drop_guards_against_nan, transpose_keys_at_once
from onnx_spdy.models.graph import (
    LARGEST_PROTOBUF_BYTES,
    ModelError,
    check_model,
    data_bytes,
    graph_inputs,
    one_line,
    without_large_data,
)
from onnx_spdy.models.rewrites import name_nodes, pool_instead_of_mean, restore_names

# weight_tying merges equal small tensors, so that biases of different layers (all zero, say) become one, which
# can't be corrected for one of them any more.
SKIPPED_OPTIMISATIONS = ["weight_tying"]
# These put a transposed or scaled copy under a new name in the place of a weight of the user's network.
SKIPPED_FUSIONS = ["FusionGemm", "FusionGemmMul", "FusionGemmAdd"]
# A pass may open the way for another one; real networks settle after two.
LARGEST_ROUNDS = 6
# In a model that is too large for one protobuf message, tensors of this size and more stay what they are.
UNTOUCHED_BYTES = 1 << 20


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, clean up, and rewrite what engines don't like; the model given stays as it is.

    Weights and nodes keep their names; where a BatchNormalization is folded into a convolution the result has the
    names of the convolution. Inputs and outputs stay, with their open dimensions. A prepared model stays the same
    when it is prepared again.

    Source: constant folding and clean-up by onnxslim (https://github.com/inisis/OnnxSlim).

    In a model over 2 GiB the large weights are set aside meanwhile: they come through as they are, and nothing is
    folded into them.

    Raises:
        ModelError: ONNX Runtime can't run the model, onnxslim can't read it, or the result is invalid or computes
            something else (see `check_same_results` for how that is judged).
    """
    large = data_bytes(model) > LARGEST_PROTOBUF_BYTES
    named = without_large_data(model, UNTOUCHED_BYTES) if large else _copy(model)
    name_nodes(named)  # first: ONNX Runtime, which compares below, refuses two nodes of one name
    original = _inlined(named)
    original.ir_version = max(original.ir_version, 4)  # before 4 every initializer had to be an input too
    prepared = original
    for _ in range(LARGEST_ROUNDS):
        before = prepared.SerializeToString(deterministic=True)
        prepared = _one_round(prepared, original)
        if prepared.SerializeToString(deterministic=True) == before:
            break
    aside = {value.name for value in graph_inputs(named)} - {value.name for value in graph_inputs(model)}
    weights = [tensor for tensor in model.graph.initializer if tensor.name in aside]
    check_same_results(named, prepared, {tensor.name: numpy_helper.to_array(tensor) for tensor in weights})
    if weights:
        _put_back(weights, prepared, model)
    check_model(prepared, "the prepared model")
    return prepared


def _put_back(weights: Sequence[TensorProto], prepared: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Inputs that stand for weights become initializers; those that no node reads any more go."""
    inputs = [value for value in prepared.graph.input if value.name in {one.name for one in graph_inputs(model)}]
    del prepared.graph.input[:]
    prepared.graph.input.extend(inputs)
    used = {name for node in prepared.graph.node for name in node.input} | {v.name for v in prepared.graph.output}
    for tensor in weights:
        if tensor.name in used:
            prepared.graph.initializer.add().CopyFrom(tensor)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without functions of its own: their nodes take the place of the calls, and get unique names."""
    if not model.functions:
        return _copy(model)
    from onnx import inliner

    inlined = inliner.inline_local_functions(model)
    name_nodes(inlined)
    return inlined


def _one_round(model: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    slimmed = _slim(_without_claims(model))
    restore_names(slimmed, model)
    pool_instead_of_mean(slimmed)
    transpose_keys_at_once(slimmed)
    drop_guards_against_nan(slimmed)
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


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxslim

    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return onnxslim.slim(model, skip_optimizations=SKIPPED_OPTIMISATIONS, skip_fusion_patterns=SKIPPED_FUSIONS)
        except Exception as exc:  # anything may come out of a graph that it didn't foresee
            raise ModelError(f"onnxslim can't simplify this graph: {one_line(f'{type(exc).__name__}: {exc}')}") from exc


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
