"""Gradual pruning to several profiles, trained equally long: which profile ends higher?

    python -m onnx_spdy.tools.bench.gradual MODEL --data TRAIN --eval DATA --profile spdy-3x.json \
        --profile uniform-3x.json --profile global-magnitude-3x.json --epochs 3 --out DIR

Stopped work continues: each training from its last epoch, and finished ones aren't repeated.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import onnx
import typer

from onnx_spdy.models import save_model
from onnx_spdy.pipeline.metric import Metric
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.training.finetune import EPOCHS, finetune
from onnx_spdy.pipeline.training.trainer import BATCH
from onnx_spdy.pipeline.validate import evaluate
from onnx_spdy.tools.expected import run_command
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.specs import load_metric, load_network, load_samples


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Annotated[str, typer.Option(metavar="DATA", help="training samples")],
    evaluation: Annotated[str, typer.Option("--eval", metavar="DATA")],
    profile: Annotated[list[Path], typer.Option(metavar="F", help="given once for each profile")],
    out: Annotated[Path, typer.Option(metavar="DIR")],
    metric: Annotated[str, typer.Option(metavar="M")] = "top1",
    epochs: Annotated[int, typer.Option(min=1)] = EPOCHS,
    batch: Annotated[int, typer.Option(min=1)] = BATCH,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train to every profile, and print the metric of each network in ONNX Runtime."""
    dense, measure = load_network(model), load_metric(metric)
    out.mkdir(parents=True, exist_ok=True)
    save_model(dense, out / "dense.onnx")
    with ProgressBars() as watch:
        for path in profile:
            if not (out / f"{path.stem}.json").exists():
                train(dense, path, data, evaluation, measure, out, epochs, batch, seed, watch)
    reference = evaluate(out / "dense.onnx", load_samples(evaluation, dense), measure)
    print(f"{metric} dense {reference:.4f}")
    for path in profile:
        found = json.loads((out / f"{path.stem}.json").read_text(encoding="utf8"))
        print(
            f"{path.stem}: {metric} {found['metric']:.4f} ({found['metric'] - reference:+.4f}), predicted "
            f"{found['predicted_speedup']:.2f}x, held-out loss {found['loss']:.4f}, {found['seconds']:.0f} s"
        )


def train(
    dense: onnx.ModelProto,
    path: Path,
    data: str,
    evaluation: str,
    measure: Metric,
    out: Path,
    epochs: int,
    batch: int,
    seed: int,
    watch: ProgressBars,
) -> None:
    """Train the dense network to one profile, and keep the network and its figures."""
    name, start, chosen = path.stem, time.monotonic(), Profile.load(path)
    trained = finetune(
        dense, dense, load_samples(data, dense), levels=chosen.levels, epochs=epochs, batch=batch, seed=seed,
        checkpoint=out / f"{name}.checkpoint.safetensors",
        progress=lambda done, total, note: watch(name, done, total, note),
    )  # fmt: skip
    save_model(trained.model, out / f"{name}.onnx")
    figures = {
        "search": chosen.search,
        "predicted_speedup": chosen.predicted_speedup,
        "metric": evaluate(out / f"{name}.onnx", load_samples(evaluation, dense), measure),
        "loss": trained.training.loss_after,
        "seconds": time.monotonic() - start,
    }
    (out / f"{name}.json").write_text(json.dumps(figures), encoding="utf8")


def main() -> None:
    """The command line."""
    run_command(bench)


if __name__ == "__main__":
    main()
