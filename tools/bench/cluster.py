"""What a Dask cluster gains for a layer database, and what it costs.

The database is built here, in one thread, and on clusters of processes of one thread each on this machine: wall
seconds, the bytes that tasks took and gave, and what is left of the seconds without Dask. The files must be the same.

From the seconds that the tasks themselves took on one worker follows what many workers would take at best: list
scheduling, longest first (Graham, 1969), of the shards of the samples, then of the layers; what isn't in tasks stays.
"""

from __future__ import annotations

import heapq
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from onnx_spdy.pipeline.cluster import INSTALL, Cluster, connected
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.hessian import SHARD
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, build_database
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER
from onnx_spdy.pipeline.level import DEFAULT_PATTERN, levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.tasks import IN_PROCESS, ClusterError, Tasks
from onnx_spdy.tools.options import Data, ModelArgument, Pattern, PrunerName, several
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.specs import load_inputs, load_pruner
from onnx_spdy.tools.table import print_table

MOST_WORKERS = 64
GAIN = 1.1  # by twice as many workers; with less, scaling has stopped


@dataclass(frozen=True)
class Row:
    """One way to build the database; 0 workers are none, without Dask."""

    workers: int
    seconds: float
    task_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


def bench(
    model: ModelArgument,
    data: Data,
    pattern: Pattern = DEFAULT_PATTERN,
    pruner: PrunerName = DEFAULT_PRUNER,
    workers: Annotated[str, typer.Option("--workers", metavar="N[,N...]", help="processes of one thread")] = "1,2",
    json: Json = None,
) -> None:
    """Build the database without Dask and on local clusters; show times and bytes, and what many workers would do."""
    compression = Compression(levels_for(pattern), load_pruner(pruner))
    dense, samples = load_inputs(model, data)
    network = Network(dense)
    shards = -(-len(network.batches(samples)) // SHARD)
    torch.set_num_threads(1)  # as on the workers: with more, last bits may differ
    rows: list[Row] = []
    tasks_of: dict[str, list[float]] = {}
    with ProgressBars() as bars:

        def built(tasks: Tasks) -> tuple[float, Mapping[str, bytes]]:
            return _built(network, samples, compression, tasks, bars)

        seconds, expected = built(IN_PROCESS)
        rows.append(Row(0, seconds))
        for count in sorted(set(several(workers, int, "--workers", "a number of workers"))):
            cluster, seconds, found = _on_workers(count, built)
            if found != expected:
                raise ClusterError(f"{count} workers built another database than this process; that is a bug")
            rows.append(Row(count, seconds, sum(cluster.seconds), cluster.sent_bytes, cluster.received_bytes))
            tasks_of = tasks_of or {"shards": cluster.seconds[:shards], "sites": cluster.seconds[shards:]}
    simulated = simulate(rows[1], tasks_of)
    show(rows, simulated, tasks_of)
    write_results(
        json, "bench_cluster", {"rows": [asdict(row) for row in rows], "tasks": tasks_of, "simulated": simulated}
    )  # fmt: skip


def _built(
    network: Network, samples: Samples, compression: Compression, tasks: Tasks, bars: ProgressBars
) -> tuple[float, Mapping[str, bytes]]:
    """Seconds, and the files."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        database: LayerDatabase = build_database(
            network, samples, compression, Path(folder), bars.stage("database"), tasks
        )
        seconds = time.monotonic() - start
        return seconds, {path.name: path.read_bytes() for path in database.folder.iterdir()}


def _on_workers(
    count: int, built: Callable[[Tasks], tuple[float, Mapping[str, bytes]]]
) -> tuple[Cluster, float, Mapping[str, bytes]]:
    try:
        from distributed import LocalCluster
    except ImportError as exc:
        raise ClusterError(f"this benchmark needs Dask: {INSTALL}") from exc
    with (
        LocalCluster(n_workers=count, threads_per_worker=1, dashboard_address=":0") as local,
        connected(local.scheduler_address) as cluster,
    ):
        return cluster, *built(cluster)


def simulate(one: Row, tasks: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """Seconds of 1, 2, 4, ... workers, from the row of one worker and the seconds of its tasks."""
    rest = max(0.0, one.seconds - sum(map(sum, tasks.values())))
    found = []
    count = 1
    while count <= MOST_WORKERS:
        parts = {name: makespan(seconds, count) for name, seconds in tasks.items()}
        found.append({"workers": count, **parts, "rest": rest, "seconds": rest + sum(parts.values())})
        count *= 2
    return found


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last task ends where each goes to the first free worker, the longest first."""
    free = [0.0] * workers
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def show(rows: Sequence[Row], simulated: Sequence[Mapping[str, float]], tasks: Mapping[str, Sequence[float]]) -> None:
    """Print the tables."""
    alone = rows[0].seconds
    print_table(
        "A layer database, measured", ("workers", "seconds", "in tasks", "MB sent", "MB received", "times as fast"),
        [(row.workers or "no Dask", f"{row.seconds:.1f}", f"{row.task_seconds:.1f}" if row.workers else "",
          f"{row.sent_bytes / 1e6:.1f}", f"{row.received_bytes / 1e6:.1f}", f"{alone / row.seconds:.2f}")
         for row in rows],
    )  # fmt: skip
    print_table(
        "The same by list scheduling", ("workers", "shards", "layers", "rest", "seconds", "times as fast"),
        [(f"{row['workers']:.0f}", f"{row['shards']:.1f}", f"{row['sites']:.1f}", f"{row['rest']:.1f}",
          f"{row['seconds']:.1f}", f"{alone / row['seconds']:.2f}") for row in simulated],
    )  # fmt: skip
    pairs = itertools.pairwise(simulated)
    stop = next((one["workers"] for one, more in pairs if one["seconds"] < GAIN * more["seconds"]), MOST_WORKERS)
    print(
        f"twice as many workers gain less than {GAIN - 1:.0%} from {stop:.0f} on: {len(tasks['shards'])} shards, "
        f"{len(tasks['sites'])} layers or groups of which the longest takes {max(tasks['sites']):.1f} s of "
        f"{sum(tasks['sites']):.1f} s"
    )
