"""The comparison at the end of a run: the pruned network and the dense one in every engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from onnx_spdy.pipeline.aim import FOLDER
from onnx_spdy.pipeline.alternatives import (
    DENSE,
    PRUNED,
    Alternatives,
    elsewhere,
    here,
    measure_alternatives,
)
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.quantised.make import NOTHING, Quantised, quantise_all
from onnx_spdy.runtimes import Runtime, Workload, location


@dataclass(frozen=True)
class Files:
    """The networks of a run, and their int8 files where other tools made some.

    Attributes:
        dense, pruned: ONNX files.
        floating: the pruned network in floating point; `pruned` itself unless that is in int8.
        is_narrow: the pruned network has fewer units, and so runs everywhere.
        rivals, own: of the dense network, and of the pruned one.
    """

    dense: Path
    pruned: Path
    floating: Path
    is_narrow: bool
    rivals: Quantised = NOTHING
    own: Quantised = NOTHING

    @property
    def is_int8(self) -> bool:
        return self.floating != self.pruned


def with_quantised(
    files: Files, samples: Samples, dense_folder: Path, pruned_folder: Path, progress: Progress = ignore
) -> Files:
    """The files with the int8 ones that other tools make of them; what is there already is taken.

    Args:
        samples: calibration samples.
        dense_folder, pruned_folder: of a run, where those of each network go.
    """
    rivals = quantise_all(files.dense, samples, dense_folder / FOLDER / DENSE, progress=progress)
    own = NOTHING
    if files.is_narrow:
        own = quantise_all(files.floating, samples, pruned_folder / FOLDER / PRUNED, progress=progress)
    return replace(files, rivals=rivals, own=own)


def compare(files: Files, runtime: Runtime, workload: Workload, progress: Progress = ignore) -> Alternatives:
    """Measure them in every engine of the machine where the runtime is."""
    candidates = [here(PRUNED, files.pruned, runtime), here(DENSE, files.dense, runtime)]
    candidates += elsewhere(DENSE, files.dense, files.rivals, runtime)
    if files.is_narrow:
        candidates += elsewhere(PRUNED, files.floating, files.own, None if files.is_int8 else runtime)
    where = location(runtime)
    found = measure_alternatives(candidates, runtime, workload, where=where, progress=progress)
    return found.without(files.rivals.missing)
