"""The solver: how long it takes, and how far from the exact optimum it can be.

python -m onnx_spdy.tools.bench.solve [LAYERS LEVELS BUCKETS]         a random instance of that size
python -m onnx_spdy.tools.bench.solve latency.json DATABASE [X,X...]  real tables, at these speedups
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from onnx_spdy.pipeline.database.layer_database import open_database
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup
from onnx_spdy.pipeline.solve import BUCKETS, Costs, error_bounds, solve
from onnx_spdy.tools.expected import one_line_errors

REPEATS = 20
DRAWS = 10  # of random sensitivities, as searches ask the solver


def random_instance(layers: int = 54, levels: int = 42, buckets: int = BUCKETS) -> None:
    """Solve one random instance again and again."""
    rng = np.random.default_rng(0)
    errors = np.sort(rng.random((layers, levels)), axis=1)
    seconds = np.sort(rng.random((layers, levels)), axis=1)[:, ::-1]
    report(f"{layers} layers x {levels} levels", errors, Costs(seconds), float(seconds[:, 0].sum()) / 2, buckets)


def real_instances(latency: Path, database: Path, speedups: str = "1.5,2,3") -> None:
    """Solve for the database's errors, and for quadratic ones with random sensitivities."""
    table, found = LatencyTable.load(latency), open_database(database)
    measured = found.errors(table.layers)
    prior = np.square(np.arange(len(table.levels)) / (len(table.levels) - 1))
    rng = np.random.default_rng(0)
    for speedup in map(float, speedups.split(",")):
        try:
            budget = table.budget(speedup)
        except NoSpeedup as exc:
            print(exc)
            continue
        report(f"{speedup:g}x, measured errors", measured, table.costs, budget)
        for draw in range(DRAWS):
            errors = rng.random((len(measured), 1)) * prior
            report(f"{speedup:g}x, random sensitivities {draw}", errors, table.costs, budget, repeats=1)


def report(what: str, errors: np.ndarray, costs: Costs, budget: float, buckets: int = BUCKETS, repeats: int = REPEATS):
    """Print time, gap to the exact optimum, and how much of the budget is left."""
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        choice = solve(errors, costs, budget, buckets)
        spent.append(1000 * (time.perf_counter() - start))
    lower, upper = error_bounds(errors, costs, budget)
    error = float(errors[np.arange(len(errors)), choice].sum())
    over = costs.total(choice) > budget
    print(
        f"{what}, {buckets} buckets: {min(spent):.1f} ms, error {error:.6g}, above the optimum by "
        f"{max(0.0, error - upper) / upper if upper else 0:.4%} to {(error - lower) / lower if lower else 0:.4%}, "
        f"{1 - costs.total(choice) / budget:.4%} of the budget left{', VIOLATED' if over else ''}",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    if arguments and not arguments[0].isdigit():
        real_instances(Path(arguments[0]), Path(arguments[1]), *arguments[2:3])
    else:
        random_instance(*map(int, arguments))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
