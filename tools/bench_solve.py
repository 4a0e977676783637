"""How long the solver takes: `python -m onnx_spdy.tools.bench_solve [LAYERS LEVELS BUCKETS]`."""

from __future__ import annotations

import sys
import time

import numpy as np

from onnx_spdy.pipeline.solve import Costs, solve

REPEATS = 50


def main(layers: int = 54, levels: int = 42, buckets: int = 10_000) -> None:
    """Solve one random instance again and again and print the least and the median time."""
    rng = np.random.default_rng(0)
    errors = np.sort(rng.random((layers, levels)), axis=1)
    seconds = np.sort(rng.random((layers, levels)), axis=1)[:, ::-1]
    budget = float(seconds[:, 0].sum()) / 2
    costs = Costs(seconds)
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        solve(errors, costs, budget, buckets)
        spent.append(1000 * (time.perf_counter() - start))
    print(
        f"{layers} layers x {levels} levels x {buckets} buckets: min {min(spent):.1f}, median {np.median(spent):.1f} ms"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
