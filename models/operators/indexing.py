"""Take parts of tensors, put them together, write into them."""

from __future__ import annotations

import torch
from torch import Tensor

from onnx_spdy.models.operators.operator import Compute, Node


def concat(node: Node) -> Compute:
    axis = node.get("axis", 1)
    return lambda *parts: torch.cat(parts, axis)


def split(node: Node) -> Compute:
    axis = node.get("axis", 0)
    count = node.get("num_outputs", len(node.outputs))

    def parts(x: Tensor, sizes: list[int] | None) -> Tensor | tuple[Tensor, ...]:
        pieces = x.split(-(-x.shape[axis] // count) if sizes is None else sizes, axis)
        return pieces if len(node.outputs) > 1 else pieces[0]

    if node.opset < 13:
        return lambda x: parts(x, node.get("split"))
    return lambda x, sizes=None: parts(x, None if sizes is None else sizes.tolist())


def slice_(node: Node) -> Compute:
    if node.opset < 10:
        starts, ends, axes = node.get("starts"), node.get("ends"), node.get("axes")
        return lambda x: _cut(x, starts, ends, axes, None)

    def run(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        return _cut(
            x,
            starts.reshape(-1).tolist(),
            ends.reshape(-1).tolist(),
            None if axes is None else axes.reshape(-1).tolist(),
            None if steps is None else steps.reshape(-1).tolist(),
        )

    return run


def _cut(x: Tensor, starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None) -> Tensor:
    parts = [slice(None)] * x.dim()
    reversed_axes = []
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        wanted = range(*slice(starts[i], ends[i], 1 if steps is None else steps[i]).indices(x.shape[axis]))
        if wanted.step < 0:  # PyTorch only steps forwards
            wanted = wanted[::-1]
            reversed_axes.append(axis)
        # An empty range may have a negative end, which would count from the back.
        parts[axis] = slice(wanted.start, wanted.stop, wanted.step) if len(wanted) else slice(0, 0)
    taken = x[tuple(parts)]
    return taken.flip(reversed_axes) if reversed_axes else taken


def gather(node: Node) -> Compute:
    axis = node.get("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        along = axis % x.dim()
        taken = x.index_select(along, _from_start(indices, x.shape[along]).reshape(-1))
        return taken.reshape(x.shape[:along] + indices.shape + x.shape[along + 1 :])

    return run


def gather_elements(node: Node) -> Compute:
    axis = node.get("axis", 0)
    return lambda x, indices: torch.gather(x, axis, _from_start(indices, x.shape[axis]).long())


def gather_nd(node: Node) -> Compute:
    batch_dims = node.get("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        batch = x.shape[:batch_dims]
        grids = torch.meshgrid(*(torch.arange(n, device=x.device) for n in batch), indexing="ij") if batch else ()
        inner = indices.dim() - 1 - batch_dims
        where = [grid.reshape(*batch, *[1] * inner) for grid in grids]
        where += [_from_start(part, x.shape[batch_dims + i]).long() for i, part in enumerate(indices.unbind(-1))]
        return x[tuple(where)]

    return run


def scatter_nd(node: Node) -> Compute:
    combine = _reduction(node)

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        where = tuple(_from_start(part, x.shape[i]).long() for i, part in enumerate(indices.unbind(-1)))
        if combine in (None, "sum"):
            return x.index_put(where, updates.to(x.dtype), accumulate=combine == "sum")
        # PyTorch combines in other ways along one axis only: all indexed axes as one.
        count = indices.shape[-1]
        flat = torch.zeros_like(where[0])
        for part, length in zip(where, x.shape, strict=False):
            flat = flat * length + part
        rows = x.reshape(-1, *x.shape[count:]).flatten(1) if count < x.dim() else x.reshape(-1, 1)
        changes = updates.reshape(flat.numel(), -1).to(x.dtype)
        places = flat.reshape(-1, 1).expand(changes.shape)
        return rows.scatter_reduce(0, places, changes, combine).reshape(x.shape)

    return run


def scatter_elements(node: Node) -> Compute:
    axis, combine = node.get("axis", 0), _reduction(node)

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        where = _from_start(indices, x.shape[axis]).long()
        return x.scatter(axis, where, updates) if combine is None else x.scatter_reduce(axis, where, updates, combine)

    return run


def _reduction(node: Node) -> str | None:
    """PyTorch's name for what happens to the old value; None: it is replaced."""
    return {"none": None, "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[node.get("reduction", "none")]


def one_hot(node: Node) -> Compute:
    axis = node.get("axis", -1)

    def run(indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        count = int(depth.item())
        classes = torch.arange(count, device=indices.device)
        hot = (indices.long() % count).unsqueeze(-1) == classes
        hot = hot & ((indices >= -count) & (indices < count)).unsqueeze(-1)
        off, on = values.unbind()
        chosen = torch.where(hot, on, off)
        return chosen.movedim(-1, axis)

    return run


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


def trilu(node: Node) -> Compute:
    function = torch.triu if node.get("upper", 1) else torch.tril
    return lambda x, k=None: function(x, 0 if k is None else int(k.item()))


def _from_start(indices: Tensor, length: int) -> Tensor:
    """Negative indices count from the end."""
    return torch.where(indices < 0, indices + length, indices)
