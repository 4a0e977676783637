"""How well the latency model predicts whole networks, in a real runtime, beside the plain sum of layer times.

The table is measured when `--latency` isn't there yet. Then networks that it has never seen are measured, some of them
in turns with the dense one: random levels for each layer, or widths for each group, drawn from ranges as different as
0-0.99 and 0.8-0.99, or int8 for random layers. Each network is visited several times, in a new order, because a
disturbance of the machine lasts longer than a visit; how far the visits disagree is the noise below which no prediction
can be told from a better one. A visit that other programs disturb is repeated, some times.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from onnx_spdy.models import save_model
from onnx_spdy.pipeline.artifact import ArtifactError
from onnx_spdy.pipeline.engine import open_runtime
from onnx_spdy.pipeline.latency.kind import Kind
from onnx_spdy.pipeline.latency.measure import BUSY_WAITS_SECONDS, kind_of, measure_latency
from onnx_spdy.pipeline.latency.sampling import columns_of
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import DEFAULT_PATTERN, Level, levels_for, mixes_precisions
from onnx_spdy.runtimes import (
    Environment,
    Runtime,
    Session,
    Workload,
    measure_interleaved,
    measure_undisturbed,
    median_ratio,
)
from onnx_spdy.tools.options import Batch, ModelArgument, Pattern, RuntimeName, Threads
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.specs import load_network
from onnx_spdy.tools.table import print_table

LOWEST = (0.0, 0.0, 0.4, 0.8)  # of the ranges of sparsity, which all end at the highest level
VISIT_SECONDS = 2.5
RUNS_A_ROUND = 2
GROUP = 8  # networks that are measured in turns


def bench(
    model: ModelArgument,
    runtime: RuntimeName,
    latency: Annotated[Path, typer.Option("--latency", metavar="F", help="the table; measured when it isn't there")],
    batch: Batch = 1,
    threads: Threads = None,
    pattern: Pattern = DEFAULT_PATTERN,
    networks: Annotated[int, typer.Option("--networks", min=1, help="that the table has never seen")] = 50,
    visits: Annotated[int, typer.Option("--visits", min=2, help="of each network")] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the networks; the table has its own")] = 1,
    json: Json = None,
) -> None:
    """Measure random mixed networks; show the errors of the model and of the plain sum."""
    levels = levels_for(pattern)
    dense = load_network(model)
    workload = Workload(batch, threads)
    with open_runtime(runtime) as engine, ProgressBars() as bars:
        engine.check()
        kind = kind_of(dense, levels, engine, workload)
        if not latency.exists():
            measure_latency(dense, engine, levels, workload, save=latency, progress=bars.stage("table"))
        found = LatencyTable.load(latency)
        if found.levels != levels:
            raise ArtifactError(f"{latency} is of other levels than those of pattern {pattern}; remove it")
        choices = random_choices(levels, len(kind.names), networks, np.random.default_rng(seed))
        with tempfile.TemporaryDirectory(prefix="onnx-spdy-") as folder:
            path = Path(folder) / "dense.onnx"
            save_model(dense.proto, path)
            plain = PlainSum(engine, path, kind, levels, workload, bars)
            measured = np.zeros((networks, visits))
            loads = []
            with engine.open(path, workload) as reference:
                if wrong := found.environment.mismatch(reference.environment):
                    raise ArtifactError(f"{latency} was measured in another environment: {[*wrong]} differ; remove it")
                visit = Visit(engine, path, reference, kind, workload)
                for time in range(visits):
                    order = np.random.default_rng(seed + time).permutation(networks)
                    for start in range(0, networks, GROUP):
                        group = order[start : start + GROUP]
                        measured[group, time], load = visit(choices[group], [seed + int(number) for number in group])
                        loads.append(load or 0.0)
                        bars.stage("networks")(time * networks + start + len(group), visits * networks, "")
    relative = {
        "model": np.array([found.predict(choice) for choice in choices]) / found.dense_seconds,
        "plain sum": np.array([plain(choice) for choice in choices]) / plain(np.zeros(len(kind.names), np.int64)),
    }
    show(found.environment, relative, measured)
    print(f"other programs kept {max(loads):.2f} cores busy at most, {found.foreign_cores} in the table's measurement")
    content = {"engine": found.environment.to_json(), "measured": measured.tolist(), "choices": choices.tolist(),
               "foreign_cores": loads}  # fmt: skip
    predicted = {name: values.tolist() for name, values in relative.items()}
    write_results(json, "bench_latency", {**content, "predicted": predicted}, seed)


def random_choices(levels: tuple[Level, ...], layers: int, networks: int, rng: np.random.Generator) -> np.ndarray:
    """(networks, layers) level indices: a pattern for each layer, a sparsity drawn evenly from one of the ranges, to
    the nearest level; or int8 for a share of the layers that is drawn for the network."""
    if mixes_precisions(levels):
        return (rng.random((networks, layers)) < rng.random((networks, 1))).astype(np.int64)
    sparsities = np.array([level.sparsity for level in levels])
    drawn = [rng.uniform(LOWEST[number % len(LOWEST)], sparsities[-1], layers) for number in range(networks)]
    nearest = []
    for columns in columns_of(levels).values():
        own = np.array([0, *columns])
        nearest.append(own[np.abs(np.array(drawn)[:, :, None] - sparsities[own]).argmin(axis=2)])
    return np.choose(rng.integers(len(nearest), size=(networks, layers)), nearest)


class PlainSum:
    """What is published: each layer's time from profiles of networks with one level everywhere, summed.

    A row of several layers, or groups, is shared by them equally.

    Source: Frantar & Alistarh, SPDY (ICML 2022), section 3.1.
    """

    def __init__(
        self,
        engine: Runtime,
        path: Path,
        kind: Kind,
        levels: tuple[Level, ...],
        workload: Workload,
        bars: ProgressBars,
    ) -> None:
        self._seconds = np.zeros((len(kind.names), len(levels)))
        rest = []
        for index in range(len(levels)):
            same = [index] * len(kind.names)
            file, zeros = kind.network(same, index, path, path.with_name("same.onnx"))
            rest.append(0.0)
            for row in engine.layer_seconds(
                file, workload, iterations=8, warmup=2, zeros=zeros, seed=index, merged=False
            ):
                own = [*kind.works_on(row)]
                rest[-1] += 0.0 if own else row.seconds
                self._seconds[own, index] += row.seconds / max(1, len(own))
            bars.stage("plain sum")(index + 1, len(levels), "")
        self._rest = float(np.median(rest))

    def __call__(self, choice: np.ndarray) -> float:
        return self._rest + float(self._seconds[np.arange(len(choice)), choice].sum())


class Visit:
    """Measures some networks in turns with the dense one."""

    def __init__(self, engine: Runtime, path: Path, reference: Session, kind: Kind, workload: Workload) -> None:
        self._engine, self._path, self._reference, self._kind = engine, path, reference, kind
        self._workload = workload
        dense = float(np.median(reference.seconds(5, warmup=3)))
        self._rounds = max(5, round(VISIT_SECONDS / (dense * (1 + RUNS_A_ROUND))))

    def __call__(self, choices: np.ndarray, seeds: list[int]) -> tuple[list[float], float | None]:
        """(networks,) seconds of each network (networks, layers) / those of the dense one, and what others used."""
        networks = []
        for number, (choice, seed) in enumerate(zip(choices, seeds, strict=True)):
            own = self._path.with_name(f"network-{number}.onnx")
            networks.append((*self._kind.network(choice, seed, self._path, own), seed))
        return measure_undisturbed(
            self._engine,
            lambda: self._once(networks),
            lambda found: self._reference.environment.cores,
            iter(BUSY_WAITS_SECONDS),
        )

    def _once(self, networks: list[tuple[Path, dict[str, float], int]]) -> list[float]:
        with contextlib.ExitStack() as opened:
            sessions = {"dense": self._reference}
            for number, (path, zeros, seed) in enumerate(networks):
                session = self._engine.open(path, self._workload, zeros=zeros, seed=seed)
                sessions[str(number)] = opened.enter_context(session)
            times = measure_interleaved(sessions, rounds=self._rounds, iterations=RUNS_A_ROUND, warmup=2)
        dense = times.pop("dense").seconds
        return [median_ratio(one.seconds, dense)[0] for one in times.values()]


def show(environment: Environment, relative: Mapping[str, np.ndarray], measured: np.ndarray) -> None:
    """Print the errors of predicted speedups.

    Args:
        environment: of all of it.
        relative: model -> (networks,) seconds relative to the dense network, as predicted.
        measured: (networks, visits), the same as measured.
    """
    truth = np.exp(np.log(measured).mean(axis=1))
    noise = np.abs(np.log(measured[:, 0] / measured[:, 1]))
    rows = []
    for name, predicted in relative.items():
        error = truth / predicted - 1  # of the speedup: positive is promised too much
        size = np.abs(error)
        rows.append((name, *(f"{one:.1%}" for one in (np.median(size), np.quantile(size, 0.9), size.max())),
                     f"{np.median(error):+.1%}"))  # fmt: skip
    print_table("Errors of predicted speedups", ("model", "median", "90 % within", "largest", "bias"), rows)
    print(f"{environment.runtime} {environment.version}, batch {environment.batch}, {environment.threads} threads")
    print(f"{len(truth)} networks, measured speedups {1 / truth.max():.2f} to {1 / truth.min():.2f}")
    print(f"two visits of one network differ by {np.median(noise):.1%} (median), {noise.max():.1%} (largest)")
