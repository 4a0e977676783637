"""The latency table in a file, measured where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx_spdy.models import Prepared
from onnx_spdy.pipeline.artifact import check_same
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.runtimes import Runtime, Workload


def load_or_measure(
    dense: Prepared,
    runtime: Runtime,
    levels: Sequence[Level],
    workload: Workload,
    path: Path,
    model: Path,
    *,
    seed: int = 0,
    allow_busy: bool = False,
    progress: Progress = ignore,
) -> LatencyTable:
    """The latency table in a file; see `measure_latency`.

    Args:
        path: of latency.json.
        model: file of the network.
    Raises:
        ArtifactError: the file was measured for another network, other levels or inputs of other shapes, or in another
            environment.
    """
    if not path.exists():
        return measure_latency(
            dense, runtime, levels, workload, seed=seed, save=path, allow_busy=allow_busy, progress=progress
        )
    table = LatencyTable.load(path)
    with runtime.open(model, workload) as session:
        here = session.environment
    check_same(
        path,
        {"model_sha256": (table.model_sha256, dense.sha256)}
        | table.environment.mismatch(here)
        | {"levels": ([*map(str, table.levels)], [*map(str, levels)])},
    )
    table.check_workload(dense.proto.graph, workload, str(path))
    return table
