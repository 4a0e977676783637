"""How searches grow with the network: `python -m onnx_spdy.tools.bench.scaling`, on formulas instead of networks.

For each number of layers: what the solver takes and how far it can be from the optimum, what a search spends in
profiles, images and seconds of its own (the network of formulas takes next to none), and the memory of the process so
far.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from onnx_spdy.pipeline.artifact import replacing, write_json
from onnx_spdy.pipeline.database.layer_database import peak_bytes
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, search_named
from onnx_spdy.pipeline.search.methods.spdy import least_evaluations
from onnx_spdy.pipeline.solve import BUCKETS, error_bounds
from onnx_spdy.tools.bench.synthetic import STAGES, SyntheticNetwork
from onnx_spdy.tools.expected import run_command
from onnx_spdy.tools.report.page import colour, plain_axes, svg_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        solve_seconds: of one call of the solver.
        solve_gap: by how much its error may be above the optimum's, relative to it.
        profiles, images, seconds: of the search; `images` are samples that went through the network.
        loss, dp_loss: of the profile found, and of the solver's own for the database's errors.
        spdy_images: what the published search needs at least.
        peak_bytes: most memory of the process until then.
    """

    layers: int
    solve_seconds: float
    solve_gap: float
    profiles: int
    images: int
    seconds: float
    loss: float
    dp_loss: float
    spdy_images: int
    peak_bytes: int


def bench(
    layers: Annotated[str, typer.Option("--layers")] = "5,10,20,50,100,200,500",
    search: Annotated[str, typer.Option("--search")] = DEFAULT_SEARCH,
    speedup: Annotated[float, typer.Option("--speedup")] = 2.0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json: Annotated[Path | None, typer.Option("--json")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.svg")] = None,
) -> None:
    """Search networks of so many layers and print a table."""
    rows: list[Row] = []
    for count in map(int, layers.split(",")):
        rows.append(measure(count, search, speedup, seed))
        print(rows[-1], flush=True)
        if json:
            write_json(json, "scaling_bench", 1, {"search": search, "rows": [asdict(row) for row in rows]})
    show(rows)
    if plot:
        with replacing(plot) as temporary:
            temporary.write_text(draw(rows), encoding="utf8")


def measure(layers: int, search: str, speedup: float, seed: int) -> Row:
    """Search one network of formulas."""
    network = SyntheticNetwork(layers, seed)
    problem = network.problem(speedup, seed)
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        choice = problem.solve(network.errors)
        spent.append(time.perf_counter() - start)
    lower, _ = error_bounds(network.errors, network.costs, problem.budget_seconds, 20 * BUCKETS)
    error = float(network.errors[np.arange(layers), choice].sum())
    dp_loss = network.loss(choice)
    images, profiles = network.images, network.profiles
    start = time.perf_counter()
    found = search_named(search)(problem)
    seconds = time.perf_counter() - start
    return Row(
        layers, min(spent), (error - lower) / lower, network.profiles - profiles, network.images - images, seconds,
        network.loss(found.choice), dp_loss, STAGES[-1] * least_evaluations(layers), peak_bytes(),
    )  # fmt: skip


def show(rows: list[Row]) -> None:
    """Print the table."""
    grid = Table(title="searches by the number of layers", title_justify="left")
    for column in (
        "layers",
        "solver",
        "gap at most",
        "profiles",
        "images",
        "spdy's, at least",
        "seconds",
        "loss / dp's",
        "peak",
    ):
        grid.add_column(column, justify="right")
    for row in rows:
        grid.add_row(
            str(row.layers), f"{1000 * row.solve_seconds:.1f} ms", f"{row.solve_gap:.3%}", str(row.profiles),
            str(row.images), str(row.spdy_images), f"{row.seconds:.1f}", f"{row.loss / row.dp_loss:.3f}",
            f"{row.peak_bytes / 2**20:.0f} MiB",
        )  # fmt: skip
    Console(width=140).print(grid)


def draw(rows: list[Row]) -> str:
    """Images and seconds against layers, as an <svg> file."""
    layers = [row.layers for row in rows]

    def panels(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(layers, [row.images for row in rows], "o-", color=colour("pruned"), label="search")
        left.plot(layers, [row.spdy_images for row in rows], "--", color=colour("dense"), label="spdy, at least")
        left.set(ylabel="images through the network")
        right.plot(layers, [row.seconds for row in rows], "o-", color=colour("pruned"), label="search")
        right.plot(layers, [row.solve_seconds for row in rows], "o-", color=colour("sparsity"), label="one solution")
        right.set(ylabel="seconds without the network")
        for axes in (left, right):
            axes.set(xlabel="layers", xscale="log", yscale="log")
            axes.legend(frameon=False)
            plain_axes(axes)

    return svg_plot(panels, height=3.4, label="What a search costs against the number of layers", alone=True)


if __name__ == "__main__":
    run_command(bench)
