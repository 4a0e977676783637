"""The layer database: the weights of every site at every level, made from one calibration pass.

On disk: `index.json` and one safetensors file for each site, a layer or a group of units. A layer's sparse level is
stored as its non-zero values and one bit for each weight, so that 41 levels of a layer take about 7.4 times its dense
size instead of 41; for groups see widths.py. Built site by site; what is there already is kept when the work is
continued. Reading maps the file into memory: only the level that is asked for is read.
"""

from __future__ import annotations

import itertools
import resource
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from onnx_spdy.models import Layer, from_canonical
from onnx_spdy.pipeline.artifact import (
    ArtifactError,
    check_same,
    fields_of,
    file_sha256,
    locked,
    read_json,
    write_json,
)
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.build_site import Building, ToBuild, build_site, unpacked
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.eight_bits import build_rounded, rounded_at
from onnx_spdy.pipeline.database.hessian import CalibrationPass, hessian_bytes
from onnx_spdy.pipeline.database.widths import units_at, weights_at
from onnx_spdy.pipeline.level import Level, LevelError, mixes_precisions
from onnx_spdy.pipeline.network import Network, Weights
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.site import Site, find_sites
from onnx_spdy.pipeline.tasks import IN_PROCESS, Tasks
from onnx_spdy.runtimes.atomic import replacing
from onnx_spdy.runtimes.errors import OnnxSpdyError

VERSION = 1
INDEX = "index.json"
WORK_BYTES = 1 << 30  # that a pruner may need besides its layer's matrices and weights
HESSIANS_BYTES = 4 << 30  # of the layers that are taken together where no memory is given
OPEN_BYTES = 1 << 28  # of files that stay mapped; what is read of them is in memory twice


@dataclass(frozen=True)
class LayerDatabase:
    """Weights of sites x levels (read when asked for) and their errors.

    Attributes:
        folder: where the files are.
        levels: the whole network first.
        layers: name of a site, a layer or a group -> its entry: file, sha256, errors.
        made_from: model_sha256, data_sha256, pruner, pattern.
    """

    folder: Path
    levels: tuple[Level, ...]
    layers: Mapping[str, Mapping[str, Any]]
    made_from: Mapping[str, str]
    _open: OrderedDict[Path, Any] = field(default_factory=OrderedDict, compare=False, repr=False)  # last used last
    _verified: set[str] = field(default_factory=set, compare=False, repr=False)  # sites whose file was compared

    def __reduce__(self) -> tuple[type[LayerDatabase], tuple[Any, ...]]:
        """Where it is sent to its files aren't open yet."""
        return LayerDatabase, (self.folder.absolute(), self.levels, self.layers, self.made_from)

    def errors(self, names: Sequence[str]) -> np.ndarray:
        """(sites, levels) relative squared output error on the calibration samples; of a group its consumers' sum."""
        return np.array([self.layers[name]["errors"] for name in names], np.float64)

    def all_at(self, level: Level) -> dict[str, Level]:
        """All sites at one level.

        Raises:
            LevelError: the database hasn't got it.
        """
        if level not in self.levels:
            known = ", ".join(map(str, self.levels))
            raise LevelError(f"{self.folder} has no level {level}; it has {known}")
        return dict.fromkeys(self.layers, level)

    def weights(self, network: Network, site: Site, level: Level) -> Weights:
        """The weights that a site's level changes, in the shape in which the ONNX file stores them; {} for dense.

        A network of some width is given at full width: with zeros where its consumers take missing units in. Of a layer
        in int8 the grids of its inputs come too, see `Network.load`.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        if not site.changes(level):
            return {}
        with self._file(site.name) as file:
            if level.is_whole:
                return rounded_at(file, site)
            if site.group is not None:
                return weights_at(file, site, site.kept(level), network.dense)
            (layer,) = site.layers
            values, bits = file.get_tensor(f"{level}.values"), file.get_tensor(f"{level}.mask")
            return {layer.weight: from_canonical(layer, unpacked(values, bits, layer.shape))}

    def kept(self, site: Site, level: Level) -> tuple[int, ...]:
        """Numbers of the units of a group that stay at a level, ascending.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        assert site.group is not None
        width = site.kept(level)
        if width == site.group.units:
            return tuple(range(width))
        with self._file(site.name) as file:
            return units_at(file, width)

    @contextmanager
    def _file(self, name: str) -> Iterator[Any]:
        """A site's file, to be read from."""
        path = self.folder / self.layers[name]["file"]
        try:
            if name not in self._verified:
                self._verify(name)
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt").__enter__()
                while len(self._open) > 1 and sum(one.stat().st_size for one in self._open) > OPEN_BYTES:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            yield self._open[path]
        except (OSError, SafetensorError) as exc:
            raise ArtifactError(f"{path} can't be read ({exc}); delete it and build the database again") from exc

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
    network: Network,
    samples: Samples,
    compression: Compression,
    folder: Path,
    progress: Progress = ignore,
    tasks: Tasks = IN_PROCESS,
) -> LayerDatabase:
    """Compress every site, a prunable layer or a group of units, to every level; each is a task.

    Args:
        network: whose dense weights are compressed.
        samples: calibration samples for the layer Hessians.
        compression: to which levels, and how.
        folder: where the database is written; sites that are there already are kept.
        progress: called with (done, total, what).
        tasks: who does it.
    Raises:
        ArtifactError: the folder holds a database that was made from something else, or another one builds there.
        NothingToPrune: the network has no group that can shrink, and widths are wanted.
        UnusableHessian: a layer's inputs are NaN, infinite, or beyond what can be computed with.
        MemoryTooSmall: not even the widest site alone fits.
    """
    sites = find_sites(network.prepared, compression.levels)
    made_from = {"model_sha256": network.sha256, "data_sha256": samples.sha256, "pruner": compression.made_by}
    path, levels = folder / INDEX, compression.levels
    with locked(folder):
        found: dict[str, Any] = {}
        if path.exists():
            database = open_database(folder)
            check_same(path, {key: (database.made_from.get(key), value) for key, value in made_from.items()})
            check_same(path, {"levels": (list(map(str, database.levels)), list(map(str, levels)))})
            database.verify()
            found = dict(database.layers)
        missing = [site for site in sites if site.name not in found]
        if mixes_precisions(levels) and missing:
            files = {site.name: folder / f"{sites.index(site):04d}.safetensors" for site in missing}
            for name, entry in build_rounded(network, missing, samples, compression.form, files, progress):
                found[name] = entry
                _write_index(path, levels, found, made_from)
            missing = []
        passes = _passes(missing, len(levels), compression.memory_bytes)
        if compression.sequential:
            passes = [one for some in passes for one in _that_read_the_same(network, some)]
        calibration = CalibrationPass(network, samples, tasks)
        for count, some in enumerate(passes, start=1):
            what = "hessians" if len(passes) == 1 else f"hessians, pass {count} of {len(passes)}"
            behind: Weights | None = None
            told: Progress = partial(_told, progress, what)
            if compression.sequential:  # many short passes, of which the layers that are done tell enough
                told = ignore
                there = [site for site in sites if site.name in found]
                ahead = [site for site in there if _last_step(network, site) >= calibration.step]
                behind = _pruned(LayerDatabase(folder, levels, found, made_from), network, ahead)
            hessians = calibration.hessians(_layers(some), told, goes_on=count < len(passes), behind=behind)
            if tasks.is_parallel:
                some.sort(key=_operations, reverse=True)
            building = Building(network, compression, folder.absolute() if tasks.sees(folder) else None)
            given = _with_hessians(some, hessians, {site.name: f"{sites.index(site):04d}.safetensors" for site in some})
            for number, built in tasks.map(build_site, building, given, partial(_needs, len(levels))):
                entry = found[some[number].name] = built.entry
                if built.content is not None:
                    with replacing(folder / entry["file"]) as temporary:
                        temporary.write_bytes(built.content)
                found = {site.name: found[site.name] for site in sites if site.name in found}
                _write_index(path, levels, found, made_from)
                progress(len(found), len(sites), "layers" if some[number].group is None else "groups")
        return LayerDatabase(folder, levels, found, made_from, _verified={*found})


def _that_read_the_same(network: Network, sites: Sequence[Site]) -> list[list[Site]]:
    """The sites in order, those together whose layers read one tensor, such as query, key and value."""
    inputs = {node.name: node.input for node in network.model.graph.node}

    def reads(site: Site) -> list[str]:
        (layer,) = site.layers
        return sorted({name for node in layer.nodes for name in inputs[node]} - {layer.weight, layer.bias})

    return [[*some] for _, some in itertools.groupby(sites, reads)]


def _last_step(network: Network, site: Site) -> int:
    """Of the nodes that multiply by a layer's weight the last one's number."""
    (layer,) = site.layers
    return max(network.graph.step_of(name) for name in layer.nodes)


def _pruned(database: LayerDatabase, network: Network, sites: Sequence[Site]) -> Weights:
    """The weights of these sites in a database of one level."""
    there = [database.weights(network, site, database.levels[1]) for site in sites]
    return {name: values for weights in there for name, values in weights.items()}


def _with_hessians(
    sites: Sequence[Site], hessians: dict[str, torch.Tensor], files: Mapping[str, str]
) -> Iterator[ToBuild]:
    """Sites with the Hessians of their layers; what no later site needs is dropped."""
    for number, site in enumerate(sites):
        mine = {layer.name: hessians[layer.name].numpy() for layer in site.layers}
        for layer in {*site.layers} - {*_layers(sites[number + 1 :])}:
            del hessians[layer.name]
        yield ToBuild(site, mine, files[site.name])
        mine.clear()


def _operations(site: Site) -> int:
    """About what a pruner computes for a site: where several work, what takes longest is begun first."""
    shapes = [(layer.shape[0], int(np.prod(layer.shape[1:]))) for layer in site.layers]
    return sum(width**2 * (out + width) for out, width in shapes)


def _needs(levels: int, one: ToBuild) -> int:
    return work_bytes(one.site, levels) + sum(map(hessian_bytes, one.site.layers))


def _told(progress: Progress, what: str, done: int, total: int, note: str) -> None:
    progress(done, total, what)


def _layers(sites: Sequence[Site]) -> list[Layer]:
    """The layers whose weights these sites change, each once: several groups may have a consumer in common."""
    return [*dict.fromkeys(layer for site in sites for layer in site.layers)]


class MemoryTooSmall(OnnxSpdyError, ValueError):
    """The memory that was given doesn't suffice for one site."""


def _passes(sites: Sequence[Site], levels: int, memory_bytes: int | None) -> list[list[Site]]:
    """The sites in order, in parts whose Hessians fit in memory together."""
    widest = max((work_bytes(site, levels) for site in sites), default=0)
    present = peak_bytes()
    if memory_bytes is None:
        most = max((sum(map(hessian_bytes, site.layers)) for site in sites), default=0)
        memory_bytes = present + widest + max(most, HESSIANS_BYTES)
    passes: list[list[Site]] = []
    room = 0
    for site in sites:
        alone = sum(map(hessian_bytes, site.layers))
        if present + widest + alone > memory_bytes:
            what = f"layer {site.name!r}" if site.group is None else f"group {site.name!r}"
            raise MemoryTooSmall(
                f"{what} needs {(present + widest + alone) / 2**30:.1f} GiB with what is in memory "
                f"already, --memory gives {memory_bytes / 2**30:.1f}; give more, or fewer samples"
            )
        there = _layers(passes[-1]) if passes else []
        need = sum(hessian_bytes(layer) for layer in site.layers if layer not in there)
        if not passes or need > room:
            passes.append([])
            room, need = memory_bytes - present - widest, alone
        passes[-1].append(site)
        room -= need
    return passes


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def work_bytes(site: Site, levels: int) -> int:
    """What a pruner needs for a site: some matrices in float64, the weights at all levels, and `WORK_BYTES`."""
    return WORK_BYTES + sum(
        32 * int(np.prod(layer.shape[1:])) ** 2 + 8 * levels * int(np.prod(layer.shape)) for layer in site.layers
    )


def _write_index(path: Path, levels: Sequence[Level], layers: Mapping[str, Any], made_from: Mapping[str, str]) -> None:
    write_json(path, "database", VERSION, {"made_from": made_from, "levels": [*map(str, levels)], "layers": layers})
