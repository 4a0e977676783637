"""The layer database: the weights of every layer at every level, made from one calibration pass.

On disk: `index.json` and one safetensors file for each layer. A sparse level is stored as its non-zero
values and one bit for each weight, so that 41 levels of a layer take about 7.4 times its dense size instead of 41.
Built layer by layer; what is there already is kept when the work is continued. Reading maps the file into memory:
only the level that is asked for is read.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from onnx_spdy.models import Layer, from_canonical, to_canonical
from onnx_spdy.pipeline.artifact import (
    ArtifactError,
    check_same,
    fields_of,
    file_sha256,
    locked,
    read_json,
    write_json,
    write_tensors,
)
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.hessian import collect_hessians, hessian_bytes, squared_error
from onnx_spdy.pipeline.database.pruners.quadratic import UnusableHessian, check_hessian
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.mask import level_violation
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.runtimes.errors import OnnxSpdyError

VERSION = 1
INDEX = "index.json"
WORK_BYTES = 1 << 30  # that a pruner may need besides its layer's matrices and weights


@dataclass(frozen=True)
class LayerDatabase:
    """Weights of layers x levels (read when asked for) and their errors.

    Attributes:
        folder: where the files are.
        levels: dense first.
        layers: layer name -> its entry: file, sha256, errors.
        made_from: model_sha256, data_sha256, pruner, pattern.
    """

    folder: Path
    levels: tuple[Level, ...]
    layers: Mapping[str, Mapping[str, Any]]
    made_from: Mapping[str, str]
    _open: dict[Path, Any] = field(default_factory=dict, compare=False, repr=False)  # mapped files
    _verified: set[str] = field(default_factory=set, compare=False, repr=False)  # layers whose file was compared

    def errors(self, names: Sequence[str]) -> np.ndarray:
        """(layers, levels) relative squared output error of each layer on the calibration samples."""
        return np.array([self.layers[name]["errors"] for name in names], np.float64)

    def weight(self, network: Network, layer: Layer, level: Level) -> torch.Tensor:
        """A layer's weights at a level, in the shape in which the ONNX file stores them.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        if level == DENSE:
            return network.dense(layer.weight)
        path = self.folder / self.layers[layer.name]["file"]
        try:
            if layer.name not in self._verified:
                self._verify(layer.name)
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            file = self._open[path]
            values, bits = file.get_tensor(f"{level}.values"), file.get_tensor(f"{level}.mask")
        except (OSError, SafetensorError) as exc:
            raise ArtifactError(f"{path} can't be read ({exc}); delete it and build the database again") from exc
        return from_canonical(layer, _unpacked(values, bits, layer.shape))

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            ArtifactError: a file is missing or damaged; the message names it.
        """
        for name in self.layers:
            self._verify(name)

    def _verify(self, name: str) -> None:
        path = self.folder / self.layers[name]["file"]
        if not path.is_file() or file_sha256(path) != self.layers[name]["sha256"]:
            raise ArtifactError(f"{path} is missing or damaged; delete {self.folder / INDEX} and build it again")
        self._verified.add(name)


def open_database(folder: Path) -> LayerDatabase:
    """The database in a folder.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    content = read_json(folder / INDEX, "database", VERSION)
    with fields_of(folder / INDEX):
        levels = tuple(Level.parse(text) for text in content["levels"])
        layers = {name: _entry(one, len(levels)) for name, one in content["layers"].items()}
        made_from = {name: str(content["made_from"][name]) for name in ("model_sha256", "data_sha256", "pruner")}
        return LayerDatabase(folder, levels, layers, made_from)


def _entry(entry: Mapping[str, Any], levels: int) -> Mapping[str, Any]:
    """Of one layer. Raises ValueError, or what a missing field does: it is none."""
    if np.array(entry["errors"], np.float64).shape != (levels,):
        raise ValueError(f"there is no error for each of {levels} levels")
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"{entry['file']!r} is no file of this folder")
    return {**entry, "sha256": entry["sha256"]}


def build_database(
    network: Network, samples: Samples, compression: Compression, folder: Path, progress: Progress = ignore
) -> LayerDatabase:
    """Compress every prunable layer to every level.

    Args:
        network: whose dense weights are compressed.
        samples: calibration samples for the layer Hessians.
        compression: to which levels, and how.
        folder: where the database is written; layers that are there already are kept.
        progress: called with (done, total, what).
    Raises:
        ArtifactError: the folder holds a database that was made from something else, or another one builds there.
        UnusableHessian: a layer's inputs are NaN, infinite, or beyond what can be computed with.
        MemoryTooSmall: not even the widest layer alone fits.
    """
    made_from = {"model_sha256": network.sha256, "data_sha256": samples.sha256, "pruner": compression.pruner.name}
    path, levels = folder / INDEX, compression.levels
    with locked(folder):
        found: dict[str, Any] = {}
        if path.exists():
            database = open_database(folder)
            check_same(path, {key: (database.made_from.get(key), value) for key, value in made_from.items()})
            check_same(path, {"levels": (list(map(str, database.levels)), list(map(str, levels)))})
            database.verify()
            found = dict(database.layers)
        missing = [layer for layer in network.layers if layer.name not in found]
        passes = _passes(missing, len(levels), compression.memory_bytes)
        for count, group in enumerate(passes, start=1):
            what = "hessians" if len(passes) == 1 else f"hessians, pass {count} of {len(passes)}"
            hessians = collect_hessians(network, group, samples, partial(_told, progress, what))
            for layer in group:
                number = network.layers.index(layer)
                found[layer.name] = _build_layer(network, layer, number, hessians.pop(layer.name), compression, folder)
                _write_index(path, levels, found, made_from)
                progress(len(found), len(network.layers), "layers")
        return LayerDatabase(folder, levels, found, made_from, _verified={*found})


def _told(progress: Progress, what: str, done: int, total: int, note: str) -> None:
    progress(done, total, what)


class MemoryTooSmall(OnnxSpdyError, ValueError):
    """The memory that was given doesn't suffice for one layer."""


def _passes(layers: Sequence[Layer], levels: int, memory_bytes: int | None) -> list[list[Layer]]:
    """The layers in graph order, in groups whose Hessians fit in memory together."""
    if memory_bytes is None:
        return [list(layers)] if layers else []
    widest = max((work_bytes(layer, levels) for layer in layers), default=0)
    present = peak_bytes()
    passes: list[list[Layer]] = []
    room = 0
    for layer in layers:
        need = hessian_bytes(layer)
        if present + widest + need > memory_bytes:
            raise MemoryTooSmall(
                f"layer {layer.name!r} needs {(present + widest + need) / 2**30:.1f} GiB with what is in memory "
                f"already, --memory gives {memory_bytes / 2**30:.1f}; give more, or fewer samples"
            )
        if need > room:
            passes.append([])
            room = memory_bytes - present - widest
        passes[-1].append(layer)
        room -= need
    return passes


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def work_bytes(layer: Layer, levels: int) -> int:
    """What a pruner needs for a layer: some matrices in float64, the weights at all levels, and `WORK_BYTES`."""
    return 32 * int(np.prod(layer.shape[1:])) ** 2 + 8 * levels * int(np.prod(layer.shape)) + WORK_BYTES


def _write_index(path: Path, levels: Sequence[Level], layers: Mapping[str, Any], made_from: Mapping[str, str]) -> None:
    write_json(path, "database", VERSION, {"made_from": made_from, "levels": [*map(str, levels)], "layers": layers})


def _build_layer(
    network: Network,
    layer: Layer,
    number: int,
    hessian: torch.Tensor,
    compression: Compression,
    folder: Path,
) -> dict[str, Any]:
    dense = to_canonical(layer, network.dense(layer.weight)).contiguous().float()
    dense_power = squared_error(dense.flatten(1).double(), hessian)
    single = hessian.float()
    errors = [0.0]
    tensors: dict[str, torch.Tensor] = {}
    try:
        check_hessian(hessian)
        pruned = compression.pruner.prune(dense, hessian, compression.levels[1:])
        for level, weight in zip(compression.levels[1:], pruned, strict=True):
            _check(layer, level, weight)
            change = (weight - dense).flatten(1)
            errors.append(squared_error(change, single) / dense_power if dense_power > 0 else 0.0)
            tensors[f"{level}.values"], tensors[f"{level}.mask"] = _packed(weight)
    except UnusableHessian as exc:
        raise UnusableHessian(f"layer {layer.name!r} can't be pruned: {exc}") from exc
    name = f"{number:04d}.safetensors"  # node names may hold anything, also path separators
    write_tensors(folder / name, tensors)
    return {
        "file": name, "sha256": file_sha256(folder / name), "initializer": layer.weight,
        "shape": list(layer.shape), "errors": errors,
    }  # fmt: skip


class PrunerFailed(OnnxSpdyError, ValueError):
    """A pruner returned weights that are not what its level says."""


def _check(layer: Layer, level: Level, weight: torch.Tensor) -> None:
    if tuple(weight.shape) != tuple(layer.shape) or not bool(torch.isfinite(weight).all()):
        raise PrunerFailed(
            f"the pruner gave {tuple(weight.shape)} or NaN for layer {layer.name!r} {layer.shape} at {level}"
        )
    if problem := level_violation(weight.numpy(), level):
        raise PrunerFailed(f"what the pruner gave for layer {layer.name!r} is not {level}: {problem}")


def _packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-zero values in order, and one bit for each weight (uint8, 8 weights a byte)."""
    flat = weight.flatten()
    kept = flat != 0
    return flat[kept].clone(), torch.from_numpy(np.packbits(kept.numpy()))


def _unpacked(values: torch.Tensor, bits: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    count = int(np.prod(shape))
    kept = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).view(bool))
    flat = torch.zeros(count, dtype=values.dtype)
    flat[kept] = values
    return flat.view(*shape)
