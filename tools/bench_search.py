"""What searches find and what they cost: `python -m onnx_spdy.tools.bench_search MODEL --latency F --database DIR ...`.

Each search, target and seed starts from nothing; `--share` lets the targets of a search share what it learned. The
network forwards count samples, whether the whole network ran or only its later layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from onnx_spdy.models import save_model, write_weights
from onnx_spdy.pipeline.artifact import write_json
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database import LayerDatabase, open_database
from onnx_spdy.pipeline.latency import LatencyTable
from onnx_spdy.pipeline.metric import top1
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.run import Stitching
from onnx_spdy.pipeline.search import SEARCH_SAMPLES, ProfileSearch
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.pipeline.validate import evaluate
from onnx_spdy.tools.expected import run_command
from onnx_spdy.tools.specs import load_loss, load_network, load_samples


@dataclass(frozen=True)
class Row:
    """One search."""

    search: str
    speedup: float
    seed: int
    images: int
    evaluations: int
    seconds: float
    loss: float | None = None
    held_out_loss: float | None = None
    top1: float | None = None
    problem: str = ""
    trace: Sequence[tuple[int, float, float]] = field(default=(), repr=False)  # (images, seconds, best loss so far)


def bench(
    model: Annotated[str, typer.Argument()],
    latency: Annotated[Path, typer.Option("--latency")],
    database: Annotated[Path, typer.Option("--database")],
    data: Annotated[str, typer.Option("--data")],
    speedup: Annotated[str, typer.Option("--speedup")] = "1.5,2,3",
    search: Annotated[str, typer.Option("--search")] = "thompson,spdy,dp,random,uniform,global-magnitude,erk",
    seeds: Annotated[str, typer.Option("--seeds")] = "0,1,2",
    search_samples: Annotated[int, typer.Option("--search-samples")] = SEARCH_SAMPLES,
    images: Annotated[int | None, typer.Option("--images", help="image forwards that a search may use")] = None,
    loss: Annotated[str | None, typer.Option("--loss")] = None,
    evaluation: Annotated[str | None, typer.Option("--eval", help="samples for top-1, one-shot")] = None,
    share: Annotated[bool, typer.Option("--share")] = False,
    json: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Run searches x targets x seeds and print a table."""
    table, weights, score = LatencyTable.load(latency), open_database(database), load_loss(loss)
    network = Network(load_network(model))
    samples = load_samples(data, network.model)
    dev = load_samples(evaluation, network.model) if evaluation else None
    rows: list[Row] = []
    for name in search.split(","):
        for seed in map(int, seeds.split(",")):
            finder: ProfileSearch | None = None
            trace = Trace()
            for target in map(float, speedup.split(",")):
                if finder is None or not share:
                    finder = ProfileSearch(
                        network, table, weights, samples, loss=score, search=name, search_samples=search_samples,
                        seed=seed, image_limit=images, progress=trace,
                    )  # fmt: skip
                row, profile = _timed(finder, name, target, seed, trace)
                if dev is not None and profile is not None:
                    row = replace(row, top1=_top1(network, weights, samples, profile, dev))
                rows.append(row)
                print(row, flush=True)
                if json:
                    write_json(json, "search_bench", 1, {"model": model, "rows": [asdict(one) for one in rows]})
    _show(rows)


class Trace:
    """Listens to a search: how its best loss fell, by image forwards and by time."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []
        self._finder: ProfileSearch | None = None

    def begin(self, finder: ProfileSearch) -> None:
        self._finder, self._images, self._start = finder, finder.images, time.perf_counter()
        self.points = []

    def __call__(self, loss: float, done: int, left: int) -> None:
        if self._finder and np.isfinite(loss) and (not self.points or loss < self.points[-1][2]):
            seconds = time.perf_counter() - self._start
            self.points.append((self._finder.images - self._images, round(seconds, 2), loss))


def _timed(finder: ProfileSearch, name: str, target: float, seed: int, trace: Trace) -> tuple[Row, Profile | None]:
    trace.begin(finder)
    start = time.perf_counter()
    try:
        found = finder.find(target)
    except InfeasibleTarget as exc:
        return Row(name, target, seed, 0, 0, time.perf_counter() - start, problem=str(exc)), None
    seconds = time.perf_counter() - start
    return Row(
        name, target, seed, found.images, found.evaluations, seconds, found.loss, found.held_out_loss,
        trace=trace.points,
    ), found  # fmt: skip


def _top1(network: Network, weights: LayerDatabase, samples: Samples, profile: Profile, dev: Samples) -> float:
    Stitching(network, weights, samples).stitch(profile)
    path = Path("pruned.bench.onnx")
    try:
        save_model(write_weights(network.model, network.changed()), path)
        return evaluate(path, dev, top1)
    finally:
        path.unlink(missing_ok=True)


def _show(rows: list[Row]) -> None:
    grid = Table(title="searches", title_justify="left")
    for column in ("search", "target", "seed", "images", "profiles", "seconds", "loss", "held out", "top-1"):
        grid.add_column(column, justify="left" if column == "search" else "right")
    for row in rows:
        numbers = [f"{value:.4f}" if value is not None else "-" for value in (row.loss, row.held_out_loss, row.top1)]
        grid.add_row(
            row.search, f"{row.speedup:g}x", str(row.seed), str(row.images), str(row.evaluations),
            f"{row.seconds:.1f}", *([row.problem, "", ""] if row.problem else numbers),
        )  # fmt: skip
    Console(width=140).print(grid)


if __name__ == "__main__":
    run_command(bench)
