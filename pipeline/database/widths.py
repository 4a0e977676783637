"""A group's entry in the database: which units stay at each width, and what its consumers' weights are then.

Levels at which equally many units stay share one width. A width is stored as the numbers of its units and each
consumer's columns that it leaves, (out, columns) in the order of `weight.flatten(1)`; the others are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from onnx_spdy.models import Layer, from_canonical, to_canonical
from onnx_spdy.pipeline.artifact import file_sha256, write_tensors
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.hessian import squared_error
from onnx_spdy.pipeline.database.pruners import PrunerFailed
from onnx_spdy.pipeline.database.pruners.quadratic import UnusableHessian, check_hessian
from onnx_spdy.pipeline.database.pruners.units import Consumer
from onnx_spdy.pipeline.network import Network, Weights
from onnx_spdy.pipeline.site import Site


def build_group(
    network: Network, site: Site, hessians: Mapping[str, torch.Tensor], compression: Compression, path: Path
) -> dict[str, Any]:
    """Compress the consumers of a group to all widths, write them to `path`, and give the group's entry.

    Args:
        hessians: of its layers, by name.
    Raises:
        UnusableHessian: a layer's inputs are NaN, infinite, or beyond what can be computed with.
        PrunerFailed: the pruner returned something else than it promises.
    """
    assert site.group is not None and compression.pruner.prune_units is not None  # see `Compression`
    kept = [site.kept(level) for level in compression.levels]
    widths = sorted({count for count in kept if 0 < count < site.group.units}, reverse=True)
    consumers, scales = [], []
    for layer in site.layers:
        try:
            check_hessian(hessians[layer.name])
        except UnusableHessian as exc:
            raise UnusableHessian(f"layer {layer.name!r} can't be pruned: {exc}") from exc
        weight = to_canonical(layer, network.dense(layer.weight)).contiguous().float()
        consumers.append(Consumer(weight, hessians[layer.name], columns_of(site, layer)))
        power = squared_error(weight.flatten(1).double(), hessians[layer.name])
        scales.append(1 / power if power > 0 else 0.0)
    single = [one.hessian.float() for one in consumers]
    errors = {site.group.units: 0.0}
    tensors: dict[str, torch.Tensor] = {}
    try:
        for width, (units, weights) in zip(widths, compression.pruner.prune_units(consumers, widths), strict=True):
            _check(site, consumers, width, units, weights)
            tensors[f"{width}.units"] = units.int()
            errors[width] = 0.0
            for number, (one, weight) in enumerate(zip(consumers, weights, strict=True)):
                change = (weight - one.weight).flatten(1)
                errors[width] += scales[number] * squared_error(change, single[number])
                tensors[f"{width}.{number}"] = weight.flatten(1)[:, left(one.columns, units, weight)].contiguous()
    except UnusableHessian as exc:
        raise UnusableHessian(f"group {site.name!r} can't shrink: {exc}") from exc
    if 0 in kept:  # nothing is left to choose then
        tensors["0.units"] = torch.zeros(0, dtype=torch.int32)
        tensors |= {f"0.{number}": one.weight.new_zeros(len(one.weight), 0) for number, one in enumerate(consumers)}
        errors[0] = float(sum(scale > 0 for scale in scales))
    write_tensors(path, tensors)
    return {
        "file": path.name, "sha256": file_sha256(path), "initializers": [layer.weight for layer in site.layers],
        "shapes": [list(layer.shape) for layer in site.layers], "errors": [errors[count] for count in kept],
    }  # fmt: skip


def units_at(file: Any, width: int) -> tuple[int, ...]:
    """The units that stay at a width, from a group's file."""
    return tuple(file.get_tensor(f"{width}.units").tolist())


def weights_at(file: Any, site: Site, width: int, dense: Callable[[str], torch.Tensor]) -> Weights:
    """The consumers' weights at a width, as the ONNX file stores them, from a group's file.

    Args:
        dense: initializer -> its values in the dense network.
    """
    units, found = file.get_tensor(f"{width}.units"), {}
    for number, layer in enumerate(site.layers):
        values = file.get_tensor(f"{width}.{number}")
        weight = torch.zeros(layer.shape, dtype=values.dtype)
        weight.flatten(1)[:, left(columns_of(site, layer), units, weight)] = values
        found[layer.weight] = from_canonical(layer, weight)
    if width == 0:
        assert site.group is not None and site.group.branch is not None
        found |= {name: torch.zeros_like(dense(name)) for name in site.group.branch.dropped}
    return found


def columns_of(site: Site, layer: Layer) -> list[torch.Tensor]:
    """For each unit of a group the columns of a consumer's `weight.flatten(1)` on which it lies."""
    positions = torch.arange(int(torch.Size(layer.shape[2:]).numel()))
    channels = (torch.tensor(one, dtype=torch.long) for one in site.inputs(layer))
    return [(one[:, None] * len(positions) + positions).flatten() for one in channels]


def left(columns: Sequence[torch.Tensor], units: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(d,) bool: which columns of a consumer's weight (out, in, *kernel) a width leaves."""
    found = torch.ones(int(weight[0].numel()), dtype=torch.bool)
    gone = {*range(len(columns))} - {*units.tolist()}
    found[torch.cat([torch.empty(0, dtype=torch.long), *(columns[unit] for unit in gone)])] = False
    return found


def _check(
    site: Site, consumers: Sequence[Consumer], width: int, units: torch.Tensor, weights: Sequence[torch.Tensor]
) -> None:
    assert site.group is not None
    numbers = units.tolist()
    if numbers != sorted(set(numbers) & {*range(site.group.units)}) or len(numbers) != width:
        raise PrunerFailed(
            f"the pruner kept {len(numbers)} units of group {site.name!r}, not {width} in ascending order"
        )
    for layer, one, weight in zip(site.layers, consumers, weights, strict=True):
        if weight.shape != one.weight.shape or not bool(torch.isfinite(weight).all()):
            raise PrunerFailed(
                f"the pruner gave {tuple(weight.shape)} or NaN for layer {layer.name!r} {layer.shape} at {width} units"
            )
        if bool(weight.flatten(1)[:, ~left(one.columns, units, weight)].any()):
            raise PrunerFailed(
                f"the pruner left weights for units that are gone in layer {layer.name!r} at {width} units"
            )
