"""The commands for single steps, for instance to measure on one machine and search on another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from onnx_spdy.models import Prepared, load_model, save_model
from onnx_spdy.models.int8.form import form_for
from onnx_spdy.pipeline.artifact import Document, check_same, fields_of, write_json
from onnx_spdy.pipeline.cluster import tasks_on
from onnx_spdy.pipeline.data import workload_of
from onnx_spdy.pipeline.database.compression import Compression
from onnx_spdy.pipeline.database.layer_database import build_database, open_database
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER
from onnx_spdy.pipeline.deploy import deploy as deploy_network
from onnx_spdy.pipeline.engine import open_runtime
from onnx_spdy.pipeline.fleet.matrix import FILE as FLEET
from onnx_spdy.pipeline.fleet.matrix import Matrix
from onnx_spdy.pipeline.front import FILE as FRONT
from onnx_spdy.pipeline.front import Front
from onnx_spdy.pipeline.int8.pruned import in_int8
from onnx_spdy.pipeline.int8.quantise import quantise as quantise_network
from onnx_spdy.pipeline.int8.quantise import ready_for, with_int8_opset
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import DEFAULT_PATTERN, Level, any_int8, levels_for, only_zeros
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH
from onnx_spdy.pipeline.search.profile_search import ProfileSearch
from onnx_spdy.pipeline.search.settings import SEARCH_SAMPLES, SearchSettings
from onnx_spdy.pipeline.shorten import shortened
from onnx_spdy.pipeline.stitch import CorrectedStitcher, Stitcher
from onnx_spdy.pipeline.training.finetune import EPOCHS, RATE
from onnx_spdy.pipeline.training.finetune import finetune as finetune_network
from onnx_spdy.pipeline.training.repair import FULL, NO_REPAIR, check_repair, repair
from onnx_spdy.pipeline.training.trainer import BATCH
from onnx_spdy.pipeline.training.whole import MINUTES, train_whole
from onnx_spdy.pipeline.validate import evaluate
from onnx_spdy.pipeline.validate import validate as validate_network
from onnx_spdy.tools import show
from onnx_spdy.tools.doctor import examine, warn_without_kernels
from onnx_spdy.tools.interrupt import Interrupt
from onnx_spdy.tools.options import (
    AllowBusy,
    Batch,
    ClusterAddress,
    Data,
    ExampleData,
    Finetune,
    FinetuneLimit,
    LossName,
    Memory,
    ModelArgument,
    Pattern,
    PrunerName,
    RuntimeName,
    SearchImages,
    SearchSamples,
    Seed,
    Threads,
    TimeLimit,
    TrainData,
    gib,
    minutes,
    not_empty,
    out_file,
    out_folder,
    path,
    speedups,
    training_seconds,
)
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.report.fleet import write_fleet_html
from onnx_spdy.tools.report.front import write_front_html
from onnx_spdy.tools.report.page import write_report_html
from onnx_spdy.tools.specs import (
    load_inputs,
    load_loss,
    load_metric,
    load_network,
    load_pruner,
    load_samples,
    load_workload,
)


def inspect(model: ModelArgument, data: ExampleData = None) -> None:
    """The layers that can be pruned, those that can't and why."""
    show.layers(load_inputs(model, data, mapped=True)[0] if data else load_network(model, mapped=True))


def measure(
    model: ModelArgument,
    runtime: RuntimeName,
    out: Annotated[Path, typer.Option("--out", metavar="latency.json", parser=out_file)],
    batch: Batch = 1,
    threads: Threads = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", parser=not_empty, help="samples to time with; default: random values"),
    ] = None,
    pattern: Pattern = DEFAULT_PATTERN,
    seed: Seed = 0,
    allow_busy: AllowBusy = False,
) -> None:
    """Measure the latency table, and say how far pruning can get in this runtime."""
    levels = levels_for(pattern)
    with open_runtime(runtime) as engine, ProgressBars() as bars:
        engine.check()
        warn_without_kernels(engine, levels)
        dense, samples = load_inputs(model, data) if data else (load_network(model), None)
        dense = ready_for(levels, dense, samples)
        workload = load_workload(samples, dense, batch, threads)
        table = measure_latency(
            dense, engine, levels, workload,
            seed=seed, save=out, allow_busy=allow_busy, progress=bars.stage("measure"),
        )  # fmt: skip
    show.table(table)


def database(
    model: ModelArgument,
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", parser=out_folder)],
    pattern: Pattern = DEFAULT_PATTERN,
    pruner: PrunerName = DEFAULT_PRUNER,
    memory: Memory = None,
    cluster: ClusterAddress = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="each layer for inputs that all pruned ones before it give; one level")
    ] = False,
) -> None:
    """Compress every layer to every level. Continues where it was stopped."""
    compression = Compression(levels_for(pattern), load_pruner(pruner), gib(memory), sequential=sequential)
    dense, samples = load_inputs(model, data, mapped=only_zeros(compression.levels))
    network = Network(ready_for(compression.levels, dense, samples))
    samples = shortened(network, samples)
    with tasks_on(cluster) as tasks, ProgressBars() as bars:
        build_database(network, samples, compression, out, bars.stage("database"), tasks)
    print(f"{len(network.layers)} layers x {len(compression.levels)} levels in {out}")


def search(
    model: ModelArgument,
    data: Data,
    latency: Annotated[Path, typer.Option("--latency", metavar="F", parser=path)],
    database: Annotated[Path, typer.Option("--database", metavar="DIR", parser=path)],
    speedup: Annotated[str, typer.Option("--speedup", metavar="X[,X...]")],
    out: Annotated[
        Path, typer.Option("--out", metavar="F", parser=out_file, help="profile; with several targets F-Xx.json each")
    ],
    name: Annotated[str, typer.Option("--search", metavar="NAME")] = DEFAULT_SEARCH,
    loss: LossName = None,
    search_samples: SearchSamples = SEARCH_SAMPLES,
    search_images: SearchImages = None,
    seed: Seed = 0,
    time_limit: TimeLimit = None,
    cluster: ClusterAddress = None,
) -> None:
    """Choose the level of each layer for one or more targets."""
    settings = SearchSettings(name, load_loss(loss), search_samples, search_images, minutes(time_limit), seed)
    targets = speedups(speedup)
    table, weights = LatencyTable.load(latency), open_database(database)
    dense, samples = load_inputs(model, data)
    network = Network(ready_for(table.levels, dense, samples))
    table.check_workload(network.model.graph, workload_of(samples, table.environment.batch))
    samples = shortened(network, samples)
    with tasks_on(cluster) as tasks, ProgressBars() as bars:
        finder = ProfileSearch(
            network, table, weights, samples, settings,
            state=out.with_name(f"{out.stem}.search.json"), progress=bars.stage("search"), listen=Interrupt(),
            tasks=tasks,
        )  # fmt: skip
        files = {out if len(targets) == 1 else out.with_name(f"{out.stem}-{x:g}x{out.suffix}"): x for x in targets}
        found = {file: finder.find_or_load(target, file) for file, target in reversed(files.items())}
    for file, profile in reversed(found.items()):
        held_out = "" if profile.held_out_loss is None else f", on held-out samples {profile.held_out_loss:.6f}"
        print(
            f"{file}: predicted {profile.predicted_speedup:.3f}x, {profile.loss_name} loss {profile.loss:.6f}{held_out}"
        )


def deploy(
    model: ModelArgument,
    database: Annotated[Path, typer.Option("--database", metavar="DIR", parser=path)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx", parser=out_file)],
    profile: Annotated[Path | None, typer.Option("--profile", metavar="F", parser=path)] = None,
    level: Annotated[
        str | None, typer.Option("--level", metavar="L", help="the same for all layers, such as 2:4: no profile then")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="DATA", parser=not_empty, help="for the correction of statistics and the repair"
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", metavar="R", help="the one that int8 is written for, where the profile has int8"),
    ] = None,
    finetune: Finetune = NO_REPAIR,
    train: TrainData = None,
    finetune_limit: FinetuneLimit = MINUTES,
    seed: Seed = 0,
) -> None:
    """Write the pruned network of a profile, or with all layers at one level."""
    if (profile is None) == (level is None):
        raise typer.BadParameter("give --profile, of a search, or --level, which all layers get")
    check_repair(finetune)
    seconds = training_seconds(finetune, train, finetune_limit)
    if finetune != NO_REPAIR and not data:
        raise typer.BadParameter(f"--finetune {finetune} needs --data")
    chosen = Profile.load(profile) if profile else None
    weights = open_database(database)
    levels = chosen.levels if chosen else weights.all_at(Level.parse(level or ""))
    is_int8 = any_int8(levels.values())
    if is_int8 and not (data and runtime):
        raise typer.BadParameter("a network in int8 needs --data and --runtime")
    form = form_for(open_runtime(runtime).name) if is_int8 and runtime else None
    mapped = only_zeros(levels.values()) and finetune == NO_REPAIR
    dense, samples = load_inputs(model, data, mapped=mapped) if data else (load_network(model, mapped=mapped), None)
    network = Network(ready_for(levels.values(), dense, samples))
    samples = shortened(network, samples) if samples else None
    stitcher = CorrectedStitcher(Stitcher(network, weights), samples)
    pruned = stitcher.stitch(chosen) if chosen else stitcher.stitch_levels(levels)
    print(f"statistics correction: {pruned.corrected}")
    if samples and finetune != NO_REPAIR:
        with ProgressBars() as bars:
            pruned, repaired = repair(network, pruned, samples, seed=seed, progress=bars.stage("repair"))
        if repaired:
            show.training("repair", repaired)
    if samples and finetune == FULL:
        learnt_from = shortened(network, load_samples(train, dense)) if train else samples
        with ProgressBars() as bars:
            pruned, trained = train_whole(
                network, pruned, learnt_from, form=form, seconds=seconds, seed=seed, progress=bars.stage("finetune")
            )
        show.training("finetune", trained)
    if form and samples:
        with ProgressBars() as bars:
            pruned = in_int8(pruned, samples, form, seed=seed, progress=bars.stage("int8"))
    if pruned.int8:
        show.int8(pruned.int8)
    deploy_network(network.prepared, pruned, out)
    print(f"{out} written")


def finetune(
    model: ModelArgument,
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx", parser=out_file)],
    pruned: Annotated[
        Path | None, typer.Argument(metavar="PRUNED", parser=path, help="starts from it; its zeros stay")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="F", parser=path, help="prune gradually to it, from PRUNED or from MODEL"),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="passes over the data")] = EPOCHS,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Adam's step, relative to the size of each tensor's values")
    ] = RATE,
    batch: Annotated[int, typer.Option("--batch", min=1, help="samples in a step")] = BATCH,
    seed: Seed = 0,
    time_limit: Annotated[float | None, typer.Option("--time-limit", metavar="MINUTES", help="of training")] = None,
) -> None:
    """Train a pruned network with the dense one as its teacher. Continues where it was stopped."""
    if pruned is None and profile is None:
        raise typer.BadParameter("give PRUNED, the network to train, or --profile, what to prune MODEL to gradually")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise typer.BadParameter(f"--learning-rate {learning_rate} is not a positive number")
    seconds = minutes(time_limit)
    dense, samples = load_inputs(model, data)
    samples = shortened(Network(dense), samples)
    start = load_model(pruned) if pruned else dense.proto
    goal = Profile.load(profile) if profile else None
    if goal and profile:
        check_same(profile, {"model_sha256": (goal.made_from["model_sha256"], dense.sha256)})
    checkpoint = out.with_name(f"{out.name}.checkpoint.safetensors")
    with ProgressBars() as bars:
        found = finetune_network(
            dense, start, samples, levels=goal.levels if goal else None,
            epochs=epochs, rate=learning_rate, batch=batch, seed=seed, checkpoint=checkpoint,
            time_limit_seconds=seconds, progress=bars.stage("finetune"),
        )  # fmt: skip
    save_model(found.model, out)
    show.training(f"learnt from {found.learnt_from}", found.training)
    print(f"{out} written")
    if not found.training.interrupted:
        checkpoint.unlink(missing_ok=True)
    elif checkpoint.exists():
        print(f"it is the best so far; the same command goes on from {checkpoint}")


def quantise(
    model: ModelArgument,
    data: Data,
    runtime: RuntimeName,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx", parser=out_file)],
    loss: LossName = None,
    seed: Seed = 0,
) -> None:
    """Write a network in int8, in the form that a runtime computes in: one that was trained after pruning, say."""
    with open_runtime(runtime) as engine, ProgressBars() as bars:
        form = form_for(engine.name)
        dense, samples = load_inputs(model, data)
        network = Network(with_int8_opset(dense, samples))
        samples = shortened(network, samples)
        found = quantise_network(
            network, samples, form, loss=load_loss(loss), seed=seed, progress=bars.stage("int8")
        )  # fmt: skip
    save_model(found.proto, out)
    show.int8(found)
    print(f"{out} written")


def validate(
    dense: Annotated[Path, typer.Argument(metavar="DENSE", parser=path)],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED", parser=path)],
    runtime: RuntimeName,
    batch: Batch = 1,
    threads: Threads = None,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", parser=not_empty)] = None,
    metric: Annotated[str, typer.Option("--metric", metavar="M")] = "top1",
    json: Annotated[Path | None, typer.Option("--json", metavar="F", parser=out_file)] = None,
) -> None:
    """Measure both networks in turns in the runtime, and the metric of both."""
    measure_metric = load_metric(metric)
    with open_runtime(runtime) as engine, ProgressBars() as bars:
        engine.check()
        reference = Prepared(load_model(dense))
        load_model(pruned)
        samples = load_samples(data, reference) if data else None
        values = None
        if samples:  # before the measurement: a metric may not fit the data
            values = [evaluate(file, samples, measure_metric) for file in (dense, pruned)]
        workload = load_workload(samples, reference, batch, threads)
        found = validate_network(dense, pruned, engine, workload, progress=bars.stage("validate"))
    metrics = {} if values is None else {"metric_name": metric, "metric_dense": values[0], "metric_pruned": values[1]}
    if json:
        write_json(json, "validation", 1, {**found.to_json(), **metrics})
    show.validation({**found.to_json(), **metrics})


Showing = Callable[[Mapping[str, Any], Path], None]  # of what a file holds and the folder where that is
# What a run may have left: the document, what makes its page, and what prints it.
RESULTS: dict[str, tuple[type[Document], Showing, Showing]] = {
    FLEET: (Matrix, write_fleet_html, show.fleet),
    FRONT: (Front, write_front_html, show.front),
    "report.json": (
        Report, lambda content, folder: write_report_html(content, folder / "report.html"), show.report
    ),
}  # fmt: skip


def report(folder: Annotated[Path, typer.Argument(metavar="DIR", parser=path)]) -> None:
    """Show the report of a run, or what one with several targets or devices found, and write its page again."""
    known = [path for name in RESULTS if (path := folder / name).exists()]
    file = max(known, key=lambda path: path.stat().st_mtime_ns, default=folder / "report.json")
    kind, write_page, show_it = RESULTS[file.name]
    found = kind.load(file)
    with fields_of(file):
        write_page(found.content, folder)
        show_it(found.content, folder)


def prepare(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx", parser=out_file)],
    data: ExampleData = None,
) -> None:
    """Write the prepared dense network: constants folded, cleaned up, checked against the original."""
    prepared = load_inputs(model, data, mapped=True)[0] if data else load_network(model, mapped=True)
    save_model(prepared.proto, out)
    print(f"{out} written with {len(prepared.layers)} layers that carry weights")


def doctor() -> None:
    """Which runtimes work here, and what to do where one does not."""
    show.doctor(examine())
