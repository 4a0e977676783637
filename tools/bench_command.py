"""The command that compares files: what each takes in every engine of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnx_spdy.models import Prepared, load_model
from onnx_spdy.pipeline.alternatives import (
    BASELINES,
    AlternativesError,
    Candidate,
    judged,
    measure_alternatives,
)
from onnx_spdy.pipeline.artifact import write_json
from onnx_spdy.pipeline.metric import Evaluation
from onnx_spdy.pipeline.validate import judge
from onnx_spdy.tools import show
from onnx_spdy.tools.options import Batch, ExampleData, MetricName, Threads, not_empty, out_file, path
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.specs import load_metric, load_samples, load_workload

ENGINES = (*BASELINES, "sparse")


def bench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.onnx...", parser=path)],
    batch: Batch = 1,
    threads: Threads = None,
    data: ExampleData = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", parser=not_empty, help="samples for the metric")
    ] = None,
    metric: MetricName = "top1",
    json: Annotated[Path | None, typer.Option("--json", metavar="F", parser=out_file)] = None,
) -> None:
    """Measure ONNX files in every engine of this machine, in turns: pruned here or elsewhere, as they are."""
    networks = {file: Prepared(load_model(file)) for file in dict.fromkeys(files)}
    first = next(iter(networks.values()))
    measure_metric = load_metric(metric)
    workload = load_workload(load_samples(data, first) if data else None, first, batch, threads)
    candidates = [
        Candidate(role, spec.replace(":", " "), spec, file)
        for file, role in zip(networks, names(list(networks)), strict=True)
        for spec in ENGINES
    ]
    with ProgressBars() as bars:
        found = measure_alternatives(candidates, None, workload, progress=bars.stage("bench"))
        if not found.measured:
            raise AlternativesError("no engine here runs " + "; ".join(f"{a}: {b}" for a, b in found.missing.items()))
        if eval_data:
            evaluation = Evaluation(load_samples(eval_data, first), measure_metric, metric)
            known = {file: judge(file, evaluation) for file in networks}
            found = judged(found, evaluation, known, None, progress=bars.stage("judge"))
    if json:
        write_json(json, "bench", 1, found.to_json())
    show.engines(found, metric if eval_data else None)


def names(files: list[Path]) -> list[str]:
    """What tells files apart: their names, or where these are the same, their paths."""
    short = [file.name for file in files]
    return short if len({*short}) == len(files) else [str(file) for file in files]
