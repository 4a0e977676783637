"""The command for everything: one target, or several that make a front."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
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
from onnx_spdy.pipeline.front import meet_all
from onnx_spdy.pipeline.int8.quantise import ready_for
from onnx_spdy.pipeline.level import DEFAULT_PATTERN, Level, any_int8, levels_for
from onnx_spdy.pipeline.metric import Evaluation
from onnx_spdy.pipeline.progress import Watch
from onnx_spdy.pipeline.report import Report
from onnx_spdy.pipeline.run import Target, keep_dense
from onnx_spdy.pipeline.run import run as run_pipeline
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH
from onnx_spdy.pipeline.search.settings import SEARCH_SAMPLES, SearchSettings
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
    Pattern,
    PrunerName,
    RuntimeOrAuto,
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
from onnx_spdy.tools.report.front import write_front_html
from onnx_spdy.tools.report.page import write_report_html
from onnx_spdy.tools.specs import load_inputs, load_loss, load_metric, load_pruner, load_samples, load_workload


def run(
    model: ModelArgument,
    data: Data,
    runtime: RuntimeOrAuto,
    speedup: Annotated[
        str,
        typer.Option(
            "--speedup", metavar="X[,X...]", help="dense seconds / pruned seconds; several make a front; see --against"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", parser=out_folder, help="with several targets DIR/Xx for each"),
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
) -> None:
    """Everything: measure, compress, search, write back, and measure the result. Continues where it was stopped."""
    compression = Compression(levels_for(pattern), load_pruner(pruner), gib(memory))
    settings = SearchSettings(search, load_loss(loss), search_samples, search_images, minutes(time_limit), seed)
    check_repair(finetune)
    seconds = training_seconds(finetune, train, finetune_limit)
    targets, measure_metric, interrupt = speedups(speedup), load_metric(metric), Interrupt()
    with ExitStack() as stack, ProgressBars() as bars:
        watch, tasks = Watch(bars.stage, interrupt), stack.enter_context(tasks_on(cluster))
        where, is_auto = runtime.removesuffix(AUTO), runtime.rpartition("/")[2] == AUTO
        engine = None if is_auto else _opened(stack, runtime, compression.levels)
        dense, samples = load_inputs(model, data)
        dense = ready_for(compression.levels, dense, samples)
        judged = Evaluation(load_samples(evaluation, dense), measure_metric, metric) if evaluation else None
        training = WholeTraining(load_samples(train, dense) if train else None, seconds)
        workload = load_workload(samples, dense, batch, threads)
        stack.enter_context(locked(out))
        rivals = None
        if engine is None or against == BEST:
            keep_dense(dense, out / "dense.onnx")
            rivals = measure_dense(
                dense, samples, engine, workload, out,
                where=where if engine is None else location(engine), evaluation=judged, watch=watch,
            )  # fmt: skip
            show.alternatives(rivals, metric)
        if engine is None:
            assert rivals is not None
            engine = _opened(stack, where + fastest_runtime(rivals, compression.levels), compression.levels)
            print(f"--runtime {runtime}: {runtime_spec(engine)}, the fastest that gains by {pattern}")
        asked = against_best(rivals, engine) if rivals and against == BEST else None

        def meet(speedup: float, folder: Path) -> Report:
            opponent = replace(asked, speedup=speedup) if asked else None
            if opponent:
                print(opponent)
            target = Target(opponent.of_same if opponent else speedup, folder, shared=out, against=opponent)
            found = run_pipeline(
                dense, samples, engine, workload, target,
                compression=compression, search=settings, finetune=finetune, training=training, evaluation=judged,
                allow_busy=allow_busy, watch=watch, tasks=tasks,
            )  # fmt: skip
            write_report_html(found.content, folder / "report.html")
            return found

        if len(targets) == 1:
            front, reports = None, [meet(targets[0], out)]
        else:
            front, reports = meet_all(targets, out, meet)
    if front is None:
        show.report(reports[0].content, out)
    else:
        write_front_html(front.content, out)
        show.front(front.content, out)
    if missed := (front or reports[0]).missed:
        raise TargetMissed(missed)


def _opened(stack: ExitStack, runtime: str, levels: Sequence[Level]) -> Runtime:
    """A runtime that works, until the stack ends."""
    engine = stack.enter_context(open_runtime(runtime))
    if any_int8(levels):
        form_for(engine.name)  # before the long work
    engine.check()
    warn_without_kernels(engine, levels)
    return engine
