"""The command line. Exit codes: 0 done; 1 an expected failure, one line on stderr; 2 wrong usage."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onnx_spdy.models import find_layers, load_model, save_model
from onnx_spdy.pipeline.aim import TargetMissed
from onnx_spdy.pipeline.artifact import write_json
from onnx_spdy.pipeline.database import build_database, open_database
from onnx_spdy.pipeline.deploy import deploy as deploy_network
from onnx_spdy.pipeline.engine import open_runtime
from onnx_spdy.pipeline.latency import LatencyTable
from onnx_spdy.pipeline.level import DENSE, Level, levels_for
from onnx_spdy.pipeline.measure import measure_latency
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.pruners import DEFAULT_PRUNER, pruner_named
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.run import Stitching
from onnx_spdy.pipeline.run import run as run_pipeline
from onnx_spdy.pipeline.search import SEARCH_SAMPLES, ProfileSearch
from onnx_spdy.pipeline.searches import DEFAULT_SEARCH, search_named
from onnx_spdy.pipeline.validate import evaluate
from onnx_spdy.pipeline.validate import validate as validate_network
from onnx_spdy.runtimes import ANY_ZEROS, Runtime
from onnx_spdy.tools import show
from onnx_spdy.tools.doctor import examine, with_kernels_for
from onnx_spdy.tools.expected import one_line_errors
from onnx_spdy.tools.html_report import write_report_html
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.specs import load_loss, load_metric, load_network, load_samples

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune a trained network to a speedup that is measured in the runtime that will run it.",
)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="FILE.onnx, or FILE.py:FUNCTION -> (module, example_inputs)")
]
Data = Annotated[str, typer.Option("--data", metavar="DATA", help="calibration samples: FILE.npz or FILE.py:FUNCTION")]
RuntimeName = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="R",
        help="deepsparse, onnxruntime, openvino[:bf16], cusparselt[:bf16], tensorrt[:bf16], fake; "
        "ssh://HOST/R for one elsewhere",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="samples a run")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="default: all physical cores")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Pattern = Annotated[str, typer.Option("--pattern", help="unstructured, block4 or N:M")]
PrunerName = Annotated[str, typer.Option("--pruner", metavar="NAME")]
SearchName = Annotated[str, typer.Option("--search", metavar="NAME")]
LossName = Annotated[
    str | None, typer.Option("--loss", metavar="L", help="kl, cross-entropy, squared-error or FILE.py:FUNCTION")
]
SearchSamples = Annotated[int, typer.Option("--search-samples", min=1, help="samples that a profile is scored on")]
AllowBusy = Annotated[
    bool, typer.Option("--allow-busy", help="measure even while other programs use the CPU; the table tells")
]
TimeLimit = Annotated[float | None, typer.Option("--time-limit", metavar="MINUTES", help="for the search")]


@app.command()
def run(
    model: ModelArgument,
    data: Data,
    runtime: RuntimeName,
    speedup: Annotated[float, typer.Option("--speedup", metavar="X", help="dense seconds / pruned seconds")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR")],
    batch: Batch = 1,
    threads: Threads = None,
    evaluation: Annotated[str | None, typer.Option("--eval", metavar="DATA", help="samples for the metric")] = None,
    metric: Annotated[str, typer.Option("--metric", metavar="M", help="top1 or FILE.py:FUNCTION")] = "top1",
    loss: LossName = None,
    pattern: Pattern = "unstructured",
    pruner: PrunerName = DEFAULT_PRUNER,
    search: SearchName = DEFAULT_SEARCH,
    search_samples: SearchSamples = SEARCH_SAMPLES,
    seed: Seed = 0,
    time_limit: TimeLimit = None,
    allow_busy: AllowBusy = False,
) -> None:
    """Everything: measure, compress, search, write back, and measure the result. Continues where it was stopped."""
    _check_choices(pattern, pruner, search)
    target, measure_metric, score = _speedup(speedup), load_metric(metric), load_loss(loss)
    with open_runtime(runtime) as engine, ProgressBars() as watch:
        engine.check()
        _warn_without_kernels(engine, levels_for(pattern))
        dense = load_network(model)
        samples = load_samples(data, dense)
        report = run_pipeline(
            dense, samples, engine, target, out,
            batch=batch, threads=threads, evaluation=load_samples(evaluation, dense) if evaluation else None,
            metric=measure_metric, metric_name=metric if evaluation else None, loss=score,
            pattern=pattern, pruner=pruner, search=search, search_samples=search_samples, seed=seed,
            time_limit_seconds=None if time_limit is None else 60 * time_limit, allow_busy=allow_busy, watch=watch,
        )  # fmt: skip
    write_report_html(report.content, out / "report.html")
    show.report(report.content, out)
    if report.missed:
        raise TargetMissed(report.missed)


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
) -> None:
    """Compress every layer to every level. Continues where it was stopped."""
    levels, prune = levels_for(pattern), pruner_named(pruner)
    network = Network(load_network(model))
    samples = load_samples(data, network.model)
    with ProgressBars() as watch:
        build_database(
            network, samples, levels, prune, pruner, out,
            lambda what, done, total: watch("database", done, total, what),
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
    seed: Seed = 0,
    time_limit: TimeLimit = None,
) -> None:
    """Choose the level of each layer for one or more targets."""
    search_named(name)
    targets = [_speedup(text) for text in speedup.split(",")]
    table, weights, score = LatencyTable.load(latency), open_database(database), load_loss(loss)
    network = Network(load_network(model))
    samples = load_samples(data, network.model)
    with ProgressBars() as watch:
        finder = ProfileSearch(
            network, table, weights, samples, loss=score, search=name, search_samples=search_samples, seed=seed,
            time_limit_seconds=None if time_limit is None else 60 * time_limit,
            progress=lambda best, done, left: watch("search", done, done + left, f"loss {best:.5f}"),
        )  # fmt: skip
        paths = {out if len(targets) == 1 else out.with_name(f"{out.stem}-{x:g}x{out.suffix}"): x for x in targets}
        found = {path: finder.find_or_load(target, path) for path, target in paths.items()}
    for path, profile in found.items():
        print(f"{path}: predicted {profile.predicted_speedup:.3f}x, {profile.loss_name} loss {profile.loss:.6f}")


@app.command()
def deploy(
    model: ModelArgument,
    database: Annotated[Path, typer.Option("--database", metavar="DIR")],
    profile: Annotated[Path, typer.Option("--profile", metavar="F")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.onnx")],
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help="for the correction of statistics")] = None,
) -> None:
    """Write the pruned network of a profile."""
    network = Network(load_network(model))
    chosen, samples = Profile.load(profile), load_samples(data, network.model) if data else None
    stitching = Stitching(network, open_database(database), samples)
    stitching.stitch(chosen)
    deploy_network(network.model, network.changed(), chosen.levels, out)
    print(f"{out} written; statistics correction: {stitching.corrected}")


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
        found = validate_network(
            dense, pruned, engine, batch=batch, threads=threads, inputs=inputs,
            progress=lambda done, total: watch("validate", done, total, ""),
        )  # fmt: skip
        values = None
        if samples:
            values = [evaluate(path, samples, measure_metric) for path in (dense, pruned)]
    metrics = {} if values is None else {"metric_name": metric, "metric_dense": values[0], "metric_pruned": values[1]}
    if json:
        write_json(json, "validation", 1, {**found.to_json(), **metrics})
    show.validation({**found.to_json(), **metrics})


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Show the report of a run and write its report.html again."""
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


def _check_choices(pattern: str, pruner: str, search_name: str) -> None:
    levels_for(pattern)
    pruner_named(pruner)
    search_named(search_name)


def _speedup(value: str | float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 1):
        raise typer.BadParameter(f"--speedup {value} is not a number of at least 1")
    return number


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
