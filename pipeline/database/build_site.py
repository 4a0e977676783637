"""One site's entry in the database: its Hessians in, its weights at every level in a file; a task of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnx_spdy.models import Layer, to_canonical
from onnx_spdy.pipeline.artifact import file_sha256, write_tensors
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.hessian import squared_error
from onnx_spdy.pipeline.database.pruners import PrunerFailed
from onnx_spdy.pipeline.database.pruners.quadratic import UnusableHessian, check_hessian
from onnx_spdy.pipeline.database.widths import build_group
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.mask import level_violation
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.site import Site
from onnx_spdy.pipeline.tasks import ClusterError
from onnx_spdy.runtimes.atomic import WorkFolder


@dataclass(frozen=True)
class Building:
    """What the sites of a database have in common.

    Attributes:
        network, compression: what is compressed, and how.
        folder: where files are written, which all who work see; None where they don't.
    """

    network: Network
    compression: Compression
    folder: Path | None


@dataclass(frozen=True)
class ToBuild:
    """A site that isn't in the database yet.

    Attributes:
        site: a layer or a group.
        hessians: layer name -> (d, d), of its layers.
        file: the name of its file.
    """

    site: Site
    hessians: Mapping[str, np.ndarray]
    file: str


@dataclass(frozen=True)
class Built:
    """A site's entry in the index, and its file's bytes where the file isn't in the database's folder."""

    entry: dict[str, Any]
    content: bytes | None = None


def build_site(building: Building, one: ToBuild) -> Built:
    """Compress a site to all levels.

    Raises:
        UnusableHessian: a layer's inputs are NaN, infinite, or beyond what can be computed with.
        PrunerFailed: the pruner returned something else than it promises.
        ClusterError: the folder isn't seen here.
    """
    hessians = {name: torch.from_numpy(hessian) for name, hessian in one.hessians.items()}
    build = build_layer if one.site.group is None else build_group
    if building.folder is None:
        with WorkFolder() as folder:
            path = Path(folder) / one.file
            entry = build(building.network, one.site, hessians, building.compression, path)
            return Built(entry, path.read_bytes())
    if not building.folder.is_dir():
        raise ClusterError(f"a worker that joined doesn't see {building.folder}, the others do; call the command again")
    path = building.folder / one.file
    return Built(build(building.network, one.site, hessians, building.compression, path))


def build_layer(
    network: Network, site: Site, hessians: Mapping[str, torch.Tensor], compression: Compression, path: Path
) -> dict[str, Any]:
    """Compress a layer to all levels, write them to `path`, and give the layer's entry; see `build_group`."""
    (layer,) = site.layers
    hessian = hessians[layer.name]
    dense = to_canonical(layer, network.dense(layer.weight)).contiguous().float()
    # By a power of two, which changes no bit: squares of weights near the end of float32 aren't in it.
    scale = 2.0 ** -math.frexp(float(dense.abs().max()))[1]
    dense_power = squared_error((scale * dense.double()).flatten(1), hessian)
    single = hessian.float()
    errors = [0.0]
    tensors: dict[str, torch.Tensor] = {}
    try:
        check_hessian(hessian)
        pruned = compression.pruner.prune(dense, hessian, compression.levels[1:])
        for level, weight in zip(compression.levels[1:], pruned, strict=True):
            _check(layer, level, weight)
            change = (scale * (weight - dense)).flatten(1)
            errors.append(squared_error(change, single) / dense_power if dense_power > 0 else 0.0)
            tensors[f"{level}.values"], tensors[f"{level}.mask"] = packed(weight)
    except UnusableHessian as exc:
        raise UnusableHessian(f"layer {layer.name!r} can't be pruned: {exc}") from exc
    write_tensors(path, tensors)
    return {
        "file": path.name, "sha256": file_sha256(path), "initializer": layer.weight,
        "shape": list(layer.shape), "errors": errors,
    }  # fmt: skip


def _check(layer: Layer, level: Level, weight: torch.Tensor) -> None:
    if tuple(weight.shape) != tuple(layer.shape) or not bool(torch.isfinite(weight).all()):
        raise PrunerFailed(
            f"the pruner gave {tuple(weight.shape)} or NaN for layer {layer.name!r} {layer.shape} at {level}"
        )
    if problem := level_violation(weight.numpy(), level):
        raise PrunerFailed(f"what the pruner gave for layer {layer.name!r} is not {level}: {problem}")


def packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-zero values in order, and one bit for each weight (uint8, 8 weights a byte)."""
    flat = weight.flatten()
    kept = flat != 0
    return flat[kept].clone(), torch.from_numpy(np.packbits(kept.numpy()))


def unpacked(values: torch.Tensor, bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The weights of this shape that `packed` gave."""
    count = int(np.prod(shape))
    kept = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(bool))
    flat = torch.zeros(count, dtype=values.dtype)
    flat[kept] = values
    return flat.view(*shape)
