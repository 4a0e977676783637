"""What searches find and what they cost.

Each search, target and seed starts from nothing. The network forwards count samples, whether the whole network ran or
only its later layers. With `--eval` the networks are stitched and corrected as they would be deployed, and judged on
those samples, which neither search nor database saw. With `--json` what was done already isn't done again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from onnx_spdy.pipeline.data import Samples, workload_of
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, open_database
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.loss import fit_loss
from onnx_spdy.pipeline.metric import top1
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.search.profile_search import ProfileSearch
from onnx_spdy.pipeline.search.settings import SEARCH_SAMPLES, SearchSettings
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.pipeline.stitch import CorrectedStitcher, Stitcher
from onnx_spdy.tools.options import Data, LossName, ModelArgument, SearchImages, SearchSamples, several
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, read_results, write_results
from onnx_spdy.tools.specs import load_loss, load_network, load_samples
from onnx_spdy.tools.table import print_table

KIND = "bench_search"
YARDSTICK = "spdy"
COMPARED = (YARDSTICK, "thompson", "dp", "random", "uniform", "global-magnitude", "erk")
ROUNDING = 1e-6  # of a loss that was computed twice


@dataclass(frozen=True)
class Row:
    """One search.

    Attributes:
        samples_run, seconds: what it cost; samples that went through the network, and wall time.
        limit: of the samples_run, or None.
        loss, held_out_loss: as the profile tells.
        deployed_loss, top1: of the network as it would be deployed, on the samples of `--eval`.
        problem: why there is no profile.
        trace: (samples_run, seconds, best loss so far).
    """

    search: str
    speedup: float
    seed: int
    samples: int
    limit: int | None
    samples_run: int
    evaluations: int
    seconds: float
    loss: float | None = None
    held_out_loss: float | None = None
    deployed_loss: float | None = None
    top1: float | None = None
    problem: str = ""
    trace: Sequence[tuple[int, float, float]] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, float, int, int, int | None]:
        """What was asked for."""
        return self.search, self.speedup, self.seed, self.samples, self.limit


def bench(
    model: ModelArgument,
    latency: Annotated[Path, typer.Option("--latency", metavar="F")],
    database: Annotated[Path, typer.Option("--database", metavar="DIR")],
    data: Data,
    speedup: Annotated[str, typer.Option("--speedup", metavar="X[,X...]")] = "1.5,2,3",
    search: Annotated[str, typer.Option("--search", metavar="NAME[,NAME...]")] = ",".join(COMPARED),
    seeds: Annotated[str, typer.Option("--seed", metavar="N[,N...]")] = "0,1,2",
    search_samples: SearchSamples = SEARCH_SAMPLES,
    search_images: SearchImages = None,
    share: Annotated[
        float | None, typer.Option("--share", help="--search-images of the others, as a share of what spdy used")
    ] = None,
    loss: LossName = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", metavar="DATA", help="samples to judge the deployed networks by")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", metavar="MINUTES", help="after which no search is begun")
    ] = None,
    json: Json = None,
) -> None:
    """Run searches x targets x seeds."""
    began = time.monotonic()
    table, weights, score = LatencyTable.load(latency), open_database(database), load_loss(loss)
    network = Network(load_network(model))
    samples = load_samples(data, network.prepared)
    table.check_workload(network.model.graph, workload_of(samples, table.environment.batch))
    judge = Judge(network, weights, samples, load_samples(evaluation, network.prepared)) if evaluation else None
    rows = _known(json, network.sha256)
    wanted = [
        (name, target, seed)
        for seed in several(seeds, int, "--seed")
        for target in several(speedup, float, "--speedup")
        for name in search.split(",")
    ]
    with ProgressBars() as bars:
        for number, (name, target, seed) in enumerate(wanted, 1):
            limit = search_images if share is None or name == YARDSTICK else _share(rows, share, target, seed)
            if (name, target, seed, search_samples, limit) in {row.key for row in rows}:
                continue
            if time_limit is not None and time.monotonic() - began > 60 * time_limit:
                print(f"{time_limit:g} minutes are over: {name} {target:g}x, seed {seed} and what follows isn't run")
                break
            trace = Trace()
            finder = ProfileSearch(
                network, table, weights, samples,
                SearchSettings(name, score, search_samples, sample_limit=limit, seed=seed), progress=trace,
            )  # fmt: skip
            row, profile = _timed(finder, Row(name, target, seed, search_samples, limit, 0, 0, 0.0), trace)
            if judge is not None and profile is not None:
                deployed, accuracy = judge(profile)
                row = replace(row, deployed_loss=deployed, top1=accuracy)
            rows.append(row)
            bars.stage("searches")(number, len(wanted), f"{name} {target:g}x seed {seed}")
            write_results(json, KIND, {"model_sha256": network.sha256, "rows": [asdict(one) for one in rows]})
    _show(rows)
    _show_cost(rows)


def _known(path: Path | None, model_sha256: str) -> list[Row]:
    """The rows that an earlier call wrote for the same network."""
    if path is None or not path.exists():
        return []
    content = read_results(path, KIND)
    return [Row(**row) for row in content["rows"]] if content["model_sha256"] == model_sha256 else []


def _share(rows: Sequence[Row], share: float, target: float, seed: int) -> int:
    """So much of the samples_run that the yardstick used for the same target and seed.

    Raises:
        BadParameter: it wasn't run.
    """
    for row in rows:
        if (row.search, row.speedup, row.seed) == (YARDSTICK, target, seed):
            return round(share * row.samples_run)
    raise typer.BadParameter(
        f"--share needs a search by {YARDSTICK} at {target:g}x with seed {seed}; name it in --search first"
    )


class Judge:
    """Says what a profile's network is worth when it is deployed, on samples that nobody saw.

    Args:
        samples: for the correction of statistics.
        unseen: with labels, or without.
    """

    def __init__(self, network: Network, weights: LayerDatabase, samples: Samples, unseen: Samples) -> None:
        self._network, self._unseen = network, unseen
        self._stitcher = CorrectedStitcher(Stitcher(network, weights), samples)
        self._dense = [outputs for _, outputs in network.outputs(unseen)]
        self._loss = fit_loss(None, self._dense)

    def __call__(self, profile: Profile) -> tuple[float, float | None]:
        """Loss, and top-1 where there are labels."""
        pruned = self._stitcher.stitch(profile)
        network = Network(pruned.base) if pruned.widths else self._network
        losses: list[float] = []
        values: list[float] = []
        sizes: list[int] = []
        for (batch, outputs), dense in zip(network.outputs(self._unseen, pruned.weights), self._dense, strict=True):
            losses.append(float(self._loss(outputs, dense, None)))
            sizes.append(len(batch))
            if batch.target is not None:
                values.append(top1({name: value.numpy() for name, value in outputs.items()}, batch.target))
        accuracy = float(np.average(values, weights=sizes)) if values else None
        return float(np.average(losses, weights=sizes)), accuracy


class Trace:
    """Listens to a search: how its best loss fell, by image forwards and by time."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float, float]] = []
        self._finder: ProfileSearch | None = None

    def begin(self, finder: ProfileSearch) -> None:
        self._finder, self._samples_run, self._start = finder, finder.samples_run, time.perf_counter()
        self.points = []

    def __call__(self, done: int, total: int, note: str) -> None:
        loss = self._finder.best_loss if self._finder else math.inf
        if self._finder and math.isfinite(loss) and (not self.points or loss < self.points[-1][2]):
            seconds = time.perf_counter() - self._start
            self.points.append((self._finder.samples_run - self._samples_run, round(seconds, 2), loss))


def _timed(finder: ProfileSearch, row: Row, trace: Trace) -> tuple[Row, Profile | None]:
    trace.begin(finder)
    start = time.perf_counter()
    try:
        found = finder.find(row.speedup)
    except (InfeasibleTarget, NoSpeedup) as exc:
        return replace(row, seconds=time.perf_counter() - start, problem=str(exc)), None
    return replace(
        row, samples_run=found.samples_run, evaluations=found.evaluations, seconds=time.perf_counter() - start,
        loss=found.loss, held_out_loss=found.held_out_loss, trace=trace.points,
    ), found  # fmt: skip


def _show(rows: Sequence[Row]) -> None:
    columns = ("search", "target", "seed", "samples", "run", "profiles", "seconds", "loss", "held out", "deployed",
               "top-1", "note")  # fmt: skip
    cells = []
    for row in rows:
        losses = ["-" if x is None else f"{x:.4g}" for x in (row.loss, row.held_out_loss, row.deployed_loss)]
        accuracy = "-" if row.top1 is None else f"{row.top1:.2%}"
        cells.append((row.search, f"{row.speedup:g}x", row.seed, row.samples, row.samples_run, row.evaluations,
                      f"{row.seconds:.1f}", *losses, accuracy, row.problem))  # fmt: skip
    print_table("Searches", columns, cells)


def _reached(row: Row, wanted: float) -> tuple[int, float] | None:
    """After how many samples_run and seconds a search came to a loss, or None if it ended with more."""
    wanted += ROUNDING * abs(wanted)
    if row.loss is None or row.loss > wanted:
        return None
    if not math.isclose(row.trace[-1][2], row.loss, rel_tol=ROUNDING):
        return row.samples_run, row.seconds  # it judged by fewer samples: what it found is known at its end
    return next(((samples_run, seconds) for samples_run, seconds, loss in row.trace if loss <= wanted), None)


def _show_cost(rows: Sequence[Row]) -> None:
    """When each search came to the loss that the yardstick ended with."""
    yardsticks = {(row.speedup, row.seed, row.samples): row for row in rows if row.search == YARDSTICK}
    cells = []
    for row in rows:
        whole = yardsticks.get((row.speedup, row.seed, row.samples))
        if whole is None or whole is row or whole.loss is None or not row.trace:
            continue
        reached = _reached(row, whole.loss)
        shares = ["not reached", ""] if reached is None else [
            f"{reached[0] / whole.samples_run:.1%}", f"{reached[1] / whole.seconds:.1%}"
        ]  # fmt: skip
        cells.append((row.search, f"{row.speedup:g}x", row.seed, row.samples, *shares))
    title = f"Cost of {YARDSTICK}'s final loss, as a share of its cost"
    print_table(title, ("search", "target", "seed", "samples", "samples_run", "seconds"), cells)
