"""Attention as PyTorch's exporter writes it, brought into the form that engines know. They change the graph given.

The exporter takes `scaled_dot_product_attention` apart into more nodes than it needs. Engines that recognise attention
by its nodes (DeepSparse does) then run each of them alone, several times slower.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnx_spdy.models.rewrites import made_by

LAST_SWAPPED = [0, 2, 1]
LARGEST_CONSTANT = 1 << 20  # values; a mask may be that large, and weights aren't asked for


def transpose_keys_at_once(graph: gs.Graph) -> None:
    """Transpose, Reshape to three axes, Transpose, Reshape to four: one Transpose does it.

    Matches keys that are reshaped from (batch, heads, n, d) to (-1, n, d), have their last axes swapped and are
    reshaped to (batch, heads, d, n), whether the sizes are constants or computed.
    """
    for position, node in enumerate(graph.nodes):
        swap = made_by("Transpose", node.inputs[0]) if node.op == "Reshape" else None
        flat = swap and made_by("Reshape", swap.inputs[0])
        if swap is None or flat is None or swap.attrs.get("perm") != LAST_SWAPPED or not _are_swapped(flat, node):
            continue
        source, order = flat.inputs[0], [0, 1, 2, 3]
        if split := made_by("Transpose", source):
            source, order = split.inputs[0], split.attrs.get("perm", order[::-1])
        outputs = list(node.outputs)
        node.inputs.clear()
        node.outputs.clear()
        swapped = [*order[:2], order[3], order[2]]
        graph.nodes[position] = gs.Node("Transpose", node.name, {"perm": swapped}, [source], outputs)


def drop_guards_against_nan(graph: gs.Graph) -> None:
    """Softmax -> IsNaN -> Where(0): the guard for rows whose scores are all minus infinity goes where they can't be.

    That is where nothing is added to the scores, or something that is finite: a constant, or a choice of constants.
    """
    for node in graph.nodes:
        test = made_by("IsNaN", node.inputs[0]) if node.op == "Where" else None
        if test is None or test.inputs[0] is not node.inputs[2]:
            continue
        softmax, zero = made_by("Softmax", node.inputs[2]), _values(node.inputs[1])
        if softmax is None or zero is None or zero.any() or not _is_finite_score(softmax.inputs[0]):
            continue
        for reader in list(node.outputs[0].outputs):
            for position, tensor in enumerate(reader.inputs):
                if tensor is node.outputs[0]:
                    reader.inputs[position] = node.inputs[2]


def _values(tensor: gs.Tensor) -> np.ndarray | None:
    """A constant's values, as long as they aren't many."""
    small = isinstance(tensor, gs.Constant) and prod(tensor.shape) <= LARGEST_CONSTANT
    return tensor.values if small else None


def _are_swapped(flat: gs.Node, back: gs.Node) -> bool:
    """Whether one Reshape makes (-1, n, d) of the shape that it reads, and the other (*its first two sizes, d, n)."""
    shape = flat.inputs[0].shape or []
    one, other = _sizes(flat.inputs[1]), _sizes(back.inputs[1])
    if len(shape) != 4 or one is None or other is None:
        return False
    if len(one) != 3 or one[0] != -1 or one[1:] != other[:-3:-1]:
        return False
    if len(other) == 4:
        return other[0] == -1 and [other[1], *one[1:]] == shape[1:]
    return len(other) == 3 and _is_first_two(other[0], flat.inputs[0])


def _sizes(shape: gs.Tensor) -> list[int | gs.Tensor] | None:
    """The parts of a Reshape's target: numbers, and tensors where they are computed."""
    values = _values(shape)
    if values is not None:
        return values.ravel().tolist()
    concat = made_by("Concat", shape)
    if concat is None:
        return None
    return [tensor if (size := _integer(tensor)) is None else size for tensor in concat.inputs]


def _integer(tensor: gs.Tensor) -> int | None:
    """The value of a constant that is one integer."""
    values = _values(tensor)
    return int(values.item()) if values is not None and values.size == 1 and values.dtype.kind == "i" else None


def _is_first_two(sizes: int | gs.Tensor, of: gs.Tensor) -> bool:
    """Whether a tensor is `Shape(of)[:-2]`."""
    cut = made_by("Slice", sizes) if isinstance(sizes, gs.Tensor) else None
    shape = cut and made_by("Shape", cut.inputs[0])
    if cut is None or shape is None or shape.inputs[0] is not of or len(cut.inputs) != 3:
        return False
    start, end = map(_integer, cut.inputs[1:3])
    return start in (0, -(2**63)) and end == -2


def _is_finite_score(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a product, or a product plus something finite."""
    if made_by("MatMul", tensor):
        return True
    node = next((found for op in ("Add", "Mul", "Div") if (found := made_by(op, tensor))), None)
    if node is None:
        return False
    parts = [_is_finite(part) for part in node.inputs]
    return any(parts) and all(known or _is_finite_score(part) for part, known in zip(node.inputs, parts, strict=True))


def _is_finite(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a finite constant, or chosen from such; in half precision a sum with it may overflow."""
    choice = made_by("Where", tensor)
    arrays = [_values(one) for one in ([tensor] if choice is None else choice.inputs[1:])]
    return all(array is not None and array.dtype.itemsize >= 4 and np.isfinite(array).all() for array in arrays)
