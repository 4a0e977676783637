"""How searches grow with the network, on formulas instead of networks.

For each number of layers: what the solver takes and how far it can be from the optimum, what a search spends in
profiles, samples and seconds of its own (the network of formulas takes next to none), and the memory of the process so
far.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from onnx_spdy.pipeline.database.layer_database import peak_bytes
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, search_named
from onnx_spdy.pipeline.search.methods.spdy import least_evaluations
from onnx_spdy.pipeline.solve import BUCKETS, error_bounds
from onnx_spdy.tools.bench.synthetic import STAGES, SyntheticNetwork
from onnx_spdy.tools.options import SearchName, Seed, several
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.report.page import colour, plain_axes
from onnx_spdy.tools.results import Json, Plot, write_plot, write_results
from onnx_spdy.tools.table import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        solve_seconds: of one call of the solver.
        solve_gap: by how much its error may be above the optimum's, relative to it.
        profiles, samples_run, seconds: of the search; `samples_run` are the samples that went through the network.
        loss, dp_loss: of the profile found, and of the solver's own for the database's errors.
        spdy_samples_run: what the published search needs at least.
        peak_bytes: most memory of the process until then.
    """

    layers: int
    solve_seconds: float
    solve_gap: float
    profiles: int
    samples_run: int
    seconds: float
    loss: float
    dp_loss: float
    spdy_samples_run: int
    peak_bytes: int


def bench(
    layers: Annotated[str, typer.Option("--layers", metavar="N[,N...]")] = "5,10,20,50,100,200,500",
    search: SearchName = DEFAULT_SEARCH,
    speedup: Annotated[float, typer.Option("--speedup", metavar="X", min=1)] = 2.0,
    seed: Seed = 0,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Search networks of so many layers."""
    rows: list[Row] = []
    with ProgressBars() as bars:
        for number, count in enumerate(counts := several(layers, int, "--layers"), 1):
            rows.append(measure(count, search, speedup, seed))
            bars.stage("scaling")(number, len(counts), f"{count} layers")
            content = {"search": search, "speedup": speedup, "rows": [asdict(row) for row in rows]}
            write_results(json, "bench_scaling", content, seed)
    show(rows)
    write_plot(plot, lambda figure: draw(rows, figure), height=3.4, label="What a search costs by number of layers")


def measure(layers: int, search: str, speedup: float, seed: int) -> Row:
    """Search one network of formulas."""
    network = SyntheticNetwork(layers, seed)
    problem = network.problem(speedup, seed)
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        choice = problem.solve(network.errors)
        spent.append(time.perf_counter() - start)
    lower, _ = error_bounds(network.errors, network.costs, problem.limits[0].seconds, 20 * BUCKETS)
    error = float(network.errors[np.arange(layers), choice].sum())
    dp_loss = network.loss(choice)
    samples_run, profiles = network.samples_run, network.profiles
    start = time.perf_counter()
    found = search_named(search)(problem)
    seconds = time.perf_counter() - start
    return Row(
        layers, min(spent), (error - lower) / lower, network.profiles - profiles, network.samples_run - samples_run,
        seconds,        network.loss(found.choice), dp_loss, STAGES[-1] * least_evaluations(layers), peak_bytes(),
    )  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    columns = ("layers", "solver", "gap at most", "profiles", "run", "spdy's, at least", "seconds", "loss / dp's",
               "peak")  # fmt: skip
    print_table(
        "Searches by the number of layers", columns,
        [(row.layers, f"{1000 * row.solve_seconds:.1f} ms", f"{row.solve_gap:.3%}", row.profiles, row.samples_run,
          row.spdy_samples_run, f"{row.seconds:.1f}", f"{row.loss / row.dp_loss:.3f}",
          f"{row.peak_bytes / 2**20:.0f} MiB") for row in rows],
    )  # fmt: skip


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Images and seconds against layers."""
    layers = [row.layers for row in rows]
    left, right = figure.subplots(1, 2)
    left.plot(layers, [row.samples_run for row in rows], "o-", color=colour("pruned"), label="search")
    left.plot(layers, [row.spdy_samples_run for row in rows], "--", color=colour("dense"), label="spdy, at least")
    left.set(ylabel="samples through the network")
    right.plot(layers, [row.seconds for row in rows], "o-", color=colour("pruned"), label="search")
    right.plot(layers, [row.solve_seconds for row in rows], "o-", color=colour("sparsity"), label="one solution")
    right.set(ylabel="seconds without the network")
    for axes in (left, right):
        axes.set(xlabel="layers", xscale="log", yscale="log")
        axes.legend(frameon=False)
        plain_axes(axes)
