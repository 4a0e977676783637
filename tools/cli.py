"""The command line. Exit codes: 0 done; 1 an expected failure, one line on stderr; 2 wrong usage."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onnx_spdy.models import find_layers, load_model, model_sha256, save_model
from onnx_spdy.pipeline.artifact import check_same, write_json
from onnx_spdy.pipeline.database.layer_database import build_database, open_database
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER
from onnx_spdy.pipeline.deploy import deploy as deploy_network
from onnx_spdy.pipeline.engine import open_runtime
from onnx_spdy.pipeline.front import FILE as FRONT
from onnx_spdy.pipeline.front import Front, reach_all
from onnx_spdy.pipeline.latency.measure import measure_latency
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import DENSE, Level, levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.run import repair_stitched
from onnx_spdy.pipeline.run import run as run_pipeline
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, search_named
from onnx_spdy.pipeline.search.profile_search import SEARCH_SAMPLES, ProfileSearch
from onnx_spdy.pipeline.stitch import CorrectedStitcher
from onnx_spdy.pipeline.target import TargetMissed
from onnx_spdy.pipeline.training.finetune import EPOCHS, RATE
from onnx_spdy.pipeline.training.finetune import finetune as finetune_network
from onnx_spdy.pipeline.training.repair import NO_REPAIR, check_repair
from onnx_spdy.pipeline.training.trainer import BATCH
from onnx_spdy.pipeline.validate import evaluate
from onnx_spdy.pipeline.validate import validate as validate_network
from onnx_spdy.runtimes import ANY_ZEROS, Runtime
from onnx_spdy.tools import show
from onnx_spdy.tools.doctor import examine, with_kernels_for
from onnx_spdy.tools.expected import one_line_errors
from onnx_spdy.tools.interrupt import Interrupt
from onnx_spdy.tools.options import (
    AllowBusy,
    Batch,
    Data,
    Finetune,
    LossName,
    Memory,
    ModelArgument,
    Pattern,
    PrunerName,
    RuntimeName,
    SearchImages,
    SearchName,
    SearchSamples,
    Seed,
    Threads,
    TimeLimit,
)
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.report.front import write_front_html
from onnx_spdy.tools.report.page import write_report_html
from onnx_spdy.tools.specs import load_loss, load_metric, load_network, load_pruner, load_samples

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune a trained network to a speedup that is measured in the runtime that will run it.",
)


@app.command()
def run(
    model: ModelArgument,
    data: Data,
    runtime: RuntimeName,
    speedup: Annotated[
        str, typer.Option("--speedup", metavar="X[,X...]", help="dense seconds / pruned seconds; several make a front")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="with several targets DIR/Xx for each")],
    batch: Batch = 1,
    threads: Threads = None,
    evaluation: Annotated[str | None, typer.Option("--eval", metavar="DATA", help="samples for the metric")] = None,
    metric: Annotated[str, typer.Option("--metric", metavar="M", help="top1 or FILE.py:FUNCTION")] = "top1",
    loss: LossName = None,
    pattern: Pattern = "unstructured",
    pruner: PrunerName = DEFAULT_PRUNER,
    memory: Memory = None,
    search: SearchName = DEFAULT_SEARCH,
    search_samples: SearchSamples = SEARCH_SAMPLES,
    finetune: Finetune = NO_REPAIR,
    search_images: SearchImages = None,
    seed: Seed = 0,
    time_limit: TimeLimit = None,
    allow_busy: AllowBusy = False,
) -> None:
    """Everything: measure, compress, search, write back, and measure the result. Continues where it was stopped."""
    levels_for(pattern)
    search_named(search)
    pruner_name, prune = load_pruner(pruner)
    check_repair(finetune)
    targets, measure_metric, score = _speedups(speedup), load_metric(metric), load_loss(loss)
    interrupt = Interrupt()
    with open_runtime(runtime) as engine, ProgressBars() as watch:
        engine.check()
        _warn_without_kernels(engine, levels_for(pattern))
        dense = load_network(model)
        samples = load_samples(data, dense)
        dev = load_samples(evaluation, dense) if evaluation else None

        def reach(target: float, folder: Path) -> Report:
            found = run_pipeline(
                dense, samples, engine, target, folder,
                batch=batch, threads=threads, evaluation=dev, metric=measure_metric,
                metric_name=metric if evaluation else None, loss=score,
                pattern=pattern, pruner=pruner_name, prune=prune, memory_bytes=_gib(memory),
                search=search, search_samples=search_samples, finetune=finetune, seed=seed, image_limit=search_images,
                time_limit_seconds=None if time_limit is None else 60 * time_limit, allow_busy=allow_busy,
                shared=out, watch=watch, listen=interrupt,
            )  # fmt: skip
            write_report_html(found.content, folder / "report.html")
            return found

        if len(targets) == 1:
            front, reports = None, [reach(targets[0], out)]
        else:
            front, reports = reach_all(targets, out, reach)
    if front is None:
        show.report(reports[0].content, out)
    else:
        write_front_html(front.content, out)
        show.front(front.content, out)
    if missed := (front or reports[0]).missed:
        raise TargetMissed(missed)


@app.command()
def inspect(model: ModelArgument) -> None:
    """The layers that can be pruned, those that can't and why."""
    show.layers(load_network(model))


@app.command()
def measure(
    model: ModelArgument,
    runtime: RuntimeName,
    out: Annotated[Path, typer.Option("--out", metavar="latency.json")],
    batch: Batch = 1,
    threads: Threads = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="samples to time with; default: random values")
    ] = None,
    pattern: Pattern = "unstructured",
    seed: Seed = 0,
    allow_busy: AllowBusy = False,
) -> None:
    """Measure the latency table, and say how far pruning can get in this runtime."""
    levels = levels_for(pattern)
    with open_runtime(runtime) as engine, ProgressBars() as watch:
        engine.check()
        _warn_without_kernels(engine, levels)
        dense = load_network(model)
        inputs = load_samples(data, dense).take(slice(0, batch)).inputs if data else None
        table = measure_latency(
            dense, engine, levels, batch=batch, threads=threads, inputs=inputs, seed=seed,
            save=out, allow_busy=allow_busy,
            progress=lambda done, total, note: watch("measure", done, total, note),
        )  # fmt: skip
    show.table(table)


@app.command()
def database(
    model: ModelArgument,
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR")],
    pattern: Pattern = "unstructured",
    pruner: PrunerName = DEFAULT_PRUNER,
    memory: Memory = None,
) -> None:
    """Compress every layer to every level. Continues where it was stopped."""
    levels, (pruner_name, prune) = levels_for(pattern), load_pruner(pruner)
    network = Network(load_network(model))
    samples = load_samples(data, network.model)
    with ProgressBars() as watch:
        build_database(
            network, samples, levels, prune, pruner_name, out,
            lambda what, done, total: watch("database", done, total, what), _gib(memory),
        )  # fmt: skip
    print(f"{len(network.layers)} layers x {len(levels)} levels in {out}")


@app.command()
def search(
    model: ModelArgument,
    data: Data,
    latency: Annotated[Path, typer.Option("--latency", metavar="F")],
    database: Annotated[Path, typer.Option("--database", metavar="DIR")],
    speedup: Annotated[str, typer.Option("--speedup", metavar="X[,X...]")],
    out: Annotated[Path, typer.Option("--out", metavar="F", help="profile; with several targets F-Xx.json each")],
    name: Annotated[str, typer.Option("--search", metavar="NAME")] = DEFAULT_SEARCH,
    loss: LossName = None,
    search_samples: SearchSamples = SEARCH_SAMPLES,
    search_images: SearchImages = None,
    seed: Seed = 0,
    time_limit: TimeLimit = None,
) -> None:
    """Choose the level of each layer for one or more targets."""
    search_named(name)
    targets = _speedups(speedup)
    table, weights, score = LatencyTable.load(latency), open_database(database), load_loss(loss)
    network = Network(load_network(model))
    samples = load_samples(data, network.model)
    with ProgressBars() as watch:
        finder = ProfileSearch(
            network, table, weights, samples, loss=score, search=name, search_samples=search_samples, seed=seed,
            time_limit_seconds=None if time_limit is None else 60 * time_limit, image_limit=search_images,
            progress=lambda best, done, left: watch("search", done, done + left, f"loss {best:.5f}"),
            state=out.with_name(f"{out.stem}.search.json"), listen=Interrupt(),
        )  # fmt: skip
        paths = {out if len(targets) == 1 else out.with_name(f"{out.stem}-{x:g}x{out.suffix}"): x for x in targets}
        found = {path: finder.find_or_load(target, path) for path, target in reversed(paths.items())}
    for path, profile in reversed(found.items()):
        held_out = "" if profile.held_out_loss is None else f", on held-out samples {profile.held_out_loss:.6f}"
        print(
            f"{path}: predicted {profile.predicted_speedup:.3f}x, {profile.loss_name} loss {profile.loss:.6f}{held_out}"
        )


@app.command()
def deploy(
    model: ModelArgument,
    database: Annotated[Path, typer.Option("--database", metavar="DIR")],
    profile: Annotated[Path, typer.Option("--profile", metavar="F")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="for the correction of statistics and the repair")
    ] = None,
    finetune: Finetune = NO_REPAIR,
    seed: Seed = 0,
) -> None:
    """Write the pruned network of a profile."""
    check_repair(finetune)
    if finetune != NO_REPAIR and not data:
        raise typer.BadParameter(f"--finetune {finetune} needs --data")
    network = Network(load_network(model))
    chosen, samples = Profile.load(profile), load_samples(data, network.model) if data else None
    stitching = CorrectedStitcher(network, open_database(database), samples)
    stitching.stitch(chosen)
    print(f"statistics correction: {stitching.corrected}")
    if samples and finetune != NO_REPAIR:
        with ProgressBars() as watch:
            repaired = repair_stitched(network, chosen, samples, seed=seed, checkpoint=None, watch=watch)
        if repaired:
            show.training("repair", repaired)
    deploy_network(network.model, network.changed(), chosen.levels, out)
    print(f"{out} written")


@app.command()
def finetune(
    model: ModelArgument,
    data: Data,
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx")],
    pruned: Annotated[Path | None, typer.Argument(metavar="PRUNED", help="starts from it; its zeros stay")] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", metavar="F", help="prune gradually to it, from PRUNED or from MODEL")
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
    dense = load_network(model)
    start, samples = load_model(pruned) if pruned else dense, load_samples(data, dense)
    goal = Profile.load(profile) if profile else None
    if goal and profile:
        check_same(profile, {"model_sha256": (goal.made_from["model_sha256"], model_sha256(dense))})
    checkpoint = out.with_name(f"{out.name}.checkpoint.safetensors")
    with ProgressBars() as watch:
        found = finetune_network(
            dense, start, samples, levels=goal.levels if goal else None,
            epochs=epochs, rate=learning_rate, batch=batch, seed=seed, checkpoint=checkpoint,
            time_limit_seconds=None if time_limit is None else 60 * time_limit,
            progress=lambda done, total, note: watch("finetune", done, total, note),
        )  # fmt: skip
    save_model(found.model, out)
    show.training(f"learnt from {found.learnt_from}", found.training)
    print(f"{out} written")
    if not found.training.interrupted:
        checkpoint.unlink(missing_ok=True)
    elif checkpoint.exists():
        print(f"it is the best so far; the same command goes on from {checkpoint}")


@app.command()
def validate(
    dense: Annotated[Path, typer.Argument(metavar="DENSE")],
    pruned: Annotated[Path, typer.Argument(metavar="PRUNED")],
    runtime: RuntimeName,
    batch: Batch = 1,
    threads: Threads = None,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA")] = None,
    metric: Annotated[str, typer.Option("--metric", metavar="M")] = "top1",
    json: Annotated[Path | None, typer.Option("--json", metavar="F")] = None,
) -> None:
    """Measure both networks in turns in the runtime, and the metric of both."""
    measure_metric = load_metric(metric)
    with open_runtime(runtime) as engine, ProgressBars() as watch:
        engine.check()
        reference = load_model(dense)
        load_model(pruned)
        samples = load_samples(data, reference) if data else None
        inputs = samples.take(slice(0, batch)).inputs if samples and len(samples) >= batch else None
        values = None
        if samples:  # before the measurement: a metric may not fit the data
            values = [evaluate(path, samples, measure_metric) for path in (dense, pruned)]
        found = validate_network(
            dense, pruned, engine, batch=batch, threads=threads, inputs=inputs,
            progress=lambda done, total: watch("validate", done, total, ""),
        )  # fmt: skip
    metrics = {} if values is None else {"metric_name": metric, "metric_dense": values[0], "metric_pruned": values[1]}
    if json:
        write_json(json, "validation", 1, {**found.to_json(), **metrics})
    show.validation({**found.to_json(), **metrics})


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Show the report of a run, or the front of one with several targets, and write its page again."""
    if (folder / FRONT).exists() and not (folder / "report.json").exists():
        front = Front.load(folder / FRONT)
        write_front_html(front.content, folder)
        show.front(front.content, folder)
        return
    found = Report.load(folder / "report.json")
    write_report_html(found.content, folder / "report.html")
    show.report(found.content, folder)


@app.command("prepare")
def prepare_command(model: ModelArgument, out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx")]) -> None:
    """Write the prepared dense network: constants folded, cleaned up, checked against the original."""
    save_model(load_network(model), out)
    print(f"{out} written with {len(find_layers(load_model(out)))} layers that carry weights")


@app.command()
def doctor() -> None:
    """Which runtimes work here, and what to do where one does not."""
    show.doctor(examine())


def _gib(value: float | None) -> int | None:
    return None if value is None else int(value * 2**30)


def _speedups(text: str) -> list[float]:
    """The targets that X[,X...] names, ascending."""
    targets = set()
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number >= 1):
            raise typer.BadParameter(f"{part!r} is not a number of at least 1", param_hint="'--speedup'")
        targets.add(number)
    return sorted(targets)


def _warn_without_kernels(engine: Runtime, levels: Sequence[Level]) -> None:
    """Say which of these patterns the runtime has no kernels for."""
    for pattern in sorted({level.pattern for level in levels} - {DENSE.pattern} - engine.patterns):
        if ANY_ZEROS in engine.patterns:
            message = "takes its zeros as it takes any others: what they gain depends on how many there are"
        else:
            message = "zeros don't make it faster, expect no speedup"
        others = with_kernels_for(pattern)
        message += f"; {', '.join(others)} {'has' if len(others) == 1 else 'have'} them" if others else ""
        Console(stderr=True).print(f"warning: {engine.name} has no kernels for {pattern}: {message}", style="yellow")


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: expected failures become one line and exit code 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with one_line_errors():
        app(arguments)


if __name__ == "__main__":
    main()
