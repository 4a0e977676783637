"""The command for everything: one target, or several that make a front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from onnx_spdy.models.int8.form import form_for
from onnx_spdy.pipeline.aim import AUTO, BEST, SAME, against_best, fastest_runtime, measure_dense
from onnx_spdy.pipeline.artifact import locked
from onnx_spdy.pipeline.cluster import tasks_on
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER
from onnx_spdy.pipeline.engine import open_runtime
from onnx_spdy.pipeline.fleet.device import Device, FleetError, device_names
from onnx_spdy.pipeline.fleet.fleet import forms_of, measure_tables
from onnx_spdy.pipeline.fleet.matrix import FILE as FLEET
from onnx_spdy.pipeline.fleet.matrix import Matrix, make_matrix
from onnx_spdy.pipeline.front import Front, meet_all, target_folder
from onnx_spdy.pipeline.int8.quantise import ready_for
from onnx_spdy.pipeline.latency.table import NoSpeedup
from onnx_spdy.pipeline.level import DEFAULT_PATTERN, Level, any_int8, levels_for
from onnx_spdy.pipeline.metric import Evaluation
from onnx_spdy.pipeline.progress import Watch
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.run import Target, keep_dense
from onnx_spdy.pipeline.run import run as run_pipeline
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH
from onnx_spdy.pipeline.search.settings import SEARCH_SAMPLES, SearchSettings
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.pipeline.target import TargetMissed
from onnx_spdy.pipeline.training.repair import NO_REPAIR, check_repair
from onnx_spdy.pipeline.training.whole import MINUTES, WholeTraining
from onnx_spdy.runtimes import Runtime, location, runtime_spec
from onnx_spdy.tools import show
from onnx_spdy.tools.doctor import warn_without_kernels
from onnx_spdy.tools.interrupt import Interrupt
from onnx_spdy.tools.options import (
    Against,
    AllowBusy,
    Batch,
    ClusterAddress,
    Data,
    Finetune,
    FinetuneLimit,
    LossName,
    Memory,
    MetricName,
    ModelArgument,
    OneNetwork,
    Pattern,
    PrunerName,
    RuntimesOrAuto,
    SearchImages,
    SearchName,
    SearchSamples,
    Seed,
    Threads,
    TimeLimit,
    TrainData,
    gib,
    minutes,
    not_empty,
    out_folder,
    speedups,
    training_seconds,
)
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.report.fleet import write_fleet_html
from onnx_spdy.tools.report.front import write_front_html
from onnx_spdy.tools.report.page import write_report_html
from onnx_spdy.tools.specs import load_inputs, load_loss, load_metric, load_pruner, load_samples, load_workload


def run(
    model: ModelArgument,
    data: Data,
    runtime: RuntimesOrAuto,
    speedup: Annotated[
        str,
        typer.Option(
            "--speedup", metavar="X[,X...]", help="dense seconds / pruned seconds; several make a front; see --against"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            parser=out_folder,
            help="with several targets DIR/Xx for each, with several runtimes DIR/R",
        ),
    ],
    against: Against = SAME,
    batch: Batch = 1,
    threads: Threads = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", parser=not_empty, help="samples for the metric")
    ] = None,
    metric: MetricName = "top1",
    loss: LossName = None,
    pattern: Pattern = DEFAULT_PATTERN,
    pruner: PrunerName = DEFAULT_PRUNER,
    memory: Memory = None,
    search: SearchName = DEFAULT_SEARCH,
    search_samples: SearchSamples = SEARCH_SAMPLES,
    finetune: Finetune = NO_REPAIR,
    train: TrainData = None,
    finetune_limit: FinetuneLimit = MINUTES,
    search_images: SearchImages = None,
    seed: Seed = 0,
    time_limit: TimeLimit = None,
    allow_busy: AllowBusy = False,
    cluster: ClusterAddress = None,
    one_network: OneNetwork = False,
) -> None:
    """Everything: measure, compress, search, write back, and measure the result. Continues where it was stopped."""
    compression = Compression(levels_for(pattern), load_pruner(pruner), gib(memory))
    settings = SearchSettings(search, load_loss(loss), search_samples, search_images, minutes(time_limit), seed)
    check_repair(finetune)
    seconds = training_seconds(finetune, train, finetune_limit)
    targets, measure_metric, interrupt = speedups(speedup), load_metric(metric), Interrupt()
    names = device_names(runtime) if len(runtime) > 1 else [""]
    if one_network and len(runtime) == 1:
        raise FleetError("--one-network is for several devices; give --runtime once for each")
    with ExitStack() as stack, ProgressBars() as bars:
        watch, tasks = Watch(bars.stage, interrupt), stack.enter_context(tasks_on(cluster))
        engines = [None if _is_auto(one) else _opened(stack, one, compression.levels) for one in runtime]
        dense, samples = load_inputs(model, data)
        dense = ready_for(compression.levels, dense, samples)
        judged = Evaluation(load_samples(evaluation, dense), measure_metric, metric) if evaluation else None
        training = WholeTraining(load_samples(train, dense) if train else None, seconds)
        workload = load_workload(samples, dense, batch, threads)
        stack.enter_context(locked(out))

        def aimed(spec: str, engine: Runtime | None, name: str) -> Device:
            """The device, with its engine chosen and its opponent measured where that was asked for."""
            if engine is not None and against != BEST:
                return Device(engine, name)
            keep_dense(dense, out / "dense.onnx")
            where = spec.removesuffix(AUTO) if engine is None else location(engine)
            rivals = measure_dense(
                dense, samples, engine, workload, out / "dense.onnx", out / name,
                where=where, evaluation=judged, watch=watch,
            )  # fmt: skip
            show.alternatives(rivals, metric)
            if engine is None:
                engine = _opened(stack, where + fastest_runtime(rivals, compression.levels), compression.levels)
                print(f"--runtime {spec}: {runtime_spec(engine)}, the fastest that gains by {pattern}")
            return Device(engine, name, against_best(rivals, engine) if against == BEST else None)

        def meet(devices: Sequence[Device], target: Target) -> Report:
            found = run_pipeline(
                dense, samples, devices, workload, target,
                compression=compression, search=settings, finetune=finetune, training=training, evaluation=judged,
                allow_busy=allow_busy, watch=watch, tasks=tasks,
            )  # fmt: skip
            write_report_html(found.content, target.out / "report.html")
            return found

        devices = [aimed(*one) for one in zip(runtime, engines, names, strict=True)]
        found: Front | Report | Matrix
        if len(devices) == 1:
            found = _met(targets, out, partial(_on_device, meet, devices[0], out, out))
        else:
            if not one_network:  # all tables first: those of different machines at the same time
                keep_dense(dense, out / "dense.onnx")
                with suppress(NoSpeedup):  # its own run says so again
                    measure_tables(
                        dense, devices, compression.levels, workload, out / "dense.onnx", out,
                        seed=seed, allow_busy=allow_busy, watch=watch,
                    )  # fmt: skip
            found = (_one_network if one_network else _network_each)(meet, devices, targets, out, compression)
            found.save(out / FLEET)
            write_fleet_html(found.content, out)
    if isinstance(found, Matrix):
        show.fleet(found.content, out)
    elif isinstance(found, Front):
        show.front(found.content, out)
    else:
        show.report(found.content, out)
    if found.missed:
        raise TargetMissed(found.missed)


Meet = Callable[[Sequence[Device], Target], Report]


def _met(targets: list[float], out: Path, meet: Callable[[float, Path], Report]) -> Front | Report:
    """The report of one target, or the front of several."""
    if len(targets) == 1:
        return meet(targets[0], out)
    front, _ = meet_all(targets, out, meet)
    write_front_html(front.content, out)
    return front


def _on_device(meet: Meet, device: Device, shared: Path, network: Path, speedup: float, folder: Path) -> Report:
    """A network for one device alone."""
    opponent = device.at(speedup).against
    if opponent:
        print(opponent)
    asked = opponent.of_same if opponent else speedup
    return meet([Device(device.runtime, against=opponent)], Target(asked, folder, shared, network))


def _network_each(
    meet: Meet, devices: Sequence[Device], targets: list[float], out: Path, compression: Compression
) -> Matrix:
    """A network for each device and target; they share the database, unless int8 has several forms."""
    is_shared = not any_int8(compression.levels) or len(forms_of(devices)) == 1
    found: dict[str, list[tuple[str, Report]]] = {}
    unreachable: dict[str, str] = {}
    for device in devices:
        shared = device.folder(out)
        network = out if is_shared else shared
        for speedup in sorted(set(targets), reverse=True):
            folder = _folder(Path(device.name), speedup, targets)
            try:
                report = _on_device(meet, device, shared, network, speedup, out / folder)
            except (NoSpeedup, InfeasibleTarget) as exc:  # lower targets, and other devices, may well do it
                unreachable.setdefault(device.name, str(exc))
            else:
                found.setdefault(device.name, []).insert(0, (str(folder), report))
    return make_matrix(found, unreachable, one_network=False)


def _one_network(
    meet: Meet, devices: Sequence[Device], targets: list[float], out: Path, compression: Compression
) -> Matrix:
    """One network for all devices at each target."""

    def on_all(speedup: float, folder: Path) -> Report:
        asked = [one.at(speedup) for one in devices]
        for one in asked:
            if one.against:
                print(f"{one.name}: {one.against}")
        return meet(asked, Target(speedup, folder, out))

    _met(targets, out, on_all)
    found: dict[str, list[tuple[str, Report]]] = {}
    for device in devices:
        for speedup in sorted(set(targets)):
            folder = device.folder(_folder(Path(), speedup, targets))
            report = Report.load(out / folder / "report.json")
            write_report_html(report.content, out / folder / "report.html")
            found.setdefault(device.name, []).append((str(folder), report))
    return make_matrix(found, {}, one_network=True)


def _folder(of: Path, speedup: float, targets: list[float]) -> Path:
    """Where the results of one of the targets are."""
    return target_folder(of, speedup) if len(targets) > 1 else of


def _is_auto(runtime: str) -> bool:
    return runtime.rpartition("/")[2] == AUTO


def _opened(stack: ExitStack, runtime: str, levels: Sequence[Level]) -> Runtime:
    """A runtime that works, until the stack ends."""
    engine = stack.enter_context(open_runtime(runtime))
    if any_int8(levels):
        form_for(engine.name)  # before the long work
    engine.check()
    warn_without_kernels(engine, levels)
    return engine
