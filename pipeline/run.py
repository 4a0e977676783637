"""The whole method, from a trained network to a pruned one whose speedup was measured.

Reads like the paragraph that describes it: prepare the graph, measure what every layer costs at every level
in the runtime, build the database of compressed weights, search the profile that loses least within the
time that the target leaves, stitch and correct, write the weights back, measure the whole network again,
and search anew until the measured speedup is what was asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnx_spdy.models import Prepared, load_model, save_model
from onnx_spdy.pipeline.aim import FOLDER
from onnx_spdy.pipeline.alternatives import judged
from onnx_spdy.pipeline.artifact import check_same, locked
from onnx_spdy.pipeline.compare import Files, with_quantised
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import build_database
from onnx_spdy.pipeline.deploy import deploy
from onnx_spdy.pipeline.fleet.device import Device
from onnx_spdy.pipeline.fleet.fleet import Fleet, measure_tables, one_form
from onnx_spdy.pipeline.fleet.together import Together
from onnx_spdy.pipeline.int8.pruned import in_int8
from onnx_spdy.pipeline.level import any_int8
from onnx_spdy.pipeline.metric import Evaluation, Metrics
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.progress import Watch
from onnx_spdy.pipeline.ranges import RANGES
from onnx_spdy.pipeline.report import Report, make_report
from onnx_spdy.pipeline.search.profile_search import ProfileSearch
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.shorten import shortened
from onnx_spdy.pipeline.stitch import CorrectedStitcher
from onnx_spdy.pipeline.target import meet_target
from onnx_spdy.pipeline.tasks import IN_PROCESS, Tasks
from onnx_spdy.pipeline.training.repair import FULL, LONGEST_SECONDS, NO_REPAIR, check_repair, repair
from onnx_spdy.pipeline.training.whole import WholeTraining, train_whole
from onnx_spdy.pipeline.usage import write_usage
from onnx_spdy.pipeline.validate import judge
from onnx_spdy.runtimes import Runtime, Workload, location


@dataclass(frozen=True)
class Target:
    """A speedup, and where what reaches it goes.

    Attributes:
        speedup: dense seconds / pruned seconds of the whole network, in one runtime and workload.
        out: folder for model.onnx, profile.json and report.json.
        shared: folder for what other targets need as well: latency.json, search.json, alternatives/; None for `out`.
        network: folder for what other devices need as well: dense.onnx, database/; None for that of `shared`.
    """

    speedup: float
    out: Path
    shared: Path | None = None
    network: Path | None = None

    @property
    def common(self) -> Path:
        """The folder of what targets share."""
        return self.shared or self.out

    @property
    def of_network(self) -> Path:
        """The folder of what devices share."""
        return self.network or self.common


def run(
    dense: Prepared,
    samples: Samples,
    runtime: Runtime | Sequence[Device],
    workload: Workload,
    target: Target,
    *,
    compression: Compression | None = None,
    search: SearchSettings | None = None,
    finetune: str = NO_REPAIR,
    training: WholeTraining | None = None,
    evaluation: Evaluation | None = None,
    allow_busy: bool = False,
    watch: Watch | None = None,
    tasks: Tasks = IN_PROCESS,
) -> Report:
    """Prune a network to a speedup that is measured in the runtime, or on each of several devices.

    Leaves in the target's folder: dense.onnx, model.onnx, latency.json, database/, search.json, profile.json,
    report.json, and load.py where the engine has one. What is there from an earlier call with the same arguments is
    kept; what belongs to another network or setting is refused. With several devices each has a folder in it for its
    table, its alternatives and its report.

    Args:
        dense: the prepared network (`onnx_spdy.models.prepare`).
        samples: calibration samples.
        runtime: the one that will run the network; or devices, for one network that meets the target on all of them.
        workload: batch, threads and inputs of the measurements.
        target: the speedup, and the folder for the results.
        compression: levels and pruner.
        search: how the profile is searched; its seed is that of everything random here.
        finetune: `gap` repairs the profile that is kept, once, after its speed was measured; `full` then trains the
            whole network; see REPAIRS.
        training: on what `full` trains, and how long; by default the calibration samples.
        evaluation: what the metric is computed on, and how; None leaves it out.
        allow_busy: measure even while other programs use the CPU.
        watch: is told how far each stage is, and may stop the search.
        tasks: who builds the database and scores profiles.
    Returns:
        The report; where its `missed` says so, the target was out of reach, and the fastest network is deployed. Of
        several devices, that of the one where the network gains least, which names the others'.
    Raises:
        NoSpeedup, InfeasibleTarget: the target can't be reached by the table; the message says what can.
        ArtifactError: the folder belongs to another run, or another one works in it now.
        FleetError: devices that can't have one network.
    """
    check_repair(finetune)
    compression, search, watch = compression or Compression(), search or SearchSettings(), watch or Watch()
    training = training or WholeTraining()
    devices = runtime if isinstance(runtime, Sequence) else [Device(runtime)]
    clock, out, common = _Stages(), target.out, target.common
    form = one_form(devices) if any_int8(compression.levels) else None
    compression = replace(compression, form=form) if form else compression
    with locked(target.of_network), locked(common), locked(out):
        network = Network(dense)
        dense_path, pruned_path = target.of_network / "dense.onnx", out / "model.onnx"
        keep_dense(dense, dense_path)
        report_path = out / "report.json"
        earlier = Report.load(report_path) if report_path.exists() else None  # a damaged one is told before the work

        def score(path: Path, engine: Runtime | None = None) -> float:
            assert evaluation, "metrics are asked for where there is something to compute them on"
            with clock("evaluate"):
                return judge(path, evaluation, runtime=engine, progress=watch.stage("evaluate"))

        if evaluation:  # before the long work: a metric may not fit the data
            dense_score = score(dense_path)
        with clock("measure"):
            tables = measure_tables(
                dense, devices, compression.levels, workload, dense_path, common,
                seed=search.seed, allow_busy=allow_busy, watch=watch,
            )  # fmt: skip
        fleet = Fleet(devices, tables)
        fleet.times.limits(target.speedup)  # refuse the impossible before the long work
        calibration = shortened(network, samples)
        with clock("database"):
            database = build_database(
                network, calibration, compression, target.of_network / "database", watch.stage("database"), tasks
            )  # fmt: skip
        with clock("search"):
            finder = ProfileSearch(
                network, fleet.times, database, calibration, search,
                state=common / "search.json", progress=watch.stage("search"), listen=watch.listen,
                tasks=tasks,
            )  # fmt: skip
            first = finder.find_or_load(target.speedup, out / "profile.json")
        stitcher = CorrectedStitcher(finder.stitcher, calibration, search.loss)
        pruned = PrunedNetwork(dense, {}, {})

        def finished(pruned: PrunedNetwork, ranges: Collection[str] = RANGES) -> PrunedNetwork:
            """In the precision that it is deployed in."""
            if form is None:
                return pruned
            with clock("int8"):
                return in_int8(
                    pruned, calibration, form,
                    ranges=ranges, loss=search.loss, seed=search.seed, progress=watch.stage("int8"),
                )  # fmt: skip

        def measured() -> Together:
            return fleet.validate(dense_path, pruned_path, workload, watch)

        def deploy_and_measure(profile: Profile) -> Together:
            nonlocal pruned
            if pruned.levels != profile.levels:  # a second look finds it deployed
                pruned = finished(stitcher.stitch(profile), drafted)
                deploy(dense, pruned, pruned_path)
            profile.save(out / "profile.json")
            return fleet.learnt(profile, measured())

        # What is trained afterwards is written again, with the ranges that suit it best.
        drafted = RANGES if finetune == NO_REPAIR else (next(iter(RANGES)),)
        with clock("validate"):
            outcome = meet_target(
                target.speedup, first, lambda x: finder.adjusted(first, x), deploy_and_measure,
                predicted=fleet.predicted_speedup,
            )  # fmt: skip
        repaired, trained = None, None
        if finetune != NO_REPAIR:
            before = load_model(pruned_path)
            with clock("repair"):  # after the measurements: masks are fixed, so the speed stays what it is
                pruned, repaired = repair(
                    network, pruned, calibration,
                    seed=search.seed, time_limit_seconds=LONGEST_SECONDS,
                    checkpoint=out / "repair.safetensors", progress=watch.stage("repair"),
                )  # fmt: skip
            if finetune == FULL:
                learnt_from = shortened(network, training.samples) if training.samples else calibration
                with clock("finetune"):
                    pruned, trained = train_whole(
                        network, pruned, learnt_from,
                        form=form, seconds=training.seconds, seed=search.seed,
                        checkpoint=out / "finetune.safetensors", progress=watch.stage("finetune"),
                    )  # fmt: skip
            pruned = finished(pruned)
            deploy(dense, pruned, pruned_path, before)
            if form is not None:  # new grids may have other zero points, which take time
                with clock("validate"):
                    outcome = outcome.measured_again(measured())
        files = Files(dense_path, pruned_path, pruned_path, bool(pruned.widths))
        if pruned.int8:
            files = replace(files, floating=out / FOLDER / "pruned.onnx")
            files.floating.parent.mkdir(parents=True, exist_ok=True)
            deploy(dense, replace(pruned, int8=None), files.floating)
        if not fleet.is_formula(outcome.kept.validation):
            with clock("quantise"):
                files = with_quantised(files, samples, target.of_network, out, watch.stage("quantise"))
        with clock("alternatives"):
            compared = fleet.compare(files, workload, watch)
        reports = {}
        for device, table, alternatives in zip(devices, tables, compared, strict=True):
            metrics = None
            if evaluation:
                with clock("evaluate"):
                    engine = device.runtime
                    known = {dense_path: dense_score, pruned_path: score(pruned_path, engine if pruned.int8 else None)}
                    metrics = Metrics(evaluation.name, known[dense_path], known[pruned_path])
                    if files.is_int8 and files.is_narrow:
                        known[files.floating] = score(files.floating)
                    alternatives = judged(
                        alternatives, evaluation, known, engine,
                        where=location(engine), progress=watch.stage(device.stage("judge")),
                    )  # fmt: skip
            reports[device.name] = make_report(
                network, pruned, table, database, fleet.outcome_on(device, outcome),
                metrics=metrics, alternatives=alternatives, against=device.against, repaired=repaired,
                trained=trained, stages=clock.stages,
            )  # fmt: skip
            write_usage(device.folder(out), dense.proto.graph, device.runtime, workload, pruned_path)
        report = reports[outcome.kept.validation.slowest]
        if len(devices) > 1:
            for device in devices:
                reports[device.name].save(device.folder(out) / "report.json")
            report = report.among(reports)
        report = report.after(earlier)
        report.save(report_path)
        return report


def keep_dense(dense: Prepared, path: Path) -> None:
    """Write the prepared network, or check that the one that is there is the same.

    Raises:
        ArtifactError: the folder belongs to another network.
    """
    if path.exists():
        check_same(path, {"model_sha256": (Prepared(load_model(path)).sha256, dense.sha256)})
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(dense.proto, path)


class _Stages:
    """Wall seconds of the stages, in order; of one that comes twice, both together where it came last.

    A stage inside another counts for itself only.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inside = 0.0  # of the stages inside the one that is timed now

    @property
    def stages(self) -> list[dict[str, Any]]:
        return [{"name": name, "seconds": round(seconds, 3)} for name, seconds in self._seconds.items()]

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, outer, self._inside = time.monotonic(), self._inside, 0.0
        yield
        taken = time.monotonic() - start
        self._seconds[name] = self._seconds.pop(name, 0.0) + taken - self._inside
        self._inside = outer + taken
