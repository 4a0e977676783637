"""Write the network in which units of some groups are missing, and the one in which they count for nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnx_spdy.models.cut_branches import cut_branches
from onnx_spdy.models.graph import (
    ModelError,
    check_model,
    names_read,
    node_names,
    one_line,
    outline_of,
)
from onnx_spdy.models.groups import Branch, Group, GroupError, find_groups
from onnx_spdy.models.prepared import Prepared

Keep = Mapping[str, Sequence[int]]
Indices = dict[tuple[str, int], list[int]]


def narrowed(model: Prepared | onnx.ModelProto, keep: Keep) -> onnx.ModelProto:
    """A copy of the model without the units that aren't kept.

    The nodes are the same, with the same names: stored tensors of these groups are narrower, and numbers that hold a
    width (in the shape of a Reshape, the sizes of a Split, `group` of a convolution, ...) are smaller. Where nodes
    share a tensor with such a number, the one that needs another number gets its own. Shapes of inner values that
    became wrong are left out; everything else is as it was. Of a branch without any unit the nodes are gone too.

    Args:
        keep: name of a group -> its units that stay; none only of a branch. Groups that aren't named stay whole.
    Raises:
        GroupError: no such group, one that can't shrink, or none of its units or one that it doesn't have is kept.
        ModelError: the result is no valid model; that is a bug.
    """
    written, removed = _copy_and_removed(model, keep)
    branches = _gone(removed)
    # One unit of a branch stays until the branch goes as a whole.
    removed = [(group, units[len(units) == group.units :]) for group, units in removed]
    tensors = _stored(written)
    for (name, axis), indices in _indices(removed).items():
        _replace(tensors[name], np.delete(numpy_helper.to_array(tensors[name]), indices, axis))
    _drop(tensors, branches)
    _write_sizes(written, removed, tensors)
    _drop_shapes(written, {value for group, _ in removed for value in group.values})
    cut_branches(written, branches)
    check_model(written, "the narrower model")
    _check_shapes(written, model if isinstance(model, onnx.ModelProto) else model.proto)
    return written


def _check_shapes(narrow: onnx.ModelProto, dense: onnx.ModelProto) -> None:
    """Raise ModelError where shapes contradict each other that didn't in the dense model."""
    if (wrong := _contradiction(narrow)) is not None and _contradiction(dense) is None:
        raise ModelError(f"the narrower model's shapes don't fit each other: {wrong}; please report this network")


def _contradiction(model: onnx.ModelProto) -> str | None:
    """What strict shape inference has against a model."""
    try:
        onnx.shape_inference.infer_shapes(outline_of(model), strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as exc:
        return one_line(str(exc))
    return None


def masked(model: Prepared | onnx.ModelProto, keep: Keep) -> onnx.ModelProto:
    """A copy of the model in which the units that aren't kept count for nothing: the consumers' weights for them are 0.

    That, not zeros in what makes a unit, is what its absence means: Sigmoid(0) isn't 0. It has the outputs of
    `narrowed`, at the width and the speed of the whole network.

    Args and errors as those of `narrowed`.
    """
    written, removed = _copy_and_removed(model, keep)
    tensors = _stored(written)
    for (name, axis), indices in _indices(removed, "in").items():
        values = numpy_helper.to_array(tensors[name]).copy()
        np.moveaxis(values, axis, 0)[indices] = 0
        _replace(tensors[name], values)
    _drop(tensors, _gone(removed))
    return written


def _gone(removed: Sequence[tuple[Group, tuple[int, ...]]]) -> list[Branch]:
    """The branches of which no unit is kept."""
    return [group.branch for group, units in removed if group.branch is not None and len(units) == group.units]


def _drop(tensors: dict[str, TensorProto], branches: Iterable[Branch]) -> None:
    """What branches that are gone don't add."""
    for name in (name for branch in branches for name in branch.dropped):
        _replace(tensors[name], np.zeros_like(numpy_helper.to_array(tensors[name])))


def _copy_and_removed(
    model: Prepared | onnx.ModelProto, keep: Keep
) -> tuple[onnx.ModelProto, list[tuple[Group, tuple[int, ...]]]]:
    """A copy of the graph, and for each group named what is removed of it."""
    found = model.groups if isinstance(model, Prepared) else find_groups(model)
    groups = {group.name: group for group in found}
    for name in keep:
        if name not in groups:
            known = ", ".join(one.name for one in groups.values() if one.prunable)
            raise GroupError(f"there is no group '{name}'; those that can shrink are {known or 'none'}")
    copied = onnx.ModelProto()
    copied.CopyFrom(model if isinstance(model, onnx.ModelProto) else model.proto)
    return copied, [(groups[name], groups[name].removed(units)) for name, units in keep.items()]


def _stored(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Tensors that can be changed: initializers, and values of Constant nodes."""
    constants = {
        node.output[0]: attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return {tensor.name: tensor for tensor in model.graph.initializer} | constants


def removed_indices(model: Prepared, keep: Keep, role: str | None = None) -> Indices:
    """What `narrowed` leaves out of the stored tensors.

    Args:
        model, keep: as there.
        role: of the axes that are wanted, see `Axis`; None for all of them.
    Returns:
        (tensor, axis) -> the indices on it of the units that aren't kept, group after group.
    """
    return _indices([(group, group.removed(keep[group.name])) for group in model.groups if group.name in keep], role)


def _indices(removed: Sequence[tuple[Group, tuple[int, ...]]], role: str | None = None) -> Indices:
    found: dict[tuple[str, int], list[int]] = {}
    for group, units in removed:
        for axis in group.axes:
            if role in (None, axis.role):
                place = found.setdefault((axis.initializer, axis.axis), [])
                place += [index for unit in units for index in axis.indices[unit]]
    return found


def _replace(tensor: TensorProto, values: np.ndarray) -> None:
    """Give a tensor other values, and their shape; its element type, name and documentation stay."""
    made = numpy_helper.from_array(np.ascontiguousarray(values))
    for field in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "dims"):
        tensor.ClearField(field)
    tensor.dims.extend(made.dims)
    tensor.raw_data = made.raw_data


def _write_sizes(
    model: onnx.ModelProto, removed: Sequence[tuple[Group, tuple[int, ...]]], tensors: dict[str, TensorProto]
) -> None:
    less: Counter[tuple[str, int | str, int]] = Counter()
    for group, units in removed:
        for size in group.sizes:
            less[size.node, size.place, size.element] += sum(size.less[unit] for unit in units)
    nodes = dict(zip(node_names(model.graph), model.graph.node, strict=True))
    changes: dict[tuple[str, int | str], dict[int, int]] = {}
    for (name, place, element), amount in less.items():
        if amount:
            changes.setdefault((name, place), {})[element] = amount
    for (name, place), amounts in changes.items():
        if isinstance(place, str):
            _write_attribute(nodes[name], place, amounts)
        else:
            _write_input(model, nodes[name], name, place, amounts, tensors)


def _write_attribute(node: onnx.NodeProto, name: str, amounts: Mapping[int, int]) -> None:
    attribute = next(one for one in node.attribute if one.name == name)
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i -= amounts[0]
    else:
        for element, amount in amounts.items():
            attribute.ints[element] -= amount


def _write_input(
    model: onnx.ModelProto, node: onnx.NodeProto, name: str, place: int, amounts: Mapping[int, int],
    tensors: dict[str, TensorProto],
) -> None:  # fmt: skip
    """Lower numbers in a stored tensor; where others read it too, in a copy for this node."""
    source = node.input[place]
    values = numpy_helper.to_array(tensors[source]).copy()
    for element, amount in amounts.items():
        values[element] -= amount
    if sum(reader == source for reader in names_read(model.graph)) == 1:
        _replace(tensors[source], values)
        return
    own = f"{source}/{name}"
    while own in tensors:
        own += "'"
    tensors[own] = model.graph.initializer.add()
    tensors[own].CopyFrom(numpy_helper.from_array(values, own))
    node.input[place] = own


def _drop_shapes(model: onnx.ModelProto, narrower: set[str]) -> None:
    kept = [value for value in model.graph.value_info if value.name not in narrower]
    if len(kept) != len(model.graph.value_info):
        values = onnx.GraphProto(value_info=kept)
        model.graph.ClearField("value_info")
        model.graph.MergeFrom(values)
