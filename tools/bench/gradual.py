"""Gradual pruning to several profiles, trained equally long: which profile ends higher?

Stopped work continues: each training from its last epoch, and finished ones aren't repeated.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from onnx_spdy.models import Prepared, save_model
from onnx_spdy.pipeline.metric import Metric
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.training.finetune import EPOCHS, finetune
from onnx_spdy.pipeline.training.trainer import BATCH
from onnx_spdy.pipeline.validate import evaluate
from onnx_spdy.tools.options import Data, Evaluation, MetricName, ModelArgument, Seed
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, read_results, write_results
from onnx_spdy.tools.specs import load_metric, load_network, load_samples
from onnx_spdy.tools.table import print_table

ROW = "bench_gradual_row"


@dataclass(frozen=True)
class Lesson:
    """What each profile is trained with.

    Attributes:
        data, evaluation: DATA to train and to judge with.
        batch: samples in a step.
    """

    dense: Prepared
    data: str
    evaluation: str
    metric: Metric
    epochs: int
    batch: int
    seed: int


@dataclass(frozen=True)
class Row:
    """One profile.

    Attributes:
        metric: of the trained network.
        loss: after the training, on held-out samples.
        seconds: of the training's last start.
    """

    profile: str
    search: str
    predicted_speedup: float
    metric: float
    loss: float
    seconds: float


def bench(
    model: ModelArgument,
    data: Data,
    evaluation: Evaluation,
    profile: Annotated[list[Path], typer.Option("--profile", metavar="F", help="given once for each profile")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="the networks, and what is done so far")],
    metric: MetricName = "top1",
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="passes over the data")] = EPOCHS,
    batch: Annotated[int, typer.Option("--batch", min=1, help="samples in a step")] = BATCH,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Train to every profile, and show the metric of each network in ONNX Runtime."""
    dense, measure = load_network(model), load_metric(metric)
    lesson = Lesson(dense, data, evaluation, measure, epochs, batch, seed)
    out.mkdir(parents=True, exist_ok=True)
    save_model(dense.proto, out / "dense.onnx")
    reference = evaluate(out / "dense.onnx", load_samples(evaluation, dense), measure)
    with ProgressBars() as bars:
        rows = [trained(lesson, path, out, bars) for path in profile]
    columns = ("profile", "search", "predicted", metric, "change", "held-out loss", "seconds")
    cells = [
        (one.profile, one.search, f"{one.predicted_speedup:.2f}x", f"{one.metric:.4f}",
         f"{one.metric - reference:+.4f}", f"{one.loss:.4f}", f"{one.seconds:.0f}")
        for one in rows
    ]  # fmt: skip
    print_table("Gradual pruning", columns, [("dense", "", "", f"{reference:.4f}", "", "", ""), *cells])
    content = {"metric": metric, "dense": reference, "epochs": epochs, "rows": [asdict(one) for one in rows]}
    write_results(json, "bench_gradual", content, seed)


def trained(lesson: Lesson, path: Path, out: Path, bars: ProgressBars) -> Row:
    """Train the dense network to one profile, unless that is done; keep the network and its figures in `out`."""
    name, start, chosen = path.stem, time.monotonic(), Profile.load(path)
    done = out / f"{name}.json"
    if done.exists():
        return Row(**read_results(done, ROW)["row"])
    found = finetune(
        lesson.dense, lesson.dense.proto, load_samples(lesson.data, lesson.dense), levels=chosen.levels,
        epochs=lesson.epochs, batch=lesson.batch, seed=lesson.seed,
        checkpoint=out / f"{name}.checkpoint.safetensors",
        progress=bars.stage(name),
    )  # fmt: skip
    save_model(found.model, out / f"{name}.onnx")
    score = evaluate(out / f"{name}.onnx", load_samples(lesson.evaluation, lesson.dense), lesson.metric)
    seconds = time.monotonic() - start
    row = Row(name, chosen.search, chosen.predicted_speedup, score, found.training.loss_after, seconds)
    write_results(done, ROW, {"row": asdict(row)}, lesson.seed)
    return row
