"""The whole method, from a trained network to a pruned one whose speedup was measured.

Reads like the paragraph that describes it: prepare the graph, measure what every layer costs at every level
in the runtime, build the database of compressed weights, search the profile that loses least within the
time that the target leaves, stitch and correct, write the weights back, measure the whole network again,
and aim anew until the measured speedup is what was asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_spdy.models import load_model, model_sha256, save_model
from onnx_spdy.pipeline.alternatives import measure_alternatives
from onnx_spdy.pipeline.artifact import check_same
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.layer_database import build_database
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER, Pruner, pruner_named
from onnx_spdy.pipeline.deploy import check_zeros_kept, deploy
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import DENSE, Level, levels_for
from onnx_spdy.pipeline.loss import Loss
from onnx_spdy.pipeline.metric import Metric
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import Report, make_report
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, search_named
from onnx_spdy.pipeline.search.profile_search import SEARCH_SAMPLES, Listen, ProfileSearch, never
from onnx_spdy.pipeline.stitch import CorrectedStitcher
from onnx_spdy.pipeline.target import reach
from onnx_spdy.pipeline.training.repair import NO_REPAIR, check_repair, repair
from onnx_spdy.pipeline.training.trainer import Training
from onnx_spdy.pipeline.validate import Validation, evaluate, validate
from onnx_spdy.runtimes import Runtime

Watch = Callable[[str, int, int, str], None]  # (stage, done, total, note)


def ignore(stage: str, done: int, total: int, note: str) -> None:
    """The watcher that watches nothing."""


def run(
    dense: onnx.ModelProto,
    samples: Samples,
    runtime: Runtime,
    speedup: float,
    out: Path,
    *,
    batch: int = 1,
    threads: int | None = None,
    evaluation: Samples | None = None,
    metric: Metric | None = None,
    metric_name: str | None = None,
    loss: str | Loss | None = None,
    pattern: str = "unstructured",
    pruner: str = DEFAULT_PRUNER,
    prune: Pruner | None = None,
    memory_bytes: int | None = None,
    search: str = DEFAULT_SEARCH,
    search_samples: int = SEARCH_SAMPLES,
    finetune: str = NO_REPAIR,
    seed: int = 0,
    time_limit_seconds: float | None = None,
    image_limit: int | None = None,
    allow_busy: bool = False,
    shared: Path | None = None,
    watch: Watch = ignore,
    listen: Listen = never,
) -> Report:
    """Prune a network to a speedup that is measured in the runtime.

    Leaves in `out`: dense.onnx, model.onnx, latency.json, database/, search.json, profile.json, report.json. What is
    there from an earlier call with the same arguments is kept; what belongs to another network or setting is refused.

    Args:
        dense: the prepared network (`onnx_spdy.models.prepare`).
        samples: calibration samples.
        runtime: the one that will run the network.
        speedup: dense seconds / pruned seconds of the whole network, in this runtime, batch and threads.
        out: folder for the results.
        batch, threads: of the measurements; None takes all physical cores.
        evaluation, metric, metric_name: what the metric is computed on, and how; None leaves it out.
        loss: see `Objective`.
        pattern, pruner, search: names; see `levels_for`, PRUNERS, SEARCHES.
        prune: a pruner of your own, which `pruner` then names; None for the one of that name.
        memory_bytes: see `build_database`.
        search_samples: of the calibration samples, how many a profile is scored on.
        finetune: `gap` repairs the profile that is kept, once, after its speed was measured; see REPAIRS.
        seed: of everything random.
        time_limit_seconds: for the search; the best profile so far is taken then.
        image_limit: samples that the search may run through the network; None for what it finds worthwhile.
        allow_busy: measure even while other programs use the CPU.
        shared: folder for what other targets need as well (dense.onnx, latency.json, database/, search.json); None
            for `out`.
        watch: called with (stage, done, total, note).
        listen: see `ProfileSearch`.
    Returns:
        The report; where its `missed` says so, the target was out of reach, and the fastest network is deployed.
    Raises:
        NoSpeedup, InfeasibleTarget: the target can't be reached by the table; the message says what can.
        ArtifactError: `out` belongs to another run.
    """
    levels, _ = levels_for(pattern), search_named(search)
    prune = prune or pruner_named(pruner)
    check_repair(finetune)
    clock, common = _Stages(), shared or out
    network = Network(dense)
    inputs = samples.take(slice(0, batch)).inputs if len(samples) >= batch else None
    keep_dense(dense, common / "dense.onnx")

    def score(path: Path) -> float | None:
        if evaluation is None or metric is None:
            return None
        with clock("evaluate"):
            return evaluate(
                path, evaluation, metric, progress=lambda done, total: watch("evaluate", done, total, path.name)
            )

    metric_dense = score(common / "dense.onnx")  # before the long work: a metric may not fit the data
    with clock("measure"):
        table = latency_table(
            dense,
            runtime,
            levels,
            common / "latency.json",
            batch=batch,
            threads=threads,
            inputs=inputs,
            seed=seed,
            allow_busy=allow_busy,
            watch=watch,
        )
    table.budget(speedup)  # refuse the impossible before the long work
    with clock("database"):
        database = build_database(
            network, samples, levels, prune, pruner, common / "database",
            lambda what, done, total: watch("database", done, total, what), memory_bytes,
        )  # fmt: skip
    with clock("search"):
        finder = ProfileSearch(
            network, table, database, samples, loss=loss, search=search, search_samples=search_samples, seed=seed,
            time_limit_seconds=time_limit_seconds, image_limit=image_limit, state=common / "search.json",
            progress=lambda best, done, left: watch("search", done, done + left, f"loss {best:.5f}"), listen=listen,
        )  # fmt: skip
        first = finder.find_or_load(speedup, out / "profile.json")
    stitching = CorrectedStitcher(network, database, samples, loss)

    def realise(profile: Profile) -> Validation:
        stitching.stitch(profile)
        deploy(dense, network.changed(), profile.levels, out / "model.onnx")
        profile.save(out / "profile.json")
        return validate(
            common / "dense.onnx", out / "model.onnx", runtime, batch=batch, threads=threads, inputs=inputs,
            progress=lambda done, total: watch("validate", done, total, f"aim {profile.aim_speedup:.3f}x"),
        )  # fmt: skip

    with clock("validate"):
        outcome = reach(speedup, first, lambda aim: finder.aim(first, aim), realise)
    repaired = None
    if finetune != NO_REPAIR:
        with clock("repair"):  # after the measurements: masks are fixed, so the speed stays what it is
            measured = load_model(out / "model.onnx")
            repaired = repair_stitched(
                network, outcome.kept.profile, samples, seed=seed, checkpoint=out / "repair.safetensors", watch=watch
            )
            check_zeros_kept(
                measured, deploy(dense, network.changed(), outcome.kept.profile.levels, out / "model.onnx")
            )
    with clock("alternatives"):
        alternatives = measure_alternatives(
            common / "dense.onnx", out / "model.onnx", runtime, batch=batch, threads=threads, inputs=inputs,
            progress=lambda done, total: watch("alternatives", done, total, "dense, in every runtime"),
        )  # fmt: skip
    metric_pruned = score(out / "model.onnx")
    metrics = None if metric_dense is None or metric_pruned is None else (metric_dense, metric_pruned)
    report = make_report(
        network, table, database, outcome,
        metric_name=metric_name, metrics=metrics, alternatives=alternatives, corrected=stitching.corrected,
        repaired=repaired, stages=clock.stages,
    )  # fmt: skip
    report.save(out / "report.json")
    return report


def keep_dense(dense: onnx.ModelProto, path: Path) -> None:
    """Write the prepared network, or check that the one that is there is the same.

    Raises:
        ArtifactError: the folder belongs to another network.
    """
    if path.exists():
        check_same(path, {"model_sha256": (model_sha256(load_model(path)), model_sha256(dense))})
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(dense, path)


def latency_table(
    dense: onnx.ModelProto,
    runtime: Runtime,
    levels: Sequence[Level],
    path: Path,
    *,
    batch: int,
    threads: int | None,
    inputs: dict[str, np.ndarray] | None,
    seed: int,
    allow_busy: bool = False,
    watch: Watch = ignore,
) -> LatencyTable:
    """The latency table in a file, measured first when there is none.

    Raises:
        ArtifactError: the file was measured for another network, other levels, or in another environment.
    """
    if path.exists():
        table = LatencyTable.load(path)
        with runtime.open(path.with_name("dense.onnx"), batch=batch, threads=threads, inputs=inputs) as session:
            here = session.environment
        check_same(
            path,
            {"model_sha256": (table.model_sha256, model_sha256(dense))}
            | table.environment.mismatch(here)
            | {"levels": ([*map(str, table.levels)], [*map(str, levels)])},
        )
        return table
    return measure_latency(
        dense, runtime, levels, batch=batch, threads=threads, inputs=inputs, seed=seed,
        save=path, allow_busy=allow_busy,
        progress=lambda done, total, note: watch("measure", done, total, note),
    )  # fmt: skip


def repair_stitched(
    network: Network, profile: Profile, samples: Samples, *, seed: int, checkpoint: Path | None, watch: Watch = ignore
) -> Training | None:
    """Repair a network that is stitched to a profile, in place; None where the profile prunes nothing."""
    pruned = [layer for layer in network.layers if profile.levels[layer.name] != DENSE]
    return None if not pruned else repair(
        network, pruned, samples, seed=seed, checkpoint=checkpoint,
        progress=lambda done, total, note: watch("repair", done, total, note),
    )  # fmt: skip


class _Stages:
    """Wall seconds of the stages, in order; of one that comes twice, both together where it came last."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @property
    def stages(self) -> list[dict[str, Any]]:
        return [{"name": name, "seconds": round(seconds, 3)} for name, seconds in self._seconds.items()]

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._seconds[name] = self._seconds.pop(name, 0.0) + time.monotonic() - start
