"""The solver: how long it takes, and how far from the exact optimum it can be.

With `--latency` and `--database` it solves for the database's errors, and for quadratic ones with random sensitivities,
as searches ask it. Without, it solves a random instance of `--layers` x `--levels`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from onnx_spdy.pipeline.costs import Costs
from onnx_spdy.pipeline.database.layer_database import open_database
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.solve import BUCKETS, error_bounds, solve
from onnx_spdy.tools.options import Seed, several
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.table import print_table

REPEATS = 20
DRAWS = 10  # of random sensitivities


@dataclass(frozen=True)
class Row:
    """One instance.

    Attributes:
        milliseconds: of the fastest call.
        error: of the choice, summed over the layers.
        above_least, above_most: by how much that is above the exact optimum's, relative to it, at least and at most.
        left: share of the budget that the choice leaves; negative where it breaks it.
    """

    instance: str
    buckets: int
    milliseconds: float
    error: float
    above_least: float
    above_most: float
    left: float


def bench(
    latency: Annotated[Path | None, typer.Option("--latency", metavar="F")] = None,
    database: Annotated[Path | None, typer.Option("--database", metavar="DIR")] = None,
    speedup: Annotated[str, typer.Option("--speedup", metavar="X[,X...]")] = "1.5,2,3",
    layers: Annotated[int, typer.Option("--layers", min=1, help="of a random instance")] = 54,
    levels: Annotated[int, typer.Option("--levels", min=2, help="of a random instance")] = 42,
    buckets: Annotated[int, typer.Option("--buckets", min=1, help="that the solver divides the budget into")] = BUCKETS,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Solve, and show the time, the gap to the exact optimum, and how much of the budget is left."""
    if (latency is None) != (database is None):
        raise typer.BadParameter("--latency and --database belong together: give both, or none for a random instance")
    rng = np.random.default_rng(seed)
    if latency is None or database is None:
        rows = [random_instance(layers, levels, buckets, rng)]
    else:
        rows = real_instances(latency, database, several(speedup, float, "--speedup"), buckets, rng)
    print_table(
        "Solver", ("instance", "buckets", "ms", "error", "above the optimum", "of the budget left"),
        [(row.instance, row.buckets, f"{row.milliseconds:.1f}", f"{row.error:.6g}",
          f"{row.above_least:.4%} to {row.above_most:.4%}", "VIOLATED" if row.left < 0 else f"{row.left:.4%}")
         for row in rows],
    )  # fmt: skip
    write_results(json, "bench_solve", {"rows": [asdict(row) for row in rows]}, seed)


def random_instance(layers: int, levels: int, buckets: int, rng: np.random.Generator) -> Row:
    """Solve one random instance again and again."""
    errors = np.sort(rng.random((layers, levels)), axis=1)
    seconds = np.sort(rng.random((layers, levels)), axis=1)[:, ::-1]
    budget = float(seconds[:, 0].sum()) / 2
    return measured(f"{layers} layers x {levels} levels", errors, Costs(seconds), budget, buckets)


def real_instances(
    latency: Path, database: Path, speedups: list[float], buckets: int, rng: np.random.Generator
) -> list[Row]:
    """Solve for the database's errors, and for quadratic ones with random sensitivities."""
    table, rows = LatencyTable.load(latency), list[Row]()
    errors = open_database(database).errors(table.layers)
    prior = np.square(np.arange(len(table.levels)) / (len(table.levels) - 1))
    for speedup in speedups:
        try:
            budget = table.budget(speedup)
        except NoSpeedup as exc:
            print(exc)
            continue
        rows.append(measured(f"{speedup:g}x, measured errors", errors, table.costs, budget, buckets))
        for draw in range(DRAWS):
            drawn = rng.random((len(errors), 1)) * prior
            name = f"{speedup:g}x, random sensitivities {draw}"
            rows.append(measured(name, drawn, table.costs, budget, buckets, repeats=1))
    return rows


def measured(
    instance: str, errors: np.ndarray, costs: Costs, budget: float, buckets: int, repeats: int = REPEATS
) -> Row:
    """Time, gap to the exact optimum, and how much of the budget is left."""
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        choice = solve(errors, costs, budget, buckets)
        spent.append(1000 * (time.perf_counter() - start))
    lower, upper = error_bounds(errors, costs, budget)
    error = float(errors[np.arange(len(errors)), choice].sum())
    return Row(
        instance, buckets, min(spent), error, max(0.0, error - upper) / upper if upper else 0.0,
        (error - lower) / lower if lower else 0.0, float(1 - costs.total(choice) / budget),
    )  # fmt: skip
